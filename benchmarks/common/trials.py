"""One trial: a network, trained on some volumes and scored on others, in a process of its own."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import resource
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.common.machine import machine_lines
from benchmarks.common.networks import OURS, build, gmac
from benchmarks.common.scores import Scores, score
from torch import nn

from deformux.cli.devices import device_name
from deformux.data.atomic_files import write_text
from deformux.data.cases import Case
from deformux.data.preprocessing import Preprocessing
from deformux.fitting.checkpoint import label_checksum
from deformux.fitting.fit import FitResult, Progress, fit
from deformux.fitting.recipe import Recipe
from deformux.inference.metrics import mean_dice
from deformux.networks.model_file import ModelCard, save_model, warm_start

__all__ = ["Result", "Task", "Tell", "Trial", "affordable_steps", "model_file", "run_trial"]

# Steps to warm up and steps to time. The first ones compile and fill caches; on a GPU, where a step may take
# milliseconds, the patches of further ones were drawn ahead meanwhile.
_TIMES = {"cpu": (5, 20), "cuda": (60, 240)}
_EPOCHS = 10

# Called with the activity, and the part of the training that is done (0..1).
Tell = Callable[[str, float], None]


@dataclass(frozen=True)
class Task:
    """A learning task: labels, training and test cases, and the recipe that all networks share."""

    labels: tuple[str, ...]
    prep: Preprocessing
    recipe: Recipe
    train: tuple[Case, ...]
    test: tuple[Case, ...]


@dataclass(frozen=True)
class Trial:
    """A training and its test.

    Args:
        title: sets it apart from the other trials of a command.
        task: the learning task.
        network, size, options: arguments of ``build``.
        seed: of the weights and of every random choice.
        steps: optimizer steps.
        seconds: instead of ``steps``: as many as fit into this time, by the time of a step measured at the start.
        start_from: model file whose weights it starts with, if they fit.
        keep_model: write a model file beside the result.
        device, threads: where to compute.
    """

    title: str
    task: Task
    network: str = OURS
    size: str = "tiny"
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    steps: int = 400
    seconds: float | None = None
    start_from: Path | None = None
    keep_model: bool = False
    device: str = "cpu"
    threads: int = 2

    @property
    def name(self) -> str:
        """Return a file name that differs if anything differs that could change the result."""
        return self._named(self.title, ())

    @property
    def pace_name(self) -> str:
        """Return a file name for its speed, which no seed changes."""
        return self._named(f"{self.network} {self.size}", ("title", "seed", "keep_model"))

    def _named(self, title: str, without: Collection[str]) -> str:
        task = self.task
        identity = {
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("task", *without)},
            "start_from": self.start_from and self.start_from.name,
            "labels": task.labels,
            "prep": task.prep.to_dict(),
            "recipe": task.recipe.to_dict(),
            "train": [case.id for case in task.train],
            "test": [case.id for case in task.test],
        }
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        return f"{re.sub('[^A-Za-z0-9.]+', '-', title)}-{digest[:10]}"


@dataclass(frozen=True)
class Result:
    """Result of a trial.

    Args:
        trial: the trial.
        scores: of the test cases.
        parameters, gmac: of the network; billions of multiply-adds of a forward pass on one patch.
        steps, seconds: of the training, without the reading of its volumes.
        seconds_per_step: the median, augmentation included; None after too few steps.
        peak_gb: memory of the process, or of the GPU, at the end of the training.
        machine: facts of the machine, one per line, and the number of trainings that ran at a time.
    """

    trial: Trial
    scores: Scores
    parameters: int
    gmac: float
    steps: int
    seconds: float
    seconds_per_step: float | None
    peak_gb: float
    machine: tuple[str, ...]

    def per_case(self, metric: str) -> np.ndarray:
        """Return ``(cases, labels)``, NaN if a label is in neither volume."""
        return np.array([values[metric] for values in self.scores.values()], dtype=float)

    def mean(self, metric: str) -> float:
        """Return the mean over labels of the mean over cases."""
        return mean_dice(self.per_case(metric))


class _Clock:
    """A ``stop`` for ``fit`` that never stops, but notes the time of every step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self) -> bool:
        self.times.append(time.monotonic())
        return False

    def seconds(self) -> np.ndarray:
        """Return the seconds of each step but the first."""
        return np.diff(self.times)


