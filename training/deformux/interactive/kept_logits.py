"""Automatic logits of an opened scan, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from deformux.data.grid import Box, Index, Logits, Voxels, highest, slices, triple
from deformux.inference.slabs import LogitSlab

__all__ = ["AllLogits", "KeptLogits", "LogitKeeper", "TopLogits"]

# Logits in float16 that take more are reduced to the highest of each voxel, this number of them.
_ALL_BYTES = 512 * 2**20
_TOP = 3
# Voxels times classes of which float32 values are made at a time.
_CHUNK = 64 * 2**20 // 4


class KeptLogits(Protocol):
    """Logits of every voxel of the network's grid."""

    n_classes: int

    @property
    def nbytes(self) -> int:
        """Return the bytes of memory that they take."""

    @property
    def size(self) -> Index:
        """Return the voxels of the network's grid."""

    def in_box(self, box: Box) -> Tensor:
        """Return the logits ``(C, x, y, z)`` of a box, float32 on the CPU, in memory of their own."""

    def at(self, voxels: Voxels) -> Logits:
        """Return the logits ``(C, n)`` at voxels ``(n, 3)``."""

    def probability(self, value: int, box: Box) -> Tensor:
        """Return the probability ``(x, y, z)`` of a class in a box."""

    def slabs(self) -> Iterator[LogitSlab]:
        """Yield all logits in order."""


