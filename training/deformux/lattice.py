"""Cells that tile a volume, and the window that is computed for a click inside each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from deformux.grids import Box, Index, triple

__all__ = ["Lattice", "edit_window"]

# A click's window on a CPU: about a third of a second with the tiny preset on two cores.
_MOST_VOXELS = 64**3
_SMALLEST = 32
# The network halves its input four times.
_MULTIPLE = 16
# Windows of neighbouring cells start at most this part of a window apart: a click has a fifth of it around.
_STEP = 0.6


def edit_window(patch_size: Sequence[int], most_voxels: int = _MOST_VOXELS) -> Index:
    """The window for edits of a network trained with patches: those, shortened evenly to a number of voxels."""
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

    At the volume's border a cell reaches up to it, and its window stays inside. Along an axis that is not longer than
    the window there is one cell, and the window extends evenly beyond the volume, as it does in inference.
    """

    size: Index
    window: Index

    @cached_property
    def _starts(self) -> tuple[npt.NDArray[np.int64], ...]:
        """Where windows begin along each axis."""
        starts = []
        for length, window in zip(self.size, self.window, strict=True):
            if length <= window:
                starts.append(np.array([-((window - length) // 2)]))
            else:
                gap = length - window
                count = math.ceil(gap / (_STEP * window)) + 1
                starts.append(np.rint(np.linspace(0, gap, count)).astype(np.int64))
        return tuple(starts)

    def cell(self, voxel: Sequence[int]) -> Index:
        """The cell of a voxel: the one whose window's middle is nearest along each axis."""
        return triple(
            int(np.argmin(np.abs(starts + (window - 1) / 2 - at)))
            for starts, window, at in zip(self._starts, self.window, voxel, strict=True)
        )

    def origin(self, cell: Index) -> Index:
        """The first voxel of a cell's window; negative where the window is larger than the volume."""
        return triple(starts[number] for starts, number in zip(self._starts, cell, strict=True))

    def inside(self, cell: Index) -> Box:
        """The part of a cell's window that lies in the volume."""
        origin = self.origin(cell)
        stop = (min(a + w, n) for a, w, n in zip(origin, self.window, self.size, strict=True))
        return triple(max(0, a) for a in origin), triple(stop)

    def weights(self, cell: Index) -> tuple[npt.NDArray[np.float32], ...]:
        """How much a cell's window counts, along each axis of its part in the volume; the product is the weight.

        1, but falling to 0 over an eighth of the window towards borders that are not the volume's.
        """
        profiles = []
        for start, stop, window, length in zip(*self.inside(cell), self.window, self.size, strict=True):
            ramp = max(1, window // 8)
            index = np.arange(start, stop)
            profile = np.ones(stop - start, np.float32)
            if start > 0:
                profile = np.minimum(profile, (index - start + 1) / (ramp + 1))
            if stop < length:
                profile = np.minimum(profile, (stop - index) / (ramp + 1))
            profiles.append(profile.astype(np.float32))
        return tuple(profiles)
