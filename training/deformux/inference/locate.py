"""Coarse to fine: a small network on coarse voxels finds where labels can be, so that few windows are computed.

A locator is DeformUX-Net like the model, trained on the same labels at a multiple of its spacing, so that a whole scan
is a few windows. It only ever leaves out windows. Wherever it is unsure, all windows are computed: on a scan where it
finds nothing, misses a label that it found in every scan it was checked on, or lacks sequences without which it was not
found to lose nothing.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from monai.data import MetaTensor
from nibabel.affines import voxel_sizes
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional as F

from deformux.data.grid import Box, Index, slices, triple
from deformux.inference.captured_network import CapturedNetwork, prepared
from deformux.inference.slabs import LogitSlab, Windows, hand_on, logit_slabs

__all__ = [
    "MANY_WINDOWS",
    "Located",
    "Locator",
    "Ranges",
    "coarse_factors",
    "coarse_window",
    "coarsened",
    "covered",
    "missing_channels",
    "seen_intensities",
    "touched",
]

logger = logging.getLogger(__name__)

Ranges: TypeAlias = tuple[tuple[float, float], ...]

# Scans of fewer windows are computed whole: there is little to save.
MANY_WINDOWS = 48
# Most voxels of a scan at the locator's spacing, and fewest of the model's that one of them stands for.
_MOST_VOXELS = 96**3
_LEAST_MERGED = 27
_LARGEST_WINDOW = 64
# Probability with which a label counts as found.
_FOUND = 0.5


@dataclass(frozen=True)
class Located:
    """What a locator sees of a scan.

    Args:
        foreground: highest probability of any label, ``(x, y, z)``, on the coarse grid.
        best: highest probability of each label anywhere.
    """

    foreground: npt.NDArray[np.float32]
    best: tuple[float, ...]

    def found(self) -> list[int]:
        """Return the labels that are clearly in the scan."""
        return [label for label, value in enumerate(self.best, start=1) if value >= _FOUND]


@dataclass(frozen=True)
class Locator:
    """A trained locator.

    Args:
        network: takes the preprocessed scan on coarse voxels.
        factors: voxels of the model's grid that one coarse voxel stands for, along each axis.
        patch_size: coarse voxels of its windows.
        ranges: preprocessed intensities ``(low, high)`` of each sequence that it sees as 0 and 1.
        threshold: probability of a label from which on a voxel may be labelled.
        margin_mm: around such voxels.
        expected: labels that it found in every scan it was checked on.
        device: where to compute.
        without: sets of sequences, by their numbers, without which it lost no label of any scan it was checked on.
    """

    network: nn.Module | CapturedNetwork
    factors: Index
    patch_size: Index
    ranges: Ranges
    threshold: float
    margin_mm: float
    expected: tuple[int, ...] = ()
    device: str | torch.device = "cpu"
    without: tuple[tuple[int, ...], ...] = ()

    def wanted(self, image: MetaTensor, windows: Windows) -> list[bool] | None:
        """Return which windows of a preprocessed scan ``(channels, x, y, z)`` to compute; None for all of them."""
        if len(windows.starts) < MANY_WINDOWS:
            return None
        coarse = coarsened(image.as_tensor(), self.factors)
        lacking = missing_channels(coarse)
        if lacking and lacking not in self.without:
            logger.info(
                "The locator may miss labels in a scan without sequence %s: all %d windows are computed",
                " and ".join(map(str, lacking)),
                len(windows.starts),
            )
            return None
        seen = self.look(coarse)
        missing = sorted(set(self.expected) - set(seen.found()))
        where = self.region(seen, image)
        if missing or not where.any():
            what = f"not label {missing[0]}" if missing else "no label"
            logger.info("The locator finds %s in this scan: all %d windows are computed", what, len(windows.starts))
            return None
        wanted = touched(where, self.factors, windows)
        logger.info("The locator leaves %d of %d windows", sum(wanted), len(wanted))
        return wanted

    @torch.inference_mode()
    def look(self, coarse: Tensor) -> Located:
        """Return where labels may be in a preprocessed scan ``(channels, x, y, z)``, ``coarsened``."""
        coarse = seen_intensities(coarse, self.ranges)
        taker = _Foreground(triple(coarse.shape[1:]))
        network = prepared(self.network, self.device)
        windows = Windows(taker.size, self.patch_size)
        hand_on(logit_slabs(coarse.to(self.device), network, windows), [taker])
        return Located(taker.foreground, tuple(float(value) for value in taker.best))

    def region(self, seen: Located, image: MetaTensor) -> npt.NDArray[np.bool_]:
        """Return the coarse voxels where labels can be, margin included."""
        sizes = voxel_sizes(np.asarray(image.affine, dtype=float)) * self.factors
        found = seen.foreground >= self.threshold
        if not found.any():
            return found
        return ndimage.distance_transform_edt(~found, sampling=sizes) <= self.margin_mm

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the network as plain values, for the card."""
        values: dict[str, Any] = {
            "factors": list(self.factors),
            "patch_size": list(self.patch_size),
            # As cards had it before there were several sequences.
            "window": list(self.ranges[0]) if len(self.ranges) == 1 else [list(pair) for pair in self.ranges],
            "threshold": self.threshold,
            "margin_mm": self.margin_mm,
            "expected": list(self.expected),
        }
        if self.without:
            values["without"] = [list(numbers) for numbers in self.without]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], network: nn.Module, *, device: str | torch.device = "cpu") -> Locator:
        """Invert ``to_dict``; raise KeyError, TypeError or ValueError on values that do not fit."""
        window = values["window"]
        pairs = window if isinstance(window[0], list | tuple) else [window]
        return cls(
            network,
            triple(values["factors"]),
            triple(values["patch_size"]),
            tuple((float(low), float(high)) for low, high in pairs),
            float(values["threshold"]),
            float(values["margin_mm"]),
            tuple(int(label) for label in values["expected"]),
            device,
            tuple(tuple(int(number) for number in numbers) for numbers in values.get("without", ())),
        )


class _Foreground:
    """Takes the slabs of a coarse scan."""

    def __init__(self, size: Index) -> None:
        self.size = size
        self.foreground = np.zeros(size, dtype=np.float32)
        self.best: Tensor = torch.zeros(0)

    def add(self, slab: LogitSlab) -> None:
        """Take the next slab."""
        probabilities = slab.logits.softmax(0)
        part = [slice(None)] * 3
        part[slab.axis] = slice(slab.start, slab.stop)
        self.foreground[tuple(part)] = (1 - probabilities[0]).cpu().numpy()
        best = probabilities[1:].amax((1, 2, 3)).cpu()
        self.best = best if not len(self.best) else torch.maximum(self.best, best)


def coarse_factors(size: Index, spacing_mm: Sequence[float]) -> Index:
    """Return how many voxels to merge along each axis so that a scan is few windows; the shortest sides grow first."""
    factors = [1, 1, 1]
    most = min(_MOST_VOXELS, max(1, math.prod(size) // _LEAST_MERGED))
    while math.prod(-(-n // f) for n, f in zip(size, factors, strict=True)) > most:
        axis = min((a for a in range(3) if size[a] > factors[a]), key=lambda a: spacing_mm[a] * factors[a])
        factors[axis] += 1
    return triple(factors)


def coarse_window(size: Index, multiple: int = 16) -> Index:
    """Return the locator's window for scans of a coarse size: a multiple that the network can halve."""
    return triple(min(_LARGEST_WINDOW, -(-n // multiple) * multiple) for n in size)


def coarsened(image: Tensor, factors: Index) -> Tensor:
    """Return the means of blocks of voxels ``(channels, x, y, z)`` of a scan; the last blocks may be smaller.

    Args:
        image: ``(channels, x, y, z)``.
        factors: voxels of a block along each axis.
    """
    return F.avg_pool3d(image[None].float(), factors, ceil_mode=True, count_include_pad=False)[0]


def missing_channels(image: Tensor) -> tuple[int, ...]:
    """Return the numbers of the sequences that a preprocessed scan ``(channels, x, y, z)`` of several lacks: all 0."""
    return tuple(n for n, channel in enumerate(image) if len(image) > 1 and not bool(channel.any()))


def seen_intensities(image: Tensor, ranges: Ranges) -> Tensor:
    """Return a preprocessed scan ``(channels, x, y, z)`` as a locator sees it: from 0 to 1, 0 for missing sequences."""
    missing = missing_channels(image)
    return torch.stack(
        [
            channel if n in missing else ((channel - low) / max(high - low, 1e-6)).clamp(0, 1)
            for n, (channel, (low, high)) in enumerate(zip(image, ranges, strict=True))
        ]
    )


def touched(where: npt.NDArray[np.bool_], factors: Index, windows: Windows) -> list[bool]:
    """Return, for each window, whether any true coarse voxel lies in it."""
    # Sums over boxes in constant time: there may be thousands of windows.
    sums = np.pad(where.astype(np.int64), [(1, 0)] * 3).cumsum(0).cumsum(1).cumsum(2)
    return [_count(sums, _coarse_box(windows.box(start), factors)) > 0 for start in windows.starts]


def covered(windows: Windows, wanted: Sequence[bool]) -> npt.NDArray[np.bool_]:
    """Return which voxels ``(x, y, z)`` of the network's grid lie in a wanted window."""
    seen = np.zeros(windows.size, dtype=bool)
    for start, want in zip(windows.starts, wanted, strict=True):
        if want:
            seen[slices(windows.box(start))] = True
    return seen


def _coarse_box(box: Box, factors: Index) -> Box:
    low, high = box
    return triple(a // f for a, f in zip(low, factors, strict=True)), triple(
        -(-b // f) for b, f in zip(high, factors, strict=True)
    )


def _count(sums: npt.NDArray[np.int64], box: Box) -> int:
    (a, b, c), (d, e, f) = box
    return int(
        sums[d, e, f]
        - sums[a, e, f]
        - sums[d, b, f]
        - sums[d, e, c]
        + sums[a, b, f]
        + sums[a, e, c]
        + sums[d, b, c]
        - sums[a, b, c]
    )
