"""Sizes of a project's scans and labels along the axes of its frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from deformux.data.fingerprint import Fingerprint
from deformux.data.frame import frame_axes, frame_grid
from deformux.data.planned_grid import nnunet_spacing

__all__ = ["ScanSizes"]

_Triple: TypeAlias = tuple[float, float, float]

# What a patch should see beside the labels, on each side: a part of their extent, and at least some voxels.
_MARGIN, _MARGIN_VOX = 0.125, 4
# The field of view of all but a tenth of the labelled scans.
_FIELD_PERCENTILE = 90.0
# Of many labels some are as thin as a voxel: a plan for them alone would lose all the others.
_THIN_PERCENTILE = 25.0
# Scans have the same spacing if it differs by less.
_SAME_SPACING = 0.01


@dataclass(frozen=True)
class ScanSizes:
    """Sizes of a project's scans and labels along the axes of its frame.

    Args:
        spacing_mm: nnU-Net's.
        thick: the axis of thick slices, or None.
        same: whether all scans have this spacing.
        image_mm: median size of the scans.
        field_mm: size of the box around all labels in most of the labelled scans; None without any.
        chord_mm: how thick a thin label is along each axis: only a quarter of the labels are thinner.
    """

    spacing_mm: _Triple
    thick: int | None
    same: bool
    image_mm: _Triple
    field_mm: _Triple | None
    chord_mm: _Triple | None

    @classmethod
    def of(cls, fingerprint: Fingerprint, frame: str, n_labels: int) -> ScanSizes:
        """Bring all facts to the frame's axes."""
        grids = [frame_grid(frame, scan.shape, scan.affine) for scan in fingerprint.scans.values()]
        shapes, spacings = (np.array(values, dtype=float) for values in zip(*grids, strict=True))
        spacing, thick = nnunet_spacing(spacings, shapes)
        same = bool((np.abs(spacings / np.array(spacing) - 1) < _SAME_SPACING).all())
        known = range(1, n_labels + 1)
        fields: list[npt.NDArray[np.float64]] = []
        chords: dict[int, list[npt.NDArray[np.float64]]] = {}
        for scan, label in fingerprint.labelled:
            box = label.union(known)
            if box is None:
                continue
            order = list(frame_axes(frame, scan.shape, scan.affine)[0])
            own = np.array(frame_grid(frame, scan.shape, scan.affine)[1])
            fields.append((np.array(box[1]) - box[0])[order] * own)
            for n, chord in label.chords_vox.items():
                if n in known:
                    chords.setdefault(n, []).append(np.array(chord)[order] * own)
        return cls(
            spacing_mm=spacing,
            thick=thick,
            same=same,
            image_mm=_triple(np.median(shapes * spacings, axis=0)),
            field_mm=_triple(np.percentile(fields, _FIELD_PERCENTILE, axis=0)) if fields else None,
            chord_mm=_thin_mm(list(chords.values())) if chords else None,
        )

    def need_mm(self, spacing_mm: _Triple) -> _Triple:
        """Return what a patch should see: the labels with a margin, within the scans; all of them without labels."""
        image = np.array(self.image_mm)
        if self.field_mm is None:
            return self.image_mm
        field_ = np.array(self.field_mm)
        margin = np.maximum(_MARGIN * field_, _MARGIN_VOX * np.array(spacing_mm))
        # Along thick slices the same millimetres are fewer voxels.
        margin = np.minimum(margin, margin.min() + np.array(spacing_mm))
        return _triple(np.minimum(field_ + 2 * margin, image))


def _thin_mm(chords: list[list[npt.NDArray[np.float64]]]) -> _Triple:
    """Return how thick a thin label is along each axis, from the thickness of each label in each scan."""
    of_labels = [np.median(own, axis=0) for own in chords]
    # "lower": of two labels, the thinner.
    return _triple(np.percentile(of_labels, _THIN_PERCENTILE, axis=0, method="lower"))


def _triple(values: Any) -> _Triple:
    x, y, z = (float(f"{value:.5g}") for value in values)
    return x, y, z
