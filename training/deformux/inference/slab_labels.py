"""Labels of a scan on its own grid, from slabs of logits on the network's."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from deformux.data.grid import Box, ScanGrid, slices, triple
from deformux.inference.slabs import LogitSlab

__all__ = ["SlabLabels"]

# Rounding must not make a plane need one more.
_ROUNDING = 1e-4


class SlabLabels:
    """Restores slabs to the scan's grid as they come, with the margin that interpolation needs.

    Args:
        grid: of the scan.
    """

    def __init__(self, grid: ScanGrid) -> None:
        self.grid = grid
        self._labels: Tensor | None = None
        self._held: Tensor | None = None
        self._start = 0
        self._written = 0
        self._ends: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def labels(self) -> Tensor:
        """Return label values ``(X, Y, Z)``, uint8, once every slab was added."""
        assert self._labels is not None
        return self._labels

    def add(self, slab: LogitSlab) -> None:
        """Take the next slab; its voxels of the scan are restored as soon as all they depend on is known."""
        length = self.grid.network_size[slab.axis]
        if slab.start == 0 and slab.stop == length:
            self._labels = self.grid.labels(slab.logits)
            return
        if self._labels is None:
            self._labels = torch.zeros(self.grid.size, dtype=torch.uint8)
        along = int(np.abs(self.grid.to_network[slab.axis, :3]).argmax())
        low, high = self._planes(slab.axis, along)
        axis = slab.axis + 1
        held = slab.logits if self._held is None else torch.cat([self._held, slab.logits], axis)
        ready = np.ones(len(high), dtype=bool) if slab.stop == length else high < slab.stop
        forward = self.grid.to_network[slab.axis, along] > 0
        # Planes become ready from one end of the scan's axis to the other.
        count = int(ready.sum())
        first, last = (self._written, count) if forward else (len(high) - count, len(high) - self._written)
        if first < last:
            box = _box(self.grid, along, first, last)
            origin = triple(self._start if a == slab.axis else 0 for a in range(3))
            self._labels[slices(box)] = self.grid.labels(held, box=box, origin=origin)
            self._written = count
        left = low[self._written :] if forward else low[: len(low) - self._written]
        keep = slab.stop if not len(left) else max(self._start, min(int(left.min()), slab.stop))
        self._held = held.narrow(axis, keep - self._start, slab.stop - keep).clone()
        self._start = keep

    def _planes(self, axis: int, along: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the first and the last plane of the network's grid that each plane of the scan depends on."""
        if self._ends is None:
            row = self.grid.to_network[axis]
            middle = row[along] * np.arange(self.grid.size[along]) + row[3]
            ends = [row[a] * (self.grid.size[a] - 1) for a in range(3) if a != along]
            most = self.grid.network_size[axis] - 1
            low = np.floor(middle + sum(min(0.0, end) for end in ends) + _ROUNDING).astype(int)
            high = np.ceil(middle + sum(max(0.0, end) for end in ends) - _ROUNDING).astype(int)
            self._ends = np.clip(low, 0, most), np.clip(high, 0, most)
        return self._ends


def _box(grid: ScanGrid, along: int, first: int, last: int) -> Box:
    start, stop = [0, 0, 0], list(grid.size)
    start[along], stop[along] = first, last
    return triple(start), triple(stop)
