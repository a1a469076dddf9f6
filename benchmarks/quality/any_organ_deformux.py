"""DeformUX-Net trained for some minutes with given settings."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from benchmarks.quality.any_organ_fixed import Settings
from torch import nn

from deformux.data.cases import Case, Scan
from deformux.fitting.fit import Progress, fit
from deformux.fitting.recipe import Recipe
from deformux.inference.sliding_window import segment
from deformux.networks.deformux_net import DeformUXNet

__all__ = ["Trained", "deformux_segmenter", "train_deformux"]

# Steps to warm up and steps to time: the first ones compile and fill caches. On a GPU, where a step takes
# milliseconds, the patches of further ones were drawn ahead meanwhile.
_TIMED = {"cpu": (3, 24), "cuda": (60, 240)}
_EPOCHS = 10
_FEWEST_STEPS = 2

# Called with what is done now, and the part of the training that is done (0..1).
Tell = Callable[[str, float], None]


@dataclass(frozen=True)
class Trained:
    """A trained network, its optimizer steps, and the seconds they took."""

    network: nn.Module
    steps: int
    seconds: float


def train_deformux(
    settings: Settings,
    cases: Sequence[Case],
    labels: Sequence[str],
    *,
    seconds: float,
    seed: int,
    device: str,
    tell: Tell,
    scans: Sequence[Scan] = (),
) -> Trained:
    """Train from scratch for as many steps as fit into a time, by the pace of some that are timed before.

    Reading the volumes, and the timed steps, are not part of the time: every contender starts with its volumes read.
    """
    warm_up, timed = _TIMED[device.partition(":")[0]]
    clock = _StepClock()
    # Without clicks: among so few steps their number is a matter of chance, and each counts for two.
    trial = settings.recipe.in_steps(warm_up + timed, epochs=1).replace(click_start=1.0)
    tell("timing steps", 0.0)
    _fit(settings, cases, labels, trial, seed, device, clock, scans=())
    pace = float(clock.seconds(warm_up + timed)[warm_up - 1 :].mean())
    whole = settings.recipe.in_steps(1000, epochs=1)
    steps = max(_FEWEST_STEPS, int(seconds / pace * whole.steps / whole.effort(whole.steps)))
    recipe = settings.recipe.in_steps(steps, epochs=_EPOCHS)

    def show(progress: Progress) -> None:
        tell(f"training, step {progress.step} of {steps}", progress.step / steps)

    clock = _StepClock()
    network = _fit(settings, cases, labels, recipe, seed, device, clock, show, scans=scans)
    # From the end of the first step, to which its share is added: before it the volumes are read.
    own = clock.seconds(steps)
    return Trained(network, steps, float(own.sum() * steps / (steps - 1)))


def deformux_segmenter(network: nn.Module, settings: Settings, device: str) -> Callable[[Case], np.ndarray]:
    """Return a function from a case to its labels ``(X, Y, Z)`` on its own grid."""

    def segment_case(case: Case) -> np.ndarray:
        found, _ = segment(network, case.images, settings.prep, device=device)
        return np.asarray(found[0])

    return segment_case


class _StepClock:
    """A ``stop`` for ``fit`` that never stops, but notes the time of every step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self) -> bool:
        self.times.append(time.monotonic())
        return False

    def seconds(self, steps: int) -> np.ndarray:
        """Return the seconds of each of the last steps but the first of them: before, volumes are read."""
        return np.diff(self.times[-steps:])


def _fit(
    settings: Settings,
    cases: Sequence[Case],
    labels: Sequence[str],
    recipe: Recipe,
    seed: int,
    device: str,
    clock: _StepClock,
    show: Callable[[Progress], None] | None = None,
    *,
    scans: Sequence[Scan],
) -> nn.Module:
    torch.manual_seed(seed)
    options: dict[str, Any] = {} if settings.strides is None else {"strides": settings.strides}
    network = DeformUXNet(
        settings.prep.channels, len(labels) + 1, settings.preset, guidance=recipe.clicks > 0, **options
    )
    fit(
        network,
        cases,
        recipe=recipe,
        prep=settings.prep,
        labels=labels,
        scans=scans,
        device=device,
        on_progress=show,
        seed=seed,
        stop=clock,
    )
    return network
