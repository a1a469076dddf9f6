"""The ``deformux-label`` command line, and the commands of ``labels``."""

from __future__ import annotations

import getpass
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from deformux_label.cli.admin import audit, users_app
from deformux_label.cli.command_log import recorded
from deformux_label.cli.common import open_studies, print_table, refuse
from deformux_label.cli.serve import serve
from deformux_label.cli.studies import studies_app

__all__ = ["app"]

app = typer.Typer(
    help="One-click segmentation with DeformUX-Net for 3D Slicer.", no_args_is_help=True, pretty_exceptions_enable=False
)


labels_app = typer.Typer(help="All labels that were ever submitted.", no_args_is_help=True)
app.add_typer(labels_app, name="labels")
app.command()(serve)
app.add_typer(users_app, name="users")
app.command("audit")(audit)
app.add_typer(studies_app, name="studies")

_Studies = Annotated[Path, typer.Option(help="Folder with the volumes.")]
_Tag = Annotated[str, typer.Option(help="Tag of the label.")]


@labels_app.command("list")
def list_labels(
    studies: _Studies,
    image: Annotated[str, typer.Argument(help="Id of one volume; all volumes without it.")] = "",
    tag: _Tag = "final",
) -> None:
    """List the revisions of labels, with annotator, time and the model whose proposal they correct."""
    from fastapi import HTTPException

    table = Table("image", "revision", "time", "annotator", "model", "what", box=None)
    revisions = open_studies(studies).revisions
    for name in [image] if image else revisions.known():
        try:
            history = revisions.history(name, tag)
        except HTTPException as error:
            refuse(error.detail)
        if image and not history:
            refuse(f"image {image!r} has no revisions of a label {tag!r}")
        for revision in history:
            what = "deleted" if revision.deleted else revision.sha256[:12]
            what += f", restored from {revision.restored_from}" if revision.restored_from else ""
            when = datetime.fromtimestamp(revision.time).isoformat(" ", "seconds")
            table.add_row(name, str(revision.number), when, revision.annotator, revision.model_version or "", what)
    print_table(table)


@labels_app.command("restore")
def restore_label(
    studies: _Studies,
    image: Annotated[str, typer.Argument(help="Id of the volume.")],
    revision: Annotated[int, typer.Argument(help="Number of the revision to restore.")],
    tag: _Tag = "final",
) -> None:
    """Make an earlier revision of a label the current one; the current one stays as a revision."""
    from fastapi import HTTPException

    try:
        with recorded(studies, "restore label") as done:
            restored = open_studies(studies).restore_label(image, revision, getpass.getuser(), tag)
            done |= {"image": image, "tag": tag}
    except HTTPException as error:
        refuse(error.detail)
    typer.echo(f"Revision {revision} of image {image} is now the current label, as revision {restored.number}.")
