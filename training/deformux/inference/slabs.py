"""Logits of a scan, slab by slab: memory grows with the depth of a window, not with the scan."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from monai.data import MetaTensor
from monai.data.utils import compute_importance_map, dense_patch_slices
from torch import Tensor
from torch.nn import functional as F

from deformux.data.grid import Box, Index, triple
from deformux.inference.captured_network import BatchedNetwork
from deformux.networks.precision import mixed_precision

__all__ = ["LogitSlab", "SlabTaker", "Windows", "WindowsDone", "hand_on", "logit_slabs"]

# Logits of fewer bytes are kept whole and handed on at once, in MONAI's own order of sums.
_WHOLE_BYTES = 512 * 2**20
# Bytes of the pieces in which a slab is handed on.
_PIECE_BYTES = 32 * 2**20
# Of fewer voxels the first axis is the slabs', whatever their memory.
_FEW_VOXELS = 2**24
# Lead of the background where no window is computed.
_BACKGROUND = 10.0

# Called with the number of windows done, and of all.
WindowsDone = Callable[[int, int], None]


@dataclass(frozen=True)
class LogitSlab:
    """Final logits ``(C, x, y, z)`` of planes of the network's grid, from ``start`` on along ``axis``."""

    axis: int
    start: int
    logits: Tensor

    @property
    def stop(self) -> int:
        """Return the plane after the last."""
        return self.start + self.logits.shape[self.axis + 1]


class SlabTaker(Protocol):
    """Anything that reduces slabs of one scan, which come in order."""

    def add(self, slab: LogitSlab) -> None:
        """Take the next slab."""


def hand_on(slabs: Iterable[LogitSlab], takers: Sequence[SlabTaker]) -> None:
    """Hand each slab to all takers, then drop it."""
    for slab in slabs:
        for taker in takers:
            taker.add(slab)


