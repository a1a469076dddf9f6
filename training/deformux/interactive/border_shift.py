"""Shift of the borders around a click.

A trained network is rarely wrong by much: on the hippocampus data 97 % of the wrong voxels lie along borders, in shells
one or two voxels thick. A click into such a shell says that the border is elsewhere, and not only at that voxel. How
far this holds is a matter of statistics, not of the image: a border's error resembles that of nearby borders facing
the same way. So the error of the logits is regressed from the clicks by a Gaussian process over place and direction
(Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006, chapter 2). A network that knows its few
training volumes by heart cannot learn this from them.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from deformux.data.grid import Logits, Voxels, triple

__all__ = ["border_evidence", "reach"]

# Standard deviation of the Gaussian of similarity between errors, and its end, in voxels of the finest axis.
_LENGTH = 6.0
_REACH = 15
# With more clicks nearby, the remaining errors are smaller: the length shrinks with the root of their density.
_FEW = 3
# Similarity between the errors of borders at right angles; borders that face each other have none.
_ACROSS = 0.4
# A border faces along the falling logits, smoothed by a Gaussian of this standard deviation in voxels.
_SMOOTHING = 1.0
# Logits per voxel; there is no border where they change much less.
_FLAT = 0.5
# Lead of a label where it was clicked: half a voxel's worth, as logits change by 5 per voxel there.
_MARGIN = 2.5
# An error that takes more has another cause than a misplaced border.
_MAX_ERROR = 12.0
# Variance of errors of single voxels against that of errors shared by neighbours. It also keeps adjacent clicks of two
# labels from outbidding each other by more than a few margins.
_NUGGET = 0.2
_SWEEPS = 20


def reach(coarseness: Sequence[float] | npt.NDArray[np.float64] = (1.0, 1.0, 1.0)) -> Voxels:
    """Return the voxels along each axis from a click to the last that it changes."""
    return (_REACH / np.asarray(coarseness)).astype(np.int64)


def border_evidence(
    logits: Logits,
    clicks: Mapping[int, Voxels],
    *,
    known: MutableMapping[tuple[int, ...], Logits] | None = None,
    origin: Sequence[int] = (0, 0, 0),
    coarseness: Sequence[float] = (1.0, 1.0, 1.0),
) -> dict[int, Logits]:
    """Return what clicks add to the logits of their labels, by label ``(x, y, z)``, nowhere negative.

    Near a border the clicked label then leads at the click; far inside another label it may not.

    Args:
        logits: of the mask that was clicked into, ``(C, x, y, z)``.
        clicks: voxels ``(n, 3)`` by label, in any order.
        known: cache of the surroundings of clicks by label and voxel, updated in place. It is for the same logits, or
            to another part of them that holds ``reach`` voxels around each click.
        origin: first voxel of this part of the logits, in the coordinates of ``known``.
        coarseness: length of a voxel along each axis, in those of the finest: a click into one of a few thick slices
            says little about the next.
    """
    unique = {label: np.unique(voxels, axis=0) for label, voxels in sorted(clicks.items()) if len(voxels)}
    if not unique:
        return {}
    labels = np.repeat(list(unique), [len(voxels) for voxels in unique.values()])
    places = np.concatenate(list(unique.values()))
    scale = np.asarray(coarseness, dtype=float)
    kernels = []
    for label, voxel in zip(labels, places, strict=True):
        near = np.count_nonzero((((places - voxel) * scale) ** 2).sum(1) <= _REACH**2)
        key = (int(label), *(int(at) for at in voxel + origin))
        alike = None if known is None else known.get(key)
        if alike is None:
            alike = _alike(logits, int(label), voxel, scale)
        if known is not None:
            known[key] = alike
        kernels.append(_kernel(alike, voxel, _LENGTH * min(1.0, (_FEW / near) ** 0.5), scale))
    shared = np.array([kernel.at(places) for kernel in kernels])
    amounts = _amounts(logits[(slice(None), *places.T)].astype(np.float64), labels, shared)
    added = {label: np.zeros(logits.shape[1:], np.float32) for label in unique}
    for label, kernel, amount in zip(labels, kernels, amounts, strict=True):
        added[int(label)][kernel.box] += np.float32(amount) * kernel.values
    return added


@dataclass(frozen=True)
class _Kernel:
    """Weight of a click around it: ``values`` of the box whose first voxel is ``low``."""

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


def _alike(logits: Logits, label: int, voxel: Voxels, scale: npt.NDArray[np.float64]) -> Logits:
    """Return the similarity of a label's border around a click to that at the click, within ``reach``."""
    low, high = np.maximum(voxel - reach(scale), 0), voxel + reach(scale) + 1
    part = logits[(slice(None), *(slice(int(a), int(b)) for a, b in zip(low, high, strict=True)))]
    centre = triple(voxel - low)
    facing = _facing(_lead(part, label), scale)
    own = facing[(slice(None), *centre)]
    border = np.sqrt((facing**2).sum(0) * (own**2).sum())
    return np.maximum(0, _ACROSS * border + (1 - _ACROSS) * np.tensordot(own, facing, 1))


