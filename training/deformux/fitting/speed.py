"""The speed of a device in training, measured on real steps in about a second."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from deformux.data.choices import Choices
from deformux.data.fingerprint import Fingerprint
from deformux.data.planning import Plan, Speed, make_plan
from deformux.fitting.optimizer import make_average, make_optimizer
from deformux.fitting.recipe import RECIPES, Recipe
from deformux.fitting.training_step import TrainingStep
from deformux.networks.deformux_net import PUBLISHED_STRIDES, DeformUXNet

__all__ = ["gpu_gigabytes", "measure_speed", "plan_on"]

# Voxels of the measured patch along each axis: on a CPU as in a training, on a GPU enough to keep it busy.
_CPU_PATCH, _GPU_PATCH = 32, 96
# Steps that are not timed: the first sets up kernels and the optimizer, and captures a CUDA graph.
_WARM_UP = {"cpu": 1, "cuda": 3}
_LEAST_STEPS = 2


def measure_speed(
    device: str,
    preset: str,
    strides: Sequence[Sequence[int]] = PUBLISHED_STRIDES,
    *,
    in_channels: int = 1,
    n_labels: int = 2,
    batch_size: int = 2,
    recipe: Recipe = RECIPES["finetune"],
    seconds: float = 1.0,
) -> Speed:
    """Time training steps of a network on random patches: forward, backward, optimizer and moving average.

    Steps with clicks are not among them, nor is drawing patches.

    Args:
        device: ``cpu`` or a GPU.
        preset: size of the network.
        strides: of its four stages.
        in_channels: of a scan.
        n_labels: besides the background.
        batch_size: patches of a step.
        recipe: whose precision and optimizer are used.
        seconds: to measure for, after the first steps.
    """
    place = torch.device(device)
    side = _GPU_PATCH if place.type == "cuda" else _CPU_PATCH
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []):
        network = DeformUXNet(in_channels, n_labels + 1, preset, guidance=True, strides=strides).to(place)
        optimizer, average = make_optimizer(network, recipe), make_average(network, recipe)
        step = TrainingStep(network, optimizer, average, recipe, clicks=None, device=place, samples=batch_size)
        size = (batch_size, in_channels, side, side, side)
        image, label = torch.randn(size), torch.randint(n_labels + 1, (batch_size, 1, side, side, side))
        batch = (image.to(place), label.to(place, torch.uint8), torch.ones(batch_size, n_labels + 1, dtype=torch.bool))
        free = float(torch.cuda.mem_get_info(place)[0]) if place.type == "cuda" else None
        per_second = batch_size * side**3 / _seconds_per_step(step, batch, place, seconds)
    used = 0.0
    if place.type == "cuda":
        used = torch.cuda.max_memory_reserved(place) / (batch_size * side**3)
    return Speed(per_second, bytes_per_voxel=used, free_bytes=free)


def plan_on(
    device: str,
    facts: Fingerprint,
    *,
    labels: Sequence[str],
    given: Choices | None = None,
    minutes: float | None = None,
    sequences: tuple[str, ...] = (),
    measured: bool = True,
) -> Plan:
    """Plan a training on a device, by its measured or its assumed speed; arguments otherwise as ``make_plan``.

    Args:
        sequences: of a case, the network's channels; none for one.
        measured: measure the speed, which takes about a second.
    """
    measure = partial(measure_speed, device, n_labels=max(1, len(labels)), in_channels=max(1, len(sequences)))
    plan = make_plan(
        facts,
        labels=labels,
        given=given,
        device=device,
        minutes=minutes,
        gpu_gigabytes=gpu_gigabytes(device),
        measure=measure if measured else None,
    )
    return plan.with_sequences(sequences)


def gpu_gigabytes(device: str) -> float | None:
    """Return the memory of a GPU in gigabytes (10^9 bytes); None for a device that is not a CUDA one."""
    if torch.device(device).type != "cuda":
        return None
    return float(torch.cuda.get_device_properties(device).total_memory / 1e9)


def _seconds_per_step(
    step: Callable[..., Tensor], batch: tuple[Tensor, Tensor, Tensor], place: torch.device, seconds: float
) -> float:
    """Return the time of the fastest step: others may have waited for what else the machine does."""
    for number in range(1, _WARM_UP.get(place.type, 1) + 1):
        step(number, *batch)
    _wait(place)
    times: list[float] = []
    while len(times) < _LEAST_STEPS or sum(times) < seconds:
        began = time.perf_counter()
        step(len(times) + 1, *batch)
        _wait(place)
        times.append(time.perf_counter() - began)
    return min(times)


def _wait(place: torch.device) -> None:
    if place.type == "cuda":
        torch.cuda.synchronize(place)
