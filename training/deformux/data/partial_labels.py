"""Labels of which only some slices were annotated: which slices these are, and what lies between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from deformux.data.label_values import UNLABELLED

__all__ = ["SLICE_RULES", "AnnotatedSlices", "drawn_slices", "filled_between_slices", "spread_labels"]

SLICE_RULES = ("auto", "drawn", "all")
# Fewer slices with gaps between them may be small structures.
_LEAST_SLICES = 3


@dataclass(frozen=True)
class AnnotatedSlices:
    """The annotated slices of a label, counted along an axis of its file; the others are unlabelled."""

    axis: int
    slices: tuple[int, ...]

    def apply(self, labels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Return labels ``(X, Y, Z)`` that are 255 in all other slices."""
        result = np.full_like(labels, UNLABELLED)
        index: list[slice | list[int]] = [slice(None)] * 3
        index[self.axis] = list(self.slices)
        result[tuple(index)] = labels[tuple(index)]
        return result

    def to_dict(self) -> dict[str, int | list[int]]:
        """Return plain values for JSON."""
        return {"axis": self.axis, "slices": list(self.slices)}


def drawn_slices(
    labels: npt.NDArray[np.uint8], spacing_mm: Sequence[float], rule: str = "auto"
) -> AnnotatedSlices | None:
    """Return the slices that were annotated, judged by those in which something is drawn; None for all.

    Args:
        labels: ``(X, Y, Z)``, 0 background, 255 unlabelled.
        spacing_mm: of a voxel along each axis.
        rule: with ``auto``, only these if there are at least three, no two of them neighbours: so looks a label of
            every second or fifth slice, and hardly ever a complete one. With ``drawn``, only these, whatever they are.
            With ``all``, every slice.
    """
    labelled = (labels > 0) & (labels != UNLABELLED)
    drawn = [_slices_with(labelled, axis) for axis in range(3)]
    if rule == "all" or not len(drawn[0]):
        return None
    apart = [axis for axis in range(3) if len(drawn[axis]) >= _LEAST_SLICES and np.diff(drawn[axis]).min() > 1]
    # Along two axes, these are scattered points.
    axis = apart[0] if len(apart) == 1 else None
    if rule == "drawn" and axis is None:
        axis = min(range(3), key=lambda a: (_filled_share(drawn[a]), -spacing_mm[a], -a))
    return None if axis is None else AnnotatedSlices(axis, tuple(map(int, drawn[axis])))


def filled_between_slices(labels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return labels ``(X, Y, Z)`` in which slices that are wholly 255 have the values of the nearest one that is not.

    Sizes and shapes of structures are then about those of a complete label. Nothing is added beyond the first and the
    last annotated slice.
    """
    for axis in range(3):
        known = _slices_with(labels != UNLABELLED, axis)
        if not len(known) or len(known) == known[-1] - known[0] + 1:
            continue
        places = np.arange(labels.shape[axis])
        after = np.clip(np.searchsorted(known, places), 0, len(known) - 1)
        before = np.maximum(after - 1, 0)
        nearer = np.where(np.abs(known[before] - places) <= np.abs(known[after] - places), known[before], known[after])
        inside = (places >= known[0]) & (places <= known[-1])
        labels = labels.take(np.where(inside, nearer, places), axis)
    return labels


def spread_labels(labels: npt.NDArray[np.uint8], reach: Sequence[int]) -> npt.NDArray[np.uint8]:
    """Return labels ``(X, Y, Z)`` in which 255 has the value of a labelled voxel at most so many voxels away.

    Resampling to a coarser grid picks one voxel of several, which else would mostly miss slices and thin strokes.

    Args:
        labels: with 255 where unlabelled.
        reach: voxels along each axis; one after another, the nearest first.
    """
    result = labels.copy()
    for axis, far in enumerate(reach):
        start = np.moveaxis(result.copy(), axis, 0)
        open_ = np.moveaxis(result, axis, 0)
        for distance in range(1, min(far, len(start) - 1) + 1):
            for own, other in ((open_[distance:], start[:-distance]), (open_[:-distance], start[distance:])):
                np.copyto(own, other, where=own == UNLABELLED)
    return result


def _slices_with(mask: npt.NDArray[np.bool_], axis: int) -> npt.NDArray[np.int64]:
    """Return the slices along an axis in which some voxel is true."""
    return np.flatnonzero(mask.any(tuple(other for other in range(3) if other != axis)))


def _filled_share(drawn: npt.NDArray[np.int64]) -> float:
    return float(len(drawn) / (drawn[-1] - drawn[0] + 1))
