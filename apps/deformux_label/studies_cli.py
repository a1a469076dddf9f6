"""``deformux-label studies``: what a folder holds, what is not used and why, and what was deleted."""

from __future__ import annotations

import getpass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from deformux_label.command_log import recorded

if TYPE_CHECKING:
    from deformux_label.lib.datastore import CheckedDatastore

__all__ = ["studies_app"]

studies_app = typer.Typer(help="What a studies folder holds, what is not served, and what was deleted.")

_Studies = Annotated[Path, typer.Option(help="Folder with the volumes.")]


@studies_app.callback(invoke_without_command=True)
def show(
    context: typer.Context,
    studies: Annotated[Path | None, typer.Option(help="Folder with the volumes.")] = None,
) -> None:
    """List how many volumes are served, which files are not, and which labels do not count, with the reasons."""
    if context.invoked_subcommand is not None:
        return
    if studies is None:
        _refuse("give the folder with the volumes as --studies")
    store = _open(studies)
    unusable = store.check_scans()
    status = store.status()
    typer.echo(f"{status['total'] - len(unusable)} volumes are served, {status['completed']} of them are labelled.")
    for title, reasons in (("not served", store.not_served()), ("label without use", store.unusable_labels())):
        if reasons:
            table = Table(title, "reason", box=None)
            for name, reason in sorted(reasons.items()):
                table.add_row(_printable(name), _printable(reason))
            Console(soft_wrap=True).print(table, markup=False)
    for warning in store.warnings():
        typer.echo(f"Warning: {_printable(warning)}.")


@studies_app.command("trash")
def list_trash(studies: _Studies) -> None:
    """List what was deleted and can be brought back."""
    table = Table("name", "what", "image", "deleted", "labels", box=None)
    for entry in _open(studies).trash.entries():
        when = datetime.fromtimestamp(entry.time).isoformat(" ", "seconds")
        table.add_row(entry.name, entry.kind, entry.image, when, ", ".join(entry.labels))
    Console(soft_wrap=True).print(table, markup=False)


@studies_app.command("restore")
def restore(
    studies: _Studies, name: Annotated[str, typer.Argument(help="Of what was deleted, as `studies trash` lists it.")]
) -> None:
    """Bring back a volume with its labels, or a label, that was deleted."""
    from fastapi import HTTPException

    try:
        with recorded(studies, "restore from trash") as done:
            image = _open(studies).bring_back(name, getpass.getuser())
            done |= {"image": image, "trash": name}
    except HTTPException as error:
        _refuse(error.detail)
    typer.echo(f"Image {image} is back.")


def _open(studies: Path) -> CheckedDatastore:
    if not studies.is_dir():
        _refuse(f"studies must be a folder with volumes; got {str(studies)!r}")
    # Its import of MONAI Label takes seconds: not for the other commands.
    from deformux_label.lib.datastore import CheckedDatastore, StudiesError

    try:
        return CheckedDatastore(str(studies), labels=None)
    except StudiesError as error:
        _refuse(str(error))


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _refuse(reason: str) -> NoReturn:
    typer.echo(f"deformux-label: {reason}.", err=True)
    raise typer.Exit(2)
