"""Slices of a scan for pictures: which plane, which part of it, its size in millimetres and which way it lies.

Volumes are ``(X, Y, Z)`` in RAS axes. Pictures follow the radiological convention: the patient's right is on the left,
anterior or superior is up; in sagittal slices anterior is on the left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["SliceView", "best_views", "obliqueness_deg", "scale_bar_mm"]

_Labels = npt.NDArray[np.uint8]

# Voxels this many times longer than wide show too little from the side.
_FLAT = 1.5
# A plane is preferred to the axial one only if its slices are clearly the thicker ones.
_THICKER = 1.1
# Around the labels, at least so much of their extent is shown, and so many mm for each mm of the scan's extent.
_MARGIN, _LEAST_MARGIN = 0.35, 0.08
_PLANES = ("sagittal", "coronal", "axial")
# Letters at the left, right, bottom and top of each plane.
_LETTERS = (("A", "P", "I", "S"), ("R", "L", "I", "S"), ("R", "L", "P", "A"))


@dataclass(frozen=True)
class SliceView:
    """Part of one slice of a volume.

    Args:
        axis: 0 right, 1 anterior, 2 superior: the axis that the slice is perpendicular to.
        index: of the slice along that axis.
        box: first and last voxel (exclusive) along the two other axes, in their order.
        spacing_mm: of the volume's voxels.
    """

    axis: int
    index: int
    box: tuple[tuple[int, int], tuple[int, int]]
    spacing_mm: tuple[float, float, float]

    @property
    def plane(self) -> str:
        """Name of the plane; for an oblique scan the nearest."""
        return _PLANES[self.axis]

    @property
    def letters(self) -> tuple[str, str, str, str]:
        """Directions of the patient at the left, right, bottom and top."""
        return _LETTERS[self.axis]

    @property
    def size_mm(self) -> tuple[float, float]:
        """Width and height."""
        across, up = (axis for axis in range(3) if axis != self.axis)
        (left, right), (low, high) = self.box
        return (right - left) * self.spacing_mm[across], (high - low) * self.spacing_mm[up]

    def cut(self, volume: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        """Return the slice as rows × columns; the first row is the lowest."""
        (left, right), (low, high) = self.box
        flat = np.take(volume, self.index, axis=self.axis)[left:right, low:high]
        return flat[::-1].T


def best_views(
    truth: _Labels, spacing_mm: tuple[float, float, float], count: int, *, shown: Sequence[_Labels] = ()
) -> list[SliceView]:
    """Return the slices that show a label best: ``count`` of the finest plane, and a coronal one if it is not flat.

    The finest plane is perpendicular to the longest edge of the voxels; axial if they are nearly cubes. The slices show
    the part of the scan that holds the labels and all of ``shown``, with a margin.
    """
    spacing = np.asarray(spacing_mm)
    axis = int(spacing.argmax()) if spacing.max() > _THICKER * spacing[2] else 2
    low, high = _box([truth, *shown], spacing)

    def view(axis: int, index: int) -> SliceView:
        across, up = (other for other in range(3) if other != axis)
        box = ((int(low[across]), int(high[across])), (int(low[up]), int(high[up])))
        return SliceView(axis, index, box, spacing_mm)

    apart = max(1, truth.shape[axis] // 5)
    views = [view(axis, index) for index in _best_slices(truth, axis, count, apart)]
    if axis == 2 and spacing.max() <= _FLAT * spacing.min():
        views += [view(1, index) for index in _best_slices(truth, 1, 1, 1)]
    return views


def _box(labels: Sequence[_Labels], spacing: npt.NDArray[np.float64]) -> tuple[npt.NDArray, npt.NDArray]:
    """Return first and last voxel (exclusive) along each axis around all labels, with a margin."""
    size = np.array(labels[0].shape)
    found = np.any([label > 0 for label in labels], axis=0)
    if not found.any():
        return np.zeros(3, int), size
    voxels = np.argwhere(found)
    low, high = voxels.min(0), voxels.max(0) + 1
    # The same margin on all sides, so that a long label is not cut from its surroundings.
    extent_mm = ((high - low) * spacing).max()
    margin_mm = max(_MARGIN * extent_mm, _LEAST_MARGIN * (size * spacing).max())
    margin = np.ceil(margin_mm / spacing).astype(int)
    return np.maximum(low - margin, 0), np.minimum(high + margin, size)


def _best_slices(truth: _Labels, axis: int, count: int, apart: int) -> list[int]:
    """Return the slices along `axis` that hold most of all labels, at least `apart` slices apart."""
    others = tuple(a for a in range(3) if a != axis)
    score = np.zeros(truth.shape[axis])
    for value in np.unique(truth[truth > 0]):
        area = np.count_nonzero(truth == value, axis=others)
        # The share of each label's largest area, so that a small organ counts as much as a large one; the root favours
        # several labels.
        score += np.sqrt(area / area.max())
    chosen: list[int] = []
    for index in np.argsort(-score, kind="stable"):
        if len(chosen) < count and all(abs(int(index) - other) >= apart for other in chosen):
            chosen.append(int(index))
    return sorted(chosen, reverse=True) or [truth.shape[axis] // 2]


def obliqueness_deg(affine: npt.NDArray[np.float64]) -> float:
    """Return the largest angle between an axis of voxels and the nearest axis of the patient, for a RAS affine."""
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return float(np.rad2deg(np.arccos(np.clip(np.abs(directions).max(axis=0).min(), 0, 1))))


def scale_bar_mm(width_mm: float) -> float:
    """Return a round length, 1, 2 or 5 times a power of ten, of at most 30 % of a width."""
    most = 0.3 * width_mm
    power = 10.0 ** np.floor(np.log10(most))
    return float(max(step * power for step in (1, 2, 5) if step * power <= most * (1 + 1e-9)))
