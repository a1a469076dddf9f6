"""Helpers of the commands: the app's folder, errors in one sentence, and untruncated tables."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from deformux_label.lib.store.notices import printable

if TYPE_CHECKING:
    from deformux_label.lib.store.datastore import CheckedDatastore

__all__ = ["app_folder", "open_studies", "print_table", "refuse", "terminal_text"]

# Width of a table in a file or a pipe, where lines are not wrapped.
_MAX_WIDTH = 20_000


def app_folder() -> Path:
    """Return the installed app's folder, or, if that is read-only, a user's folder that links to it.

    MONAI Label keeps models and logs inside the app's folder.
    """
    installed = Path(__file__).resolve().parents[1]
    if os.access(installed, os.W_OK):
        return installed
    data = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "deformux-label"
    data.mkdir(parents=True, exist_ok=True)
    for part in ("main.py",):
        link = data / part
        if link.is_symlink():
            link.unlink()
        link.symlink_to(installed / part)
    return data


def refuse(reason: str) -> NoReturn:
    """End the command with one sentence."""
    typer.echo(f"deformux-label: {reason}.", err=True)
    raise typer.Exit(2)


def print_table(table: Table) -> None:
    """Print a table without truncating cells, because users retype its names and programs parse them."""
    for column in table.columns:
        column.overflow = "fold"
    Console(width=None if sys.stdout.isatty() else _MAX_WIDTH, markup=False, highlight=False).print(table)


def open_studies(studies: Path) -> CheckedDatastore:
    """Open an existing studies folder, or end the command."""
    if not studies.is_dir():
        refuse(f"studies must be a folder with volumes; got {str(studies)!r}")
    # Imports MONAI Label, which takes seconds; other commands avoid it.
    from deformux_label.lib.store.datastore import CheckedDatastore, StudiesError

    try:
        return CheckedDatastore(str(studies), labels=None)
    except StudiesError as error:
        refuse(str(error))


def terminal_text(value: Any) -> str:
    """Return a value as text that can neither move the cursor nor colour the terminal."""
    return printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