def run_trial(trial: Trial, name: str, folder: Path, tell: Tell, *, jobs: int = 1) -> None:
    """Train, score, and write ``finished/<name>.json`` by rename; resume a killed training from its checkpoint.

    Args:
        trial: the trial.
        name: its name in the process that started this one, whose source may be older.
        folder: for the result, the model and the checkpoint.
        tell: called with the activity, and the part of the training that is done (0..1).
        jobs: how many trials may run at the same time.
    """
    torch.set_num_threads(trial.threads)
    task = trial.task
    network = _network(trial)
    cost = gmac(network, (1, 1, *task.prep.patch_size))
    unfinished = folder / "unfinished" / name
    steps = trial.steps if trial.seconds is None else affordable_steps(trial, folder, tell)
    recipe = task.recipe.in_steps(steps, epochs=_EPOCHS)
    clock, cuda = _Clock(), trial.device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats(trial.device)
    checkpoint = unfinished / "checkpoint.safetensors"
    result = _fit(trial, task.train, network, recipe, clock, tell, checkpoint)
    peak = torch.cuda.max_memory_allocated(trial.device) if cuda else _peak_bytes()
    tested: list[None] = []

    def told() -> None:
        tested.append(None)
        tell(f"testing, volume {len(tested)} of {len(task.test)}", 1.0)

    scores = score(network, task.test, task.prep, n_labels=len(task.labels), device=trial.device, on_case=told)
    if trial.keep_model:
        save_model(model_file(folder, name), network, _card(trial, recipe, result, scores))
    values = Result(
        trial=trial,
        scores=scores,
        parameters=sum(p.numel() for p in network.parameters()),
        gmac=cost,
        steps=recipe.steps,
        seconds=result.seconds,
        seconds_per_step=float(np.median(clock.seconds())) if len(clock.times) > 1 else None,
        peak_gb=peak / 1e9,
        machine=(*machine_lines(), *([f"up to {jobs} trainings at a time"] if jobs > 1 else [])),
    )
    write_text(
        folder / "finished" / f"{name}.json",
        json.dumps({f.name: getattr(values, f.name) for f in dataclasses.fields(values) if f.name != "trial"}),
    )
    checkpoint.unlink(missing_ok=True)


def model_file(folder: Path, name: str) -> Path:
    """Return the path of a trial's model."""
    return folder / "models" / f"{name}.safetensors"


def affordable_steps(trial: Trial, folder: Path, tell: Tell) -> int:
    """Return the steps that fit into the trial's seconds, timed once: all seeds take the same number."""
    kept = folder / "steps" / f"{trial.pace_name}.txt"
    if not kept.is_file():
        torch.set_num_threads(trial.threads)
        warm_up, timed = _TIMES[trial.device.partition(":")[0]]
        clock, recipe = _Clock(), trial.task.recipe.in_steps(warm_up + timed, epochs=1)
        # No more volumes are read than are drawn.
        drawn = trial.task.train[: recipe.steps * recipe.batch_size]
        _fit(trial, drawn, _network(trial), recipe, clock, tell)
        # Steps with clicks take longer, and come only in the later part of a run.
        pace = clock.seconds()[warm_up - 1 :].sum() / (recipe.effort(recipe.steps) - recipe.effort(warm_up))
        write_text(kept, str(max(1, int(trial.seconds / pace * recipe.steps / recipe.effort(recipe.steps)))))
    return int(kept.read_text())


def _network(trial: Trial) -> nn.Module:
    """Build the network as it is before its first step."""
    torch.manual_seed(trial.seed)
    classes, patch = len(trial.task.labels) + 1, trial.task.prep.patch_size
    network = build(trial.network, trial.size, classes=classes, patch=patch, options=trial.options)
    if trial.start_from is not None:
        warm_start(network, trial.start_from)
    return network


def _fit(
    trial: Trial,
    cases: Sequence[Case],
    network: nn.Module,
    recipe: Recipe,
    clock: _Clock,
    tell: Tell,
    checkpoint: Path | None = None,
) -> FitResult:
    what, worth = ("training", 1.0) if checkpoint is not None else ("timing", 0.0)

    def show(progress: Progress) -> None:
        tell(f"{what}, step {progress.step} of {progress.total_steps}", worth * progress.step / progress.total_steps)

    tell("reading volumes", 0.0)
    return fit(
        network,
        cases,
        recipe=recipe,
        prep=trial.task.prep,
        labels=trial.task.labels,
        device=trial.device,
        seed=trial.seed,
        on_progress=show,
        stop=clock,
        checkpoint=checkpoint,
    )


def _card(trial: Trial, recipe: Recipe, result: FitResult, scores: Scores) -> ModelCard:
    task = trial.task
    dice = {case: values["dice"] for case, values in scores.items()}
    return ModelCard(
        labels=task.labels,
        preprocessing=task.prep,
        preset=trial.size,
        network_options=trial.options,
        parent=trial.start_from.stem if trial.start_from else None,
        training_cases=tuple(case.id for case in task.train),
        training_labels={case.id: label_checksum(case) for case in task.train},
        recipe=recipe.to_dict(),
        seed=trial.seed,
        validation={"mean_dice": mean_dice(np.array(list(dice.values()), dtype=float)), "per_case": dice},
        seconds=round(result.seconds, 1),
        device=device_name(trial.device),
        notes="The validation cases took no part in training; they were scored once, at its end.",
    )


def _peak_bytes() -> int:
    """Return the largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