class _Chunked:
    """The parts of KeptLogits that follow from ``in_box``."""

    n_classes: int
    size: Index

    def in_box(self, box: Box) -> Tensor:
        raise NotImplementedError

    def probability(self, value: int, box: Box) -> Tensor:
        """Return the probability ``(x, y, z)`` of a class in a box."""
        return torch.cat([self.in_box(part).softmax(0)[value] for part in self._parts(box)])

    def slabs(self) -> Iterator[LogitSlab]:
        """Yield all logits in order."""
        for part in self._parts(((0, 0, 0), self.size)):
            yield LogitSlab(0, part[0][0], self.in_box(part))

    def _parts(self, box: Box) -> Iterator[Box]:
        (first, *start), (last, *stop) = box
        plane = self.n_classes * math.prod(b - a for a, b in zip(start, stop, strict=True))
        step = max(1, _CHUNK // max(1, plane))
        for at in range(first, last, step):
            yield triple((at, *start)), triple((min(at + step, last), *stop))


class AllLogits(_Chunked):
    """All logits ``(C, x, y, z)``, float16 on the CPU."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.n_classes = len(values)
        self.size = triple(values.shape[1:])

    @property
    def nbytes(self) -> int:
        """Return the bytes of memory that they take."""
        return self.values.nbytes

    def in_box(self, box: Box) -> Tensor:
        """Return the logits ``(C, x, y, z)`` of a box, float32, in memory of their own."""
        return self.values[(slice(None), *slices(box))].float()

    def at(self, voxels: Voxels) -> Logits:
        """Return the logits ``(C, n)`` at voxels ``(n, 3)``."""
        return self.values.numpy()[(slice(None), *voxels.T)].astype(np.float32)

    def slabs(self) -> Iterator[LogitSlab]:
        """Yield all logits at once: they are few."""
        yield LogitSlab(0, 0, self.values.float())


class TopLogits(_Chunked):
    """The three highest logits of each voxel with their classes; the other classes have their mean.

    Args:
        n_classes: background included.
        values: the highest in falling order and the mean of the others, ``(4, x, y, z)``, float16 on the CPU.
        classes: of the highest, ``(3, x, y, z)``, uint8.
    """

    def __init__(self, n_classes: int, values: Tensor, classes: Tensor) -> None:
        self.n_classes, self.values, self.classes = n_classes, values, classes
        self.size = triple(values.shape[1:])

    @property
    def nbytes(self) -> int:
        """Return the bytes of memory that they take."""
        return self.values.nbytes + self.classes.nbytes

    def in_box(self, box: Box) -> Tensor:
        """Return the logits ``(C, x, y, z)`` of a box, float32."""
        part = (slice(None), *slices(box))
        return self._spread(self.values[part], self.classes[part])

    def at(self, voxels: Voxels) -> Logits:
        """Return the logits ``(C, n)`` at voxels ``(n, 3)``."""
        part = (slice(None), *torch.from_numpy(np.ascontiguousarray(voxels.T)))
        return self._spread(self.values[part], self.classes[part]).numpy()

    def _spread(self, values: Tensor, classes: Tensor) -> Tensor:
        logits = values[-1].float().expand(self.n_classes, *values.shape[1:]).clone()
        return logits.scatter_(0, classes.long(), values[:-1].float())


class LogitKeeper:
    """Keeps slabs of logits: all of them in float16 if they are few, else the three highest of each voxel.

    Args:
        size: voxels of the network's grid.
    """

    def __init__(self, size: Index) -> None:
        self.size = size
        self.classes: npt.NDArray[np.uint8] = np.empty(size, dtype=np.uint8)
        self._n_classes = 0
        self._values: Tensor | None = None
        self._top: Tensor | None = None

    def add(self, slab: LogitSlab) -> None:
        """Keep the next slab."""
        logits = slab.logits
        if self._values is None:
            self._n_classes = len(logits)
            everything = 2 * self._n_classes * math.prod(self.size) <= _ALL_BYTES or self._n_classes <= _TOP + 1
            self._values = torch.empty(self._n_classes if everything else _TOP + 1, *self.size, dtype=torch.float16)
            self._top = None if everything else torch.empty(_TOP, *self.size, dtype=torch.uint8)
        box = _planes(self.size, slab)
        classes = highest(logits).to("cpu", torch.uint8).numpy()
        self.classes[slices(box)] = classes
        part = (slice(None), *slices(box))
        if self._top is None:
            self._values[part] = _halved(logits, classes)
        else:
            self._values[part], self._top[part] = _highest_of_each(logits)

    def kept(self) -> KeptLogits:
        """Return the logits once every slab was added."""
        assert self._values is not None
        return AllLogits(self._values) if self._top is None else TopLogits(self._n_classes, self._values, self._top)


def _planes(size: Index, slab: LogitSlab) -> Box:
    start, stop = [0, 0, 0], list(size)
    start[slab.axis], stop[slab.axis] = slab.start, slab.stop
    return triple(start), triple(stop)


def _halved(logits: Tensor, classes: npt.NDArray[np.uint8]) -> Tensor:
    """Return the logits in float16 with the same highest class: rounding turns small differences into ties."""
    halved = logits.to(torch.float16)
    x, y, z = np.nonzero((highest(halved) != highest(logits)).cpu().numpy())
    halved = halved.cpu()
    values = halved.numpy()
    values[classes[x, y, z], x, y, z] = np.nextafter(values[:, x, y, z].max(0, initial=-np.inf), np.float16("inf"))
    return halved


def _highest_of_each(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the values and the classes that TopLogits keeps; the highest leads in float16 too."""
    left = logits.clone()
    classes = []
    for _ in range(_TOP):
        # As argmax does: of equal ones the first, which topk does not promise.
        classes.append(highest(left))
        left.scatter_(0, classes[-1][None], -torch.inf)
    chosen = torch.stack(classes)
    top = logits.gather(0, chosen)
    rest = (logits.sum(0) - top.sum(0)) / (len(logits) - _TOP)
    # A mean of few classes may round above the last.
    values = torch.cat([top, torch.minimum(rest, top[-1])[None]]).to("cpu", torch.float16)
    numbers = values.numpy()
    tied = numbers[0] <= numbers[1]
    numbers[0][tied] = np.nextafter(numbers[1][tied], np.float16("inf"))
    return values, chosen.to("cpu", torch.uint8)
