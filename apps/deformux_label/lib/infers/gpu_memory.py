"""Inference on a GPU that shares its memory with a training or another program."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

__all__ = ["Placement", "placements", "within_memory"]

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")
_SMALLEST_WINDOW = 32
# Halved windows are rounded to a multiple of this, which the network can halve four times.
_MULTIPLE = 16


@dataclass(frozen=True)
class Placement:
    """Placement of a computation: window in voxels, device of the network, device of image and logits."""

    window: tuple[int, ...]
    device: str
    volume_device: str

    def __str__(self) -> str:
        size = "x".join(map(str, self.window))
        return f"with windows of {size} voxels on the {'GPU' if self.device.startswith('cuda') else 'CPU'}"


def placements(window: Sequence[int], device: str) -> Iterator[Placement]:
    """Yield placements from fast to small: all on the GPU, the volume in RAM, smaller windows, no GPU."""
    window = tuple(window)
    yield Placement(window, device, device)
    if not device.startswith("cuda"):
        return
    yield Placement(window, device, "cpu")
    smaller = window
    while (halved := _half(smaller)) != smaller:
        smaller = halved
        yield Placement(smaller, device, "cpu")
    yield Placement(window, "cpu", "cpu")


def within_memory(
    run: Callable[[Placement], _Result], window: Sequence[int], device: str
) -> tuple[_Result, str | None]:
    """Return the result of ``run`` at the first placement that fits, and a warning unless it is the fastest.

    Raises:
        MemoryError: even the smallest does not fit.
    """
    for number, placement in enumerate(placements(window, device)):
        try:
            result = run(placement)
        except (RuntimeError, MemoryError) as error:
            if not _is_memory_error(error):
                raise
            logger.warning("Not enough memory %s: %s", placement, str(error).splitlines()[0] if str(error) else error)
        else:
            if number == 0:
                return result, None
            return result, f"The GPU's memory is full, so this was computed {placement}, which is slower."
        # Outside the handler, because the error keeps frames and their tensors alive.
        gc.collect()
        if device.startswith("cuda"):
            torch.cuda.empty_cache()
    raise MemoryError("there is not enough memory to segment this volume; serve it with a larger spacing")


def _half(window: tuple[int, ...]) -> tuple[int, ...]:
    halves = (max(_SMALLEST_WINDOW, -(-size // 2 // _MULTIPLE) * _MULTIPLE) for size in window)
    return tuple(min(size, half) for size, half in zip(window, halves, strict=True))


def _is_memory_error(error: Exception) -> bool:
    """Return whether an error is of torch, CuPy, cuDNN, cuBLAS or the CPU's allocator, which share no class."""
    text = str(error).lower()
    known = ("out of memory", "alloc_failed", "can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(part in text for part in known)
