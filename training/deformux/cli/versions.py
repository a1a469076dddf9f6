"""``deformux versions``: the models that a project's trainings made, and which one is served."""

from __future__ import annotations

import getpass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from deformux.cli.common import clear_errors, existing_folder

if TYPE_CHECKING:
    from deformux.networks.model_file import ModelCard
    from deformux.publishing.model_versions import ModelVersions, VersionInfo

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="List, inspect, publish and roll back the versions of a project's model.")


def _console() -> Console:
    """Make a console for each command: it reads the terminal's width when it is made."""
    return Console()


Folder = Annotated[
    Path, typer.Argument(help="Folder that holds the versions: versions/ in the project's state, or that state folder.")
]
Name = Annotated[str, typer.Argument(help="Name of a version, such as v0003.")]
Reason = Annotated[str, typer.Option(help="Kept in the history.")]


@app.command(name="list")
def list_command(folder: Folder) -> None:
    """List all versions, and the history of publications."""
    with clear_errors():
        versions = _open(folder)
        table = Table("version", "created", "parent", "cases", "validation Dice", "", title=str(versions.root))
        for info in versions.infos():
            card = info.card
            cells = (card.created, card.parent or "scratch", str(len(card.training_cases)), _dice(card), _state(info))
            table.add_row(info.name, *cells, style="bold" if info.published else None)
        _console().print(table)
        for fault in versions.damaged().values():
            _console().print(f"[red]damaged:[/red] {fault}", highlight=False, soft_wrap=True)
        for warning in versions.warnings():
            _console().print(f"[red]warning:[/red] {warning}", highlight=False, soft_wrap=True)
        for entry in versions.history():
            _console().print(
                f"{entry.time}  {entry.kind:9}{entry.version}  {entry.by}: {entry.reason}", highlight=False
            )


@app.command(name="show")
def card_command(folder: Folder, name: Name) -> None:
    """Print the card of a version: its origin, and why it was published or not."""
    with clear_errors():
        _console().print_json(_open(folder).card(name).to_json())


@app.command(name="publish")
def publish_command(folder: Folder, name: Name, reason: Reason = "published by hand") -> None:
    """Serve this version from now on."""
    with clear_errors():
        _open(folder).publish(name, reason, by=getpass.getuser())
        _console().print(f"{name} is published")


@app.command(name="rollback")
def rollback_command(folder: Folder, reason: Reason = "rolled back") -> None:
    """Serve the version published before; repeat to go further back."""
    with clear_errors():
        name = _open(folder).rollback(reason, by=getpass.getuser())
        _console().print(f"{name} is published again")


@app.command(name="pin")
def pin_command(
    folder: Folder,
    name: Annotated[str, typer.Argument(help="Name of a version; default: the published one.")] = "",
    reason: Reason = "pinned",
) -> None:
    """Serve this version until it is unpinned, whatever trainings publish."""
    with clear_errors():
        pinned = _open(folder).pin(name or None, reason, by=getpass.getuser())
        _console().print(f"{pinned} is published and pinned")


@app.command(name="unpin")
def unpin_command(folder: Folder) -> None:
    """Let trainings publish again."""
    with clear_errors():
        _open(folder).unpin()
        _console().print("no version is pinned")


def _open(folder: Path) -> ModelVersions:
    """Open the versions in a folder, without turning a wrong folder into one of versions."""
    existing_folder(folder)
    # This imports torch: report a wrong folder first.
    from deformux.publishing.model_versions import ModelVersions

    for root in (folder, folder / "versions"):
        versions = ModelVersions(root)
        if versions.names() or versions.damaged():
            return versions
    raise ValueError(f"{folder} holds no versions (v0001.safetensors and v0001.json, ...)")


def _dice(card: ModelCard) -> str:
    value = card.validation.get("mean_dice")
    return "none" if value is None else f"{value:.4f}"


def _state(info: VersionInfo) -> str:
    words = [
        "published" if info.published else "published before" if info.ever_published else "",
        "pinned" if info.pinned else "",
        "provisional" if info.card.provisional else "",
    ]
    return ", ".join(word for word in words if word)
