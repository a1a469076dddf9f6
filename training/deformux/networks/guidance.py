"""Clicks and a mask as input channels of the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["CLICK_REACH", "Clicks", "encode_guidance"]

# Label value (0 is background) to voxel indices (n, 3).
Clicks = Mapping[int, npt.NDArray[np.integer]]

_SIGMA = 2.0
# Voxels from a click to where its map ends.
CLICK_REACH = 6


def encode_guidance(
    clicks: Clicks, mask: Tensor | None, *, n_labels: int, size: Sequence[int], origin: Sequence[int] = (0, 0, 0)
) -> Tensor:
    """Return guidance ``(2 · n_labels + 1, *size)``, float32, for a window of the network's grid.

    One channel holds the clicks of each class, background first: a Gaussian (σ 2 voxels, cut off at ``CLICK_REACH``)
    around each click, and the maximum where they overlap, so that order and repetition change nothing. One channel
    for each label of the mask follows, 1 inside.

    Args:
        clicks: voxels of the whole grid by class; those out of the window's reach are left out.
        mask: label values ``(x, y, z)`` of the window; None means empty. The result is on its device.
        n_labels: labels 1..N.
        size, origin: of the window in voxels.

    Raises:
        ValueError: a click of an unknown class, clicks that are not ``(n, 3)``, or a mask of another size.
    """
    size = tuple(int(n) for n in size)
    if mask is not None and tuple(mask.shape) != size:
        raise ValueError(f"mask: got shape {tuple(mask.shape)}, expected the window's {size}")
    guidance = torch.zeros(2 * n_labels + 1, *size, device=None if mask is None else mask.device)
    for value, points in clicks.items():
        if not 0 <= value <= n_labels:
            raise ValueError(f"clicks: got label {value}, expected 0 (background) to {n_labels}")
        voxels = np.asarray(points)
        if voxels.size and (voxels.ndim != 2 or voxels.shape[1] != 3):
            raise ValueError(f"clicks of label {value}: got shape {voxels.shape}, expected (n, 3)")
        # Draw on the CPU: on a GPU each of these small steps would wait.
        channel = torch.zeros(size) if guidance.is_cuda else guidance[value]
        for voxel in voxels.reshape(-1, 3):
            _mark(channel, [int(v) - int(o) for v, o in zip(voxel, origin, strict=True)])
        if guidance.is_cuda and voxels.size:
            guidance[value].copy_(channel)
    if mask is None:
        return guidance
    values = torch.arange(1, n_labels + 1, device=mask.device)[:, None, None, None]
    guidance[n_labels + 1 :] = mask == values
    return guidance


def _mark(channel: Tensor, centre: Sequence[int]) -> None:
    """Draw the map of one click, which may lie outside, into a channel ``(x, y, z)``."""
    window, profiles = [], []
    for at, length in zip(centre, channel.shape, strict=True):
        start, stop = max(0, at - CLICK_REACH), min(length, at + CLICK_REACH + 1)
        if start >= stop:
            return
        window.append(slice(start, stop))
        profiles.append(torch.exp(-((torch.arange(start, stop) - at) ** 2) / (2 * _SIGMA**2)))
    x, y, z = profiles
    part = channel[tuple(window)]
    torch.maximum(part, x[:, None, None] * y[:, None] * z, out=part)
