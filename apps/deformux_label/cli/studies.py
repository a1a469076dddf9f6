"""``deformux-label studies``: the volumes of a folder, unusable files with the reasons, and deleted files."""

from __future__ import annotations

import getpass
import logging
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from deformux_label.cli.command_log import recorded
from deformux_label.cli.common import open_studies, print_table, refuse, terminal_text

__all__ = ["studies_app"]

studies_app = typer.Typer(help="Volumes, unusable files and deleted files of a studies folder.")

_Studies = Annotated[Path, typer.Option(help="Folder with the volumes.")]


@studies_app.callback(invoke_without_command=True)
def show_command(
    context: typer.Context,
    studies: Annotated[Path | None, typer.Option(help="Folder with the volumes.")] = None,
) -> None:
    """Show the number of served volumes, the files that are not served and unusable labels, with the reasons."""
    if context.invoked_subcommand is not None:
        return
    if studies is None:
        refuse("give the folder with the volumes as --studies")
    # The tables show the same problems as the log.
    logging.getLogger("deformux_label").addHandler(logging.NullHandler())
    store = open_studies(studies)
    unusable = store.check_scans()
    status = store.status()
    typer.echo(f"{status['total'] - len(unusable)} volumes are served, {status['completed']} of them are labelled.")
    for title, reasons in (("not served", store.not_served()), ("unusable label", store.unusable_labels())):
        if reasons:
            table = Table(title, "reason", box=None)
            for name, reason in sorted(reasons.items()):
                table.add_row(terminal_text(name), terminal_text(reason))
            print_table(table)
    for warning in store.warnings():
        typer.echo(f"Warning: {terminal_text(warning)}.")


@studies_app.command("trash")
def list_trash(studies: _Studies) -> None:
    """List deleted volumes and labels that can be restored."""
    table = Table("name", "what", "image", "deleted", "labels", box=None)
    for entry in open_studies(studies).trash.entries():
        when = datetime.fromtimestamp(entry.time).isoformat(" ", "seconds")
        table.add_row(terminal_text(entry.name), entry.kind, terminal_text(entry.image), when, ", ".join(entry.labels))
    print_table(table)


@studies_app.command("restore")
def restore(
    studies: _Studies, name: Annotated[str, typer.Argument(help="Name of the entry, as `studies trash` lists it.")]
) -> None:
    """Restore a deleted volume with its labels, or a deleted label."""
    from fastapi import HTTPException

    try:
        with recorded(studies, "restore from trash") as done:
            image = open_studies(studies).bring_back(name, getpass.getuser())
            done |= {"image": image, "trash": name}
    except HTTPException as error:
        refuse(error.detail)
    typer.echo(f"Image {image} is restored.")