@dataclass(frozen=True)
class Windows:
    """Windows that cover a scan: those of MONAI's sliding window.

    Args:
        size: voxels of the scan on the network's grid.
        window: voxels of a window.
        overlap: share of a window that its neighbour covers too, 0 to below 1.
    """

    size: Index
    window: Index
    overlap: float = 0.25

    @cached_property
    def padded(self) -> Index:
        """Return the size of the scan, padded to at least one window."""
        return triple(max(n, w) for n, w in zip(self.size, self.window, strict=True))

    @cached_property
    def before(self) -> Index:
        """Return the voxels of padding before the scan."""
        return triple((p - n) // 2 for p, n in zip(self.padded, self.size, strict=True))

    @cached_property
    def starts(self) -> list[Index]:
        """Return the first voxel of every window in the padded scan, the last axis fastest."""
        steps = [
            w if w == n else max(1, int(w * (1 - self.overlap))) for n, w in zip(self.padded, self.window, strict=True)
        ]
        return [triple(part.start for part in parts) for parts in dense_patch_slices(self.padded, self.window, steps)]

    @property
    def axis(self) -> int:
        """Return the axis along which slabs take least memory; the first for a small scan."""
        if math.prod(self.padded) <= _FEW_VOXELS:
            return 0
        return min(range(3), key=lambda axis: self.window[axis] / self.padded[axis])

    def box(self, start: Index) -> Box:
        """Return the part of the scan that a window covers; empty along no axis."""
        low = [max(0, a - b) for a, b in zip(start, self.before, strict=True)]
        high = [min(n, a - b + w) for n, a, b, w in zip(self.size, start, self.before, self.window, strict=True)]
        return triple(low), triple(high)


@torch.inference_mode()
def logit_slabs(
    image: Tensor,
    network: Callable[[Tensor], Tensor],
    windows: Windows,
    *,
    wanted: Sequence[bool] | None = None,
    axis: int | None = None,
    on_windows: WindowsDone | None = None,
) -> Iterator[LogitSlab]:
    """Yield the logits of a preprocessed scan ``(channels, x, y, z)``, blended from windows as MONAI's are.

    A window in which the whole scan's lowest intensity alone is found, such as air around a patient, is computed once
    for all of its kind: the network sees the same in each. Where no wanted window is, background leads.

    Args:
        image: on the device where logits are summed.
        network: from windows ``(n, channels, ...)`` to logits ``(n, C, ...)``.
        windows: of this scan.
        wanted: which of ``windows.starts`` to compute; None for all.
        axis: along which slabs follow one another; None for ``windows.axis``.
        on_windows: told after each window, and asked, by its exceptions, whether to go on.
    """
    along = windows.axis if axis is None else axis
    computed = [start for start, want in zip(windows.starts, wanted or _all(windows), strict=True) if want]
    if not computed:
        computed = windows.starts
    # Stable, so that sums along the first axis are MONAI's, bit for bit.
    computed = sorted(computed, key=lambda start: start[along])
    plain = image.as_tensor() if isinstance(image, MetaTensor) else image
    padded = _padded(plain, windows)
    total: _Sums | None = None
    for start, logits in _results(padded, network, windows, computed, on_windows):
        if total is None:
            total = _Sums(windows, computed, along, logits)
        yield from total.before(start)
        total.add(start, logits)
    assert total is not None
    yield from total.rest()


class _Sums:
    """Weighted sums of the windows that reach the planes which are not final yet, inside the windows' bounding box."""

    def __init__(self, windows: Windows, starts: Sequence[Index], axis: int, first: Tensor) -> None:
        self.windows, self.axis = windows, axis
        self.weights = compute_importance_map(windows.window, mode="gaussian", device=first.device, dtype=first.dtype)
        self.low = [min(start[a] for start in starts) for a in range(3)]
        high = [max(start[a] for start in starts) + windows.window[a] for a in range(3)]
        self.classes = len(first)
        size = [b - a for a, b in zip(self.low, high, strict=True)]
        # The scan's first planes, in which nothing is computed, are handed on too.
        self.done = 0
        if self.classes * math.prod(windows.padded) * first.element_size() > _WHOLE_BYTES:
            size[axis] = windows.window[axis]
        self.at = self.low[axis]
        self.sums = torch.zeros(self.classes, *size, device=first.device)
        self.counts = torch.zeros(size, device=first.device)

    def before(self, start: Index) -> Iterator[LogitSlab]:
        """Yield the planes that neither this window nor a later one reaches, if there is no room for it."""
        length = self.counts.shape[self.axis]
        if start[self.axis] + self.windows.window[self.axis] <= self.at + length:
            return
        yield from self._final(start[self.axis])
        shift = start[self.axis] - self.at
        kept = max(0, length - shift)
        for values, axis in ((self.sums, self.axis + 1), (self.counts, self.axis)):
            if kept:
                values.narrow(axis, 0, kept).copy_(values.narrow(axis, shift, kept).clone())
            values.narrow(axis, kept, length - kept).zero_()
        self.at = start[self.axis]

    def add(self, start: Index, logits: Tensor) -> None:
        low = list(self.low)
        low[self.axis] = self.at
        place = tuple(slice(s - a, s - a + w) for s, a, w in zip(start, low, self.windows.window, strict=True))
        self.sums[(slice(None), *place)] += logits * self.weights
        self.counts[place] += self.weights

    def rest(self) -> Iterator[LogitSlab]:
        """Yield what has not been yielded."""
        yield from self._final(self.windows.padded[self.axis])

    def _final(self, stop: int) -> Iterator[LogitSlab]:
        """Yield the planes from the last yielded to ``stop`` of the padded scan, without its padding."""
        axis, before = self.axis, self.windows.before[self.axis]
        end = min(stop, before + self.windows.size[axis])
        start = max(self.done, before)
        self.done = stop
        plane = self.classes * math.prod(n for a, n in enumerate(self.windows.size) if a != axis) * 4
        whole = self.classes * math.prod(self.windows.padded) * 4 <= _WHOLE_BYTES
        step = end - start if whole else max(1, _PIECE_BYTES // plane)
        for first in range(start, end, max(1, step)):
            yield LogitSlab(axis, first - before, self._planes(first, min(first + step, end)))

    def _planes(self, start: int, stop: int) -> Tensor:
        """Return the logits of planes of the padded scan, where they are final."""
        size, before = list(self.windows.size), list(self.windows.before)
        size[self.axis], before[self.axis] = stop - start, start
        low = list(self.low)
        low[self.axis] = self.at
        # The part of the planes, in their own coordinates, inside the sums.
        begin = [max(0, a - b) for a, b in zip(low, before, strict=True)]
        end = [
            max(c, min(n, a + length - b))
            for n, a, b, c, length in zip(size, low, before, begin, self.counts.shape, strict=True)
        ]
        inner = tuple(slice(a, b) for a, b in zip(begin, end, strict=True))
        place = tuple(slice(a + b - c, d + b - c) for a, d, b, c in zip(begin, end, before, low, strict=True))
        found = self.sums[(slice(None), *place)]
        counts = self.counts[place]
        if tuple(found.shape[1:]) == tuple(size) and bool((counts > 0).all()):
            return found / counts
        logits = torch.zeros(self.classes, *size, device=found.device)
        logits[0] = _BACKGROUND
        logits[(slice(None), *inner)] = torch.where(counts > 0, found / counts, logits[(slice(None), *inner)])
        return logits


def _results(
    padded: Tensor,
    network: Callable[[Tensor], Tensor],
    windows: Windows,
    starts: Sequence[Index],
    on_windows: WindowsDone | None,
) -> Iterator[tuple[Index, Tensor]]:
    """Yield each window's start and logits ``(C, ...)``, float32, in order."""
    at_once = min(network.batch_size(windows.window), len(starts)) if isinstance(network, BatchedNetwork) else 1
    lowest = padded.amin(dim=(1, 2, 3), keepdim=True)
    empty: Tensor | None = None
    waiting: list[Index] = []
    done = 0

    def compute(some: Sequence[Index]) -> Tensor:
        patch = torch.stack([_cut(padded, start, windows.window) for start in some])
        if len(some) < at_once:
            # A captured network expects the full number.
            patch = torch.cat([patch, patch[-1:].expand(at_once - len(some), *patch.shape[1:])])
        with mixed_precision(patch.device):
            return network(patch)[: len(some)].float()

    def flush() -> Iterator[tuple[Index, Tensor]]:
        nonlocal done
        if waiting:
            for start, logits in zip(waiting, compute(waiting), strict=True):
                done += 1
                if on_windows is not None:
                    on_windows(done, len(starts))
                yield start, logits
            waiting.clear()

    for start in starts:
        if bool((_cut(padded, start, windows.window) == lowest).all()):
            yield from flush()
            if empty is None:
                empty = compute([start])[0]
            done += 1
            if on_windows is not None:
                on_windows(done, len(starts))
            yield start, empty
            continue
        waiting.append(start)
        if len(waiting) == at_once:
            yield from flush()
    yield from flush()


def _cut(padded: Tensor, start: Index, window: Index) -> Tensor:
    return padded[(slice(None), *(slice(a, a + w) for a, w in zip(start, window, strict=True)))]


def _padded(image: Tensor, windows: Windows) -> Tensor:
    # A volume smaller than the window is padded as in training, around its centre with its border. The network has
    # learnt what a margin looks like, and loses 0.02 Dice on the hippocampus data without one.
    if windows.padded == windows.size:
        return image
    margins = []
    for axis in (2, 1, 0):
        before = windows.before[axis]
        margins += [before, windows.padded[axis] - windows.size[axis] - before]
    return F.pad(image[None], margins, mode="replicate")[0]


def _all(windows: Windows) -> Sequence[bool]:
    return [True] * len(windows.starts)