def _kernel(alike: Logits, voxel: Voxels, length: float, scale: npt.NDArray[np.float64]) -> _Kernel:
    low = np.maximum(voxel - reach(scale), 0)
    centre = triple(voxel - low)
    x, y, z = (
        np.exp(-(((np.arange(size) - at) * unit) ** 2) / (2 * length**2)).astype(np.float32)
        for at, size, unit in zip(centre, alike.shape, scale, strict=True)
    )
    values = x[:, None, None] * y[:, None] * z * alike
    values[centre] = 1 + _NUGGET
    return _Kernel(low, values)


def _lead(logits: Logits, label: int) -> npt.NDArray[np.float32]:
    """Return the lead of a label over the others, ``(x, y, z)``; negative where it trails."""
    others = [part.max(0) for part in (logits[:label], logits[label + 1 :]) if len(part)]
    return logits[label] - np.maximum.reduce(others)


def _facing(values: npt.NDArray[np.float32], scale: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """Return vectors ``(3, x, y, z)`` along the gradient: of length 1 near borders, shorter where little changes."""
    smooth = ndimage.gaussian_filter(values, _SMOOTHING / scale, truncate=3)
    gradient = np.zeros((3, *values.shape), np.float32)
    for axis, length in enumerate(values.shape):
        if length > 1:
            gradient[axis] = np.gradient(smooth, axis=axis) / np.float32(scale[axis])
    return gradient / np.maximum(np.sqrt((gradient**2).sum(0)), _FLAT)


def _amounts(
    found: npt.NDArray[np.float64], labels: npt.NDArray[np.int64], shared: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Return the amount of each click's kernel that together make the clicked labels lead at their clicks.

    Args:
        found: logits at the clicks, ``(C, n)``.
        labels: clicked labels, ``(n,)``.
        shared: each kernel's values at all clicks, ``(n, n)``.
    """
    # Lists: numpy takes many times as long for so few numbers.
    count, classes = len(labels), len(found)
    columns, owners = found.T.tolist(), labels.tolist()
    weights = shared.T.tolist()
    amounts = [0.0] * count
    # Coordinate descent, as for the dual of a support vector machine.
    for _ in range(_SWEEPS):
        before = amounts.copy()
        for index, label in enumerate(owners):
            added = [0.0] * classes
            for owner, amount, weight in zip(owners, amounts, weights[index], strict=True):
                added[owner] += amount * weight
            now = [a + b for a, b in zip(columns[index], added, strict=True)]
            own = now.pop(label)
            missing = _MARGIN - (own - max(now))
            amounts[index] = min(max(amounts[index] + missing / (1 + _NUGGET), 0.0), _MAX_ERROR)
        if amounts == before:
            break
    return np.array(amounts)
