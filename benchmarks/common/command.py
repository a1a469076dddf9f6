"""Options, the hippocampus task and error messages of the commands that train networks."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common.places import HIPPOCAMPUS, RESULTS, WORK
from benchmarks.common.report import add_rewrite
from benchmarks.common.trial_data import TrialData
from benchmarks.common.trials import Task

from deformux.cli.devices import torch_device
from deformux.data.cases import find_cases
from deformux.data.preprocessing import Preprocessing
from deformux.fitting.recipe import RECIPES

__all__ = [
    "PATCH_SIZE",
    "RECIPE",
    "at_learning_rate",
    "hippocampus",
    "options",
    "placement",
    "run_command",
    "trial_data",
]

# Holds a whole volume of the hippocampus data with a margin.
PATCH_SIZE = (48, 64, 48)
# The learning rate of all committed trials. The library's own is twice that, as best_model found. Without clicks, which
# only DeformUX-Net could learn from.
RECIPE = RECIPES["finetune"].replace(learning_rate=1e-3, clicks=0)


def options(name: str, doc: str | None, *, seeds: int | None = 3, data: Path = HIPPOCAMPUS) -> Any:
    """Return a parser with the options that commands share; its description is the module's docstring."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.quality.{name}", description=doc, formatter_class=_Formatter
    )
    parser.add_argument("--data", type=Path, default=data, help="a folder of labelled NIfTI")
    parser.add_argument("--work", type=Path, default=WORK / name, help="folder for checkpoints, models and locks")
    parser.add_argument(
        "--results",
        type=Path,
        default=RESULTS,
        help="folder of pages, pictures and data files; trials in a data file are not run again",
    )
    add_rewrite(parser)
    if seeds is not None:
        parser.add_argument("--seeds", type=int, default=seeds, help="number of repetitions")
    parser.add_argument("--cases", type=int, help="train and test on at most this number of volumes")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N, or auto")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of a training")
    if seeds is not None:
        parser.add_argument("--jobs", type=int, default=1, help="trainings at a time; a GPU has room for many")
    return parser


def placement(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return device and threads as arguments of ``Trial``; ``run_trials`` checks that this machine has the device."""
    device = torch_device("auto") if arguments.device == "auto" else arguments.device
    return {"device": device, "threads": arguments.threads}


def hippocampus(arguments: argparse.Namespace, *, patch_size: tuple[int, int, int] = PATCH_SIZE) -> Task:
    """Return the task of both labels of the hippocampus data: train on ``train``, test on ``val``."""
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
    """Return a task and the name of its section, both with another learning rate if one is given."""
    if rate is None:
        return task, name
    return dataclasses.replace(task, recipe=task.recipe.replace(learning_rate=rate)), f"{name}_at_{rate:g}"


def trial_data(arguments: argparse.Namespace, benchmark: str) -> TrialData:
    """Return the finished trials of a benchmark, to which ``--rewrite`` adds none."""
    return TrialData(arguments.results, benchmark, arguments.work, complete=arguments.rewrite)


def run_command(main: Callable[[], None]) -> None:
    """Run a command; end with one sentence on errors that its user can cause."""
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command resumes here")


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass
