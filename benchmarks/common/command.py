"""What the commands share: options, the hippocampus task, and errors in one sentence."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common.trials import Task

from deformux.cli.devices import torch_device
from deformux.data.cases import find_cases
from deformux.data.preprocessing import Preprocessing
from deformux.fitting.recipe import RECIPES

__all__ = ["PATCH_SIZE", "RECIPE", "at_learning_rate", "hippocampus", "options", "placement", "run"]

RESULTS = Path(__file__).parents[1] / "results"
# Holds a whole volume of the hippocampus data with a margin.
PATCH_SIZE = (48, 64, 48)
# At the learning rate of all committed trials: by what best_model found, the library's own is now twice that. Without
# clicks, which only DeformUX-Net could learn from.
RECIPE = RECIPES["finetune"].replace(learning_rate=1e-3, clicks=0)


def options(name: str, doc: str | None, *, seeds: int | None = 3, data: str = "../shared/data/hippocampus") -> Any:
    """A parser with the options that commands share; its description is the module's docstring."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.quality.{name}", description=doc, formatter_class=_Formatter
    )
    parser.add_argument("--data", type=Path, default=Path(data), help="folder of the data")
    parser.add_argument(
        "--work",
        type=Path,
        default=RESULTS / "trials" / name,
        help="finished trials are kept here, and not run again: to commit, so that another machine goes on",
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the table, the CSV and the plot")
    if seeds is not None:
        parser.add_argument("--seeds", type=int, default=seeds, help="how often everything is repeated")
    parser.add_argument("--cases", type=int, help="volumes to train and to test on, at most: to try a command")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N, or auto")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of a training")
    if seeds is not None:
        parser.add_argument("--jobs", type=int, default=1, help="trainings at a time; a GPU has room for many")
    return parser


def placement(arguments: argparse.Namespace) -> dict[str, Any]:
    """Where the trials compute, as arguments of ``Trial``; ``run_trials`` asks whether this machine can."""
    device = torch_device("auto") if arguments.device == "auto" else arguments.device
    return {"device": device, "threads": arguments.threads}


def hippocampus(arguments: argparse.Namespace, *, patch_size: tuple[int, int, int] = PATCH_SIZE) -> Task:
    """Both labels of the hippocampus data: trained on ``train``, tested on ``val``."""
    train, val = (find_cases(arguments.data, subset=subset)[: arguments.cases] for subset in ("train", "val"))
    return Task(
        labels=("anterior", "posterior"),
        prep=Preprocessing("mr", patch_size=patch_size),
        # Left and right hippocampi are mirror images, and the data holds both.
        recipe=RECIPE.replace(flip_axes=(0,), foreground_ratio=1.0, affine_probability=0.8),
        train=tuple(train),
        test=tuple(val),
    )


def at_learning_rate(task: Task, name: str, rate: float | None) -> tuple[Task, str]:
    """A task, and the name of its results, at another learning rate than that of all benchmarks, if there is one."""
    if rate is None:
        return task, name
    return dataclasses.replace(task, recipe=task.recipe.replace(learning_rate=rate)), f"{name}_at_{rate:g}"


def run(main: Callable[[], None]) -> None:
    """Run a command; what its user can cause ends in one sentence."""
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass
