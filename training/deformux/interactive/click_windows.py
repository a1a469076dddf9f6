"""Cells that tile a volume, and the window to compute for clicks in each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from deformux.data.grid import Box, Index, triple

__all__ = ["Lattice", "edit_window"]

# A click's window on a CPU: about a third of a second with the tiny preset on two cores.
_MAX_VOXELS = 64**3
_SMALLEST = 32
# The network halves its input four times; one that halves some axes less often takes these sizes too.
_MULTIPLE = 16
# Windows of neighbouring cells start at most this part of a window apart, so that a click has a fifth around it.
_STEP = 0.6


def edit_window(patch_size: Sequence[int], most_voxels: int = _MAX_VOXELS) -> Index:
    """Return the window for edits by a network: its training patch, shortened evenly to a number of voxels."""
    window = list(patch_size)
    while math.prod(window) > most_voxels:
        longest = max(range(3), key=lambda axis: window[axis])
        shorter = (window[longest] - 1) // _MULTIPLE * _MULTIPLE
        if shorter < _SMALLEST:
            break
        window[longest] = shorter
    return triple(window)


@dataclass(frozen=True)
class Lattice:
    """Cells that tile a volume of ``size`` voxels, each in the middle of a window of ``window`` voxels.

    At the volume's border a cell extends to it, and its window stays inside. An axis no longer than the window has one
    cell, and the window extends evenly beyond the volume, as in inference.
    """

    size: Index
    window: Index

    @cached_property
    def _starts(self) -> tuple[npt.NDArray[np.int64], ...]:
        """First voxels of windows along each axis."""
        starts = []
        for length, window in zip(self.size, self.window, strict=True):
            if length <= window:
                starts.append(np.array([-((window - length) // 2)]))
            else:
                gap = length - window
                # Windows of one or two slices cannot start less than a slice apart.
                count = math.ceil(gap / max(1, _STEP * window)) + 1
                starts.append(np.rint(np.linspace(0, gap, count)).astype(np.int64))
        return tuple(starts)

    @cached_property
    def _bounds(self) -> tuple[npt.NDArray[np.int64], ...]:
        """Borders of cells along each axis: halfway between the centres of their windows."""
        return tuple(
            np.array([0, *(starts[:-1] + starts[1:] + window) // 2, length])
            for starts, window, length in zip(self._starts, self.window, self.size, strict=True)
        )

    def cell(self, voxel: Sequence[int]) -> Index:
        """Return the cell of a voxel."""
        return triple(
            int(np.searchsorted(bounds[1:-1], at, side="right")) for bounds, at in zip(self._bounds, voxel, strict=True)
        )

    def origin(self, cell: Index) -> Index:
        """Return the first voxel of a cell's window; negative if the window is larger than the volume."""
        return triple(starts[number] for starts, number in zip(self._starts, cell, strict=True))

    def inside(self, cell: Index) -> Box:
        """Return the part of a cell's window inside the volume."""
        origin = self.origin(cell)
        stop = (min(a + w, n) for a, w, n in zip(origin, self.window, self.size, strict=True))
        return triple(max(0, a) for a in origin), triple(stop)

    def sight(self, cell: Index) -> Box:
        """Return the box whose clicks a cell's window sees: the cell and an eighth of a window around it.

        If a window saw all clicks inside it, each click would recompute up to 27 windows.
        """
        start, stop = [], []
        for bounds, number, window, length in zip(self._bounds, cell, self.window, self.size, strict=True):
            start.append(max(0, bounds[number] - window // 8))
            stop.append(min(length, bounds[number + 1] + window // 8))
        return triple(start), triple(stop)

    def weights(self, cell: Index) -> tuple[npt.NDArray[np.float32], ...]:
        """Return the weights of a cell's window along each axis of its part in the volume; they multiply.

        They are 1 where the window sees clicks, and fall towards 0 at borders inside the volume.
        """
        profiles = []
        for seen, inside in zip(zip(*self.sight(cell), strict=True), zip(*self.inside(cell), strict=True), strict=True):
            index = np.arange(*inside, dtype=np.float32)
            before = (index - inside[0] + 1) / (seen[0] - inside[0] + 1)
            after = (inside[1] - index) / (inside[1] - seen[1] + 1)
            profiles.append(np.minimum(1, np.minimum(before, after)).astype(np.float32))
        return tuple(profiles)
