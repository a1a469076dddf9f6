"""Parts that the commands of ``deformux`` share: options, errors in one sentence, progress."""

from __future__ import annotations

import dataclasses
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from deformux.data.cases import InvalidFolder, label_names, sequence_naming, split_label_names
from deformux.data.preprocessing import Preprocessing
from deformux.networks.pretrained import PRETRAINED, pretrained_path

__all__ = [
    "MAX_SEED",
    "MAX_THREADS",
    "ProgressBar",
    "assignments",
    "clear_errors",
    "console",
    "existing_folder",
    "model_path",
    "named_labels",
    "print_sentences",
    "timed_bar",
    "valid_device",
    "with_sequences",
    "writable_file",
    "writable_folder",
]

# NumPy's and PyTorch's generators take more; seeds are counted up from here.
MAX_SEED = 2**31 - 1
# More than any machine has, and few enough for PyTorch to start.
MAX_THREADS = 1024
# mps and xpu are untested, but PyTorch may support them.
_DEVICE = re.compile(r"auto|(cpu|cuda|mps|xpu)(:\d{1,2})?")

console = Console()


class ProgressBar(Progress):
    """A progress bar that prints a line at intervals in a log or a pipe, where no bar can be redrawn.

    Args:
        columns: of the bar, and of a line.
        console: where to show it.
        line_seconds: shortest time between two lines.
        disable: show nothing.
    """

    def __init__(
        self,
        *columns: ProgressColumn,
        console: Console = console,
        line_seconds: float = 30.0,
        disable: bool = False,
    ) -> None:
        super().__init__(*columns, console=console, disable=disable)
        self._line_seconds = line_seconds
        self._last_line = time.monotonic()

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        # The bar itself prints the last state when it ends.
        if (
            self.disable
            or self.console.is_terminal
            or self.finished
            or time.monotonic() - self._last_line < self._line_seconds
        ):
            return
        self._last_line = time.monotonic()
        self.console.print(self.get_renderable())


@contextmanager
def timed_bar(what: str, *, shown: bool = True) -> Iterator[ProgressBar]:
    """Show a progress bar under a title, with elapsed and remaining time."""
    columns = (
        TextColumn(f"{what}: {{task.description}}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("elapsed"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with ProgressBar(*columns, disable=not shown) as bar:
        yield bar


def print_sentences(sentences: Sequence[str]) -> None:
    """Print sentences about files, one a line."""
    for sentence in sentences:
        console.print(escape(sentence), soft_wrap=True, highlight=False)


@contextmanager
def clear_errors(*others: type[Exception]) -> Iterator[None]:
    """End the command with one sentence on an error that a user can cause: ValueError, OSError and ``others``."""
    user_errors: tuple[type[Exception], ...] = (ValueError, OSError, *others)
    try:
        yield
    except user_errors as error:
        console.print(f"[bold red]error:[/bold red] {error}", soft_wrap=True, highlight=False)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        console.print("stopped")
        raise typer.Exit(130) from error


def valid_device(name: str) -> str:
    """Return the device of an option, available or not; raise ValueError if it does not name one."""
    if not _DEVICE.fullmatch(name):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N; got {name!r}")
    return name


def model_path(name: str) -> Path:
    """Return the model file of an option: a path, or the name of a shipped model.

    Raises:
        ValueError: there is no such file or model.
    """
    path = Path(name)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a model file (.safetensors) in it")
    if path.suffix == ".safetensors" or len(path.parts) > 1:
        if not path.is_file():
            raise ValueError(f"there is no model file {path}")
        if path.suffix != ".safetensors":
            raise ValueError(f"{path} is not a model file; those end in .safetensors")
        return path
    try:
        return pretrained_path(name)
    except ValueError as error:
        raise ValueError(
            f"{name!r} is neither a model file (.safetensors) nor a shipped model; these are {', '.join(PRETRAINED)}"
        ) from error


def existing_folder(path: Path) -> Path:
    """Return the folder of an argument; raise InvalidFolder if there is none."""
    if not path.exists():
        raise InvalidFolder(f"there is no folder {path}")
    if not path.is_dir():
        raise InvalidFolder(f"{path} is a file; a folder is expected")
    return path


def writable_folder(path: Path) -> Path:
    """Return a folder for results, created if missing; raise ValueError if nothing can be written to it.

    Check it before the work, which may take hours.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise ValueError(f"nothing can be written to {path}: {_reason(path, error)}") from error


def writable_file(path: Path, *, suffix: str = "") -> Path:
    """Return a file for results, its folder created if missing; raise ValueError if it cannot be written."""
    if suffix and path.suffix != suffix:
        raise ValueError(f"the name of {path} must end in {suffix}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file to write")
    writable_folder(path.parent)
    return path


def _reason(path: Path, error: OSError) -> str:
    file = next((part for part in (path, *path.parents) if part.is_file()), None)
    return f"{file} is a file, not a folder" if file is not None else (error.strerror or str(error)).lower()


def named_labels(option: str, data: Path) -> list[str]:
    """Return the names of labels 1..N from an option, else from the folder.

    Raises:
        ValueError: the option is not a list of different names.
        InvalidFolder: neither gives names.
    """
    names = list(split_label_names(option)) if option.strip() else label_names(data)
    if not names:
        raise InvalidFolder(f"{data} has no dataset.json: name the labels with --labels a,b")
    return names


def with_sequences(prep: Preprocessing, data: Path) -> Preprocessing:
    """Return these settings for the sequences of a data set's cases.

    Raises:
        InvalidFolder: it is not a data set.
    """
    return dataclasses.replace(prep, sequences=sequence_naming(data).channels)


def assignments(pairs: list[str]) -> dict[str, object]:
    """Parse ``name=value`` options as changes to a recipe."""
    changes: dict[str, object] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"--set takes name=value; got {pair!r}")
        changes[name] = _value(text)
    return changes


def _value(text: str) -> object:
    """Parse a value of a recipe: a number, none, a comma-separated tuple, or a word."""
    if "," in text:
        return tuple(_value(part) for part in text.split(",") if part)
    if text.lower() in ("none", "true", "false"):
        return {"none": None, "true": True, "false": False}[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
