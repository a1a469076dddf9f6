"""Trainings by the clock: measure how long a step takes here, and take as many as fit."""

from __future__ import annotations

import copy
import logging
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress

import torch

from deformux.data.cases import Case, Scan
from deformux.data.preprocessing import Preprocessing
from deformux.data.transforms import inference_transforms, run_transforms
from deformux.data.volume_reader import InvalidVolume
from deformux.fitting.click_steps import ClickTraining
from deformux.fitting.optimizer import make_average, make_optimizer
from deformux.fitting.patches import Patches
from deformux.fitting.recipe import Recipe
from deformux.fitting.training_step import TrainingStep
from deformux.inference.evaluate import evaluate
from deformux.networks.deformux_net import DeformUXNet

__all__ = ["in_minutes"]

logger = logging.getLogger(__name__)

# Steps that are measured, after those that load kernels, fill caches, or capture graphs on a GPU: at least so many, and
# more while they take less than this share of the time. A few say little on a CPU: a server that has just started is
# busy for some seconds, and the steps of a training that was timed then were half of what there was time for.
_FEWEST_MEASURED = {"cpu": 3, "cuda": 20}
_MOST_MEASURED = 50
_MEASURING_SHARE = 0.02
_WARM_UP = {"cpu": 1, "cuda": 10}
# Longest share of the time that validation takes; fewer epochs are validated where it would take more.
_VALIDATION_SHARE = 0.15
# Most of the time that reading scans without a label takes.
_READING_SHARE = 0.1
_STEPS_PER_EPOCH = 20
# Below this a one-cycle schedule has no meaning.
_FEWEST_STEPS = 10


def in_minutes(
    minutes: float,
    network: DeformUXNet,
    cases: Sequence[Case],
    *,
    recipe: Recipe,
    prep: Preprocessing,
    labels: Sequence[str],
    val_cases: Sequence[Case] = (),
    scans: Sequence[Scan] = (),
    device: str | torch.device = "cpu",
) -> Recipe:
    """Return the recipe with as many steps and epochs as fit into a time on this machine, measured on a copy.

    Args:
        minutes: wall time of the training, with the time of this measurement.
        network: to be trained; it stays as it is.
        cases, recipe, prep, labels, val_cases, scans, device: as for ``fit``. Of ``scans`` it takes as many as are read
            in a small part of the time.

    Raises:
        ValueError: ``minutes`` is not positive.
    """
    if not minutes > 0:
        raise ValueError(f"minutes must be a positive number; got {minutes}")
    started = time.monotonic()
    device = torch.device(device)
    trial = copy.deepcopy(network).to(device)
    step = _seconds_of_a_step(trial, cases[:1], recipe, prep, labels, device, measure_s=60 * minutes * _MEASURING_SHARE)
    validation = 0.0
    if val_cases:
        before = time.monotonic()
        evaluate(trial.eval(), val_cases[:1], prep, n_labels=len(labels), labels=labels, device=device)
        validation = (time.monotonic() - before) * len(val_cases)
    recipe, reading = _with_scans(recipe, scans, prep, 60 * minutes)
    left = max(0.0, 60 * minutes - (time.monotonic() - started) - reading)
    one_step = step * _effort(recipe)
    epochs = max(1, min(recipe.epochs, int(left / one_step) // _STEPS_PER_EPOCH))
    if validation:
        epochs = max(1, min(epochs, int(_VALIDATION_SHARE * left / validation)))
    steps = max(_FEWEST_STEPS, int((left - epochs * validation) / one_step))
    logger.info("A step takes %.2f s, so that %d steps fit into %g minutes", one_step, steps, minutes)
    return recipe.in_steps(steps, epochs=epochs)


def _with_scans(recipe: Recipe, scans: Sequence[Scan], prep: Preprocessing, seconds: float) -> tuple[Recipe, float]:
    """Return the recipe with as many unlabelled scans as are read in time, and the time for that."""
    if not scans or not recipe.unlabelled_scans:
        return recipe.replace(unlabelled_scans=0), 0.0
    each = _seconds_of_a_scan(scans, prep)
    number = min(len(scans), recipe.unlabelled_scans, int(_READING_SHARE * seconds / each))
    logger.info("Of %d scans without a label, %d are learnt from", len(scans), number)
    return recipe.replace(unlabelled_scans=number), number * each


def _seconds_of_a_scan(scans: Sequence[Scan], prep: Preprocessing) -> float:
    """Return the time to read the first scan that can be read, and those before it."""
    before = time.monotonic()
    for scan in scans:
        with suppress(InvalidVolume):
            run_transforms(inference_transforms(prep), {"image": scan.images})
            break
    return time.monotonic() - before


def _effort(recipe: Recipe) -> float:
    """Return the mean time of a step in steps without clicks."""
    return recipe.effort(recipe.steps) / recipe.steps


def _seconds_of_a_step(
    network: DeformUXNet,
    cases: Sequence[Case],
    recipe: Recipe,
    prep: Preprocessing,
    labels: Sequence[str],
    device: torch.device,
    *,
    measure_s: float,
) -> float:
    """Return the median time of drawing patches and a step without clicks."""
    warm_up, fewest = _WARM_UP[device.type], _FEWEST_MEASURED[device.type]
    # Unlabelled patches count as their share of a step.
    one = recipe.replace(unlabelled_scans=0, steps=warm_up + _MOST_MEASURED, epochs=1, click_start=1.0)
    guided = one.clicks > 0 and network.guidance_channels > 0
    take_step = TrainingStep(
        network,
        make_optimizer(network, one),
        make_average(network, one),
        one,
        clicks=ClickTraining(network, one, seed=0) if guided else None,
        device=device,
        samples=one.batch_size,
    )
    patches = Patches(cases, new=(), recipe=one, prep=prep, labels=labels, device=device)
    seconds: list[float] = []
    batches = iter(patches.loader(first_step=0, steps=one.steps, seed=0))
    for step in range(one.steps):
        if step >= warm_up + fewest and sum(seconds[warm_up:]) > measure_s:
            break
        before = time.perf_counter()
        batch = next(batches)
        loss = take_step(step + 1, batch["image"], batch["label"], batch["annotated"])
        # Reading it waits for a GPU.
        float(loss)
        seconds.append(time.perf_counter() - before)
    return statistics.median(seconds[warm_up:])
