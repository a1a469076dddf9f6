"""What the commands of ``deformux`` share: reading options, and errors in one sentence."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress, ProgressColumn, TaskID

from deformux.data.cases import InvalidFolder, label_names, split_label_names
from deformux.data.volume_reader import InvalidVolume
from deformux.fitting.fit import TrainingError
from deformux.networks.model_file import PRETRAINED, InvalidModel, pretrained_path

__all__ = [
    "LARGEST_SEED",
    "MOST_THREADS",
    "ProgressBar",
    "assignments",
    "clear_errors",
    "console",
    "device_name",
    "existing_folder",
    "model_path",
    "named_labels",
    "one_of",
    "torch_device",
    "use_threads",
    "writable_file",
    "writable_folder",
]

# What numpy's and PyTorch's generators take, with room for the seeds that are counted up from it.
LARGEST_SEED = 2**31 - 1
# More than any machine has, and few enough that PyTorch can start them.
MOST_THREADS = 1024

console = Console()


class ProgressBar(Progress):
    """Progress that is also seen in a log or a pipe, where no bar can be redrawn: there it prints a line at intervals.

    Args:
        columns: of the bar, and of a line.
        console: where to show it.
        line_seconds: least time between two lines.
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
        # The last state is printed by the bar itself when it ends.
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
def clear_errors() -> Iterator[None]:
    """What a user can cause ends in one sentence."""
    try:
        yield
    except (InvalidFolder, InvalidModel, InvalidVolume, TrainingError, ValueError, OSError) as error:
        console.print(f"[bold red]error:[/bold red] {error}", soft_wrap=True, highlight=False)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        console.print("stopped")
        raise typer.Exit(130) from error


def use_threads(threads: int) -> None:
    """Let PyTorch compute on a number of CPU threads; 0 leaves the choice to it."""
    if threads:
        torch.set_num_threads(threads)


def torch_device(name: str) -> str:
    """The device of an option, ``auto`` resolved; raises ValueError where this machine has no such device."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N; got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("this machine has no usable CUDA device; use --device cpu")
    return name


def device_name(device: str) -> str:
    """What to call a device in a card."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"


def model_path(name: str) -> Path:
    """The model file of an option: a path, or the name of a shipped model."""
    path = Path(name)
    if path.is_dir():
        raise InvalidModel(f"{path} is a folder; name a model file (.safetensors) in it")
    if path.suffix == ".safetensors" or len(path.parts) > 1:
        if not path.is_file():
            raise InvalidModel(f"there is no model file {path}")
        if path.suffix != ".safetensors":
            raise InvalidModel(f"{path} is not a model file; those end in .safetensors")
        return path
    try:
        return pretrained_path(name)
    except ValueError as error:
        raise InvalidModel(
            f"{name!r} is neither a model file (.safetensors) nor a shipped model; these are {', '.join(PRETRAINED)}"
        ) from error


def existing_folder(path: Path) -> Path:
    """The folder of an argument; raises InvalidFolder where there is none."""
    if not path.exists():
        raise InvalidFolder(f"there is no folder {path}")
    if not path.is_dir():
        raise InvalidFolder(f"{path} is a file; a folder is expected")
    return path


def writable_folder(path: Path) -> Path:
    """A folder for results, made where it is missing; raises ValueError where nothing can be written to it.

    Asked before the work, which may take hours.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise ValueError(f"nothing can be written to {path}: {_reason(path, error)}") from error


def writable_file(path: Path, *, suffix: str = "") -> Path:
    """A file for results, its folder made where it is missing; raises ValueError where it cannot be written."""
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
    """Names of labels 1..N: those of an option, else those of the folder.

    Raises:
        ValueError: the option is not a list of different names.
        InvalidFolder: neither gives names.
    """
    names = list(split_label_names(option)) if option.strip() else label_names(data)
    if not names:
        raise InvalidFolder(f"{data} has no dataset.json: name the labels with --labels a,b")
    return names


def assignments(pairs: list[str]) -> dict[str, object]:
    """Changes to a recipe from ``name=value`` options."""
    changes: dict[str, object] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"--set takes name=value; got {pair!r}")
        changes[name] = _value(text)
    return changes


def _value(text: str) -> object:
    """A recipe's value from the command line: number, none, comma-separated tuple, or word."""
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


def one_of(name: str, value: str, valid: tuple[str, ...]) -> str:
    """An option's value, which must be one of the valid ones."""
    if value not in valid:
        raise ValueError(f"{name} must be one of {', '.join(valid)}; got {value!r}")
    return value
