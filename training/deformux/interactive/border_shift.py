"""How far a click moves the borders around it.

A trained network is rarely wrong by much: on the hippocampus data 97 % of the wrong voxels lie in shells of one or two
along borders. Who clicks into such a shell says that the border is elsewhere, and not only at that voxel. How far
that holds is a matter of statistics and not of the image: a border's error resembles that of the borders nearby that
face the same way. So the error of the logits is regressed from the clicks, as a Gaussian process over place and
direction (Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006, chapter 2), which a network that has
learnt its few training volumes by heart cannot learn from them.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from deformux.data.grid import Logits, Voxels, triple

__all__ = ["REACH", "border_evidence"]

# Standard deviation of the Gaussian by which errors resemble each other, in voxels; and where it ends.
_LENGTH = 6.0
REACH = 15
# Where there are more clicks than these, what is left is smaller: it shrinks with the root of their density.
_FEW = 3
# How much the error of a border resembles that of one at right angles to it; none that of one that faces it.
_ACROSS = 0.4
# A border faces where the logits fall, smoothed by a Gaussian of this standard deviation in voxels.
_SMOOTHING = 1.0
# Logits per voxel: where they change by much less, there is no border.
_FLAT = 0.5
# By how much a label should lead where it was clicked: half a voxel's worth, as logits change by 5 in a voxel there.
_MARGIN = 2.5
# What takes more has another reason than a border in the wrong place.
_MOST = 12.0
# Variance of an error that concerns its voxel alone beside that of those that neighbours share. It also keeps clicks of
# two labels side by side from outbidding each other by more than a few times the margin.
_NUGGET = 0.2
_SWEEPS = 20


def border_evidence(
    logits: Logits,
    clicks: Mapping[int, Voxels],
    *,
    known: MutableMapping[tuple[int, ...], Logits] | None = None,
    origin: Sequence[int] = (0, 0, 0),
) -> dict[int, Logits]:
    """What clicks add to the logits of their labels, by label ``(x, y, z)``, nowhere less than nothing.

    Near a border the clicked label then leads where it was clicked; far inside another label, it may not.

    Args:
        logits: of the mask that was clicked into, ``(C, x, y, z)``.
        clicks: by label, voxels ``(n, 3)`` of it, in any order.
        known: what was found out about the surroundings of clicks before, by label and voxel, and is added to; for the
            same logits, which may be another part of them if that holds ``REACH`` voxels around each click.
        origin: where this part of the logits begins in what ``known`` belongs to.
    """
    unique = {label: np.unique(voxels, axis=0) for label, voxels in sorted(clicks.items()) if len(voxels)}
    if not unique:
        return {}
    labels = np.repeat(list(unique), [len(voxels) for voxels in unique.values()])
    places = np.concatenate(list(unique.values()))
    kernels = []
    for label, voxel in zip(labels, places, strict=True):
        near = np.count_nonzero(((places - voxel) ** 2).sum(1) <= REACH**2)
        key = (int(label), *(int(at) for at in voxel + origin))
        alike = None if known is None else known.get(key)
        if alike is None:
            alike = _alike(logits, int(label), voxel)
        if known is not None:
            known[key] = alike
        kernels.append(_kernel(alike, voxel, _LENGTH * min(1.0, (_FEW / near) ** 0.5)))
    shared = np.array([kernel.at(places) for kernel in kernels])
    amounts = _amounts(logits[(slice(None), *places.T)].astype(np.float64), labels, shared)
    added = {label: np.zeros(logits.shape[1:], np.float32) for label in unique}
    for label, kernel, amount in zip(labels, kernels, amounts, strict=True):
        added[int(label)][kernel.box] += np.float32(amount) * kernel.values
    return added


@dataclass(frozen=True)
class _Kernel:
    """How much of what a click says holds around it: ``values`` of the box whose first voxel is ``low``."""

    low: Voxels
    values: npt.NDArray[np.float32]

    @property
    def box(self) -> tuple[slice, ...]:
        return tuple(slice(int(a), int(a) + n) for a, n in zip(self.low, self.values.shape, strict=True))

    def at(self, voxels: Voxels) -> npt.NDArray[np.float64]:
        inside = voxels - self.low
        seen = ((inside >= 0) & (inside < self.values.shape)).all(1)
        result = np.zeros(len(voxels))
        result[seen] = self.values[tuple(inside[seen].T)]
        return result


def _alike(logits: Logits, label: int, voxel: Voxels) -> Logits:
    """How much the border of a label around a click resembles that at the click, within ``REACH``."""
    low = np.maximum(voxel - REACH, 0)
    part = logits[(slice(None), *(slice(int(a), int(b)) for a, b in zip(low, voxel + REACH + 1, strict=True)))]
    centre = triple(voxel - low)
    facing = _facing(_lead(part, label))
    own = facing[(slice(None), *centre)]
    border = np.sqrt((facing**2).sum(0) * (own**2).sum())
    return np.maximum(0, _ACROSS * border + (1 - _ACROSS) * np.tensordot(own, facing, 1))


def _kernel(alike: Logits, voxel: Voxels, length: float) -> _Kernel:
    low = np.maximum(voxel - REACH, 0)
    centre = triple(voxel - low)
    x, y, z = (
        np.exp(-((np.arange(size) - at) ** 2) / (2 * length**2)).astype(np.float32)
        for at, size in zip(centre, alike.shape, strict=True)
    )
    values = x[:, None, None] * y[:, None] * z * alike
    values[centre] = 1 + _NUGGET
    return _Kernel(low, values)


def _lead(logits: Logits, label: int) -> npt.NDArray[np.float32]:
    """By how much a label leads the others, ``(x, y, z)``; negative where it does not."""
    others = [part.max(0) for part in (logits[:label], logits[label + 1 :]) if len(part)]
    return logits[label] - np.maximum.reduce(others)


def _facing(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Vectors ``(3, x, y, z)`` along the gradient: of length 1 near borders, and shorter where little changes."""
    smooth = ndimage.gaussian_filter(values, _SMOOTHING, truncate=3)
    gradient = np.zeros((3, *values.shape), np.float32)
    for axis, length in enumerate(values.shape):
        if length > 1:
            gradient[axis] = np.gradient(smooth, axis=axis)
    return gradient / np.maximum(np.sqrt((gradient**2).sum(0)), _FLAT)


def _amounts(
    found: npt.NDArray[np.float64], labels: npt.NDArray[np.int64], shared: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """How much of each click's kernel makes the clicked labels lead where they were clicked, all together.

    Args:
        found: logits there, ``(C, n)``.
        labels: that were clicked, ``(n,)``.
        shared: each kernel's values at all clicks, ``(n, n)``.
    """
    # Lists, since numpy takes many times as long for so few numbers.
    count, classes = len(labels), len(found)
    columns, owners = found.T.tolist(), labels.tolist()
    weights = shared.T.tolist()
    amounts = [0.0] * count
    # Coordinate descent, as in the dual of a support vector machine.
    for _ in range(_SWEEPS):
        before = amounts.copy()
        for index, label in enumerate(owners):
            added = [0.0] * classes
            for owner, amount, weight in zip(owners, amounts, weights[index], strict=True):
                added[owner] += amount * weight
            now = [a + b for a, b in zip(columns[index], added, strict=True)]
            own = now.pop(label)
            missing = _MARGIN - (own - max(now))
            amounts[index] = min(max(amounts[index] + missing / (1 + _NUGGET), 0.0), _MOST)
        if amounts == before:
            break
    return np.array(amounts)
