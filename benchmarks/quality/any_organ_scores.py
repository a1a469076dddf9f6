"""Scores of any contender on any set: Dice, and surface Dice at one voxel, on the scans' own grids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.processing import resample_from_to

from deformux.data.cases import Case
from deformux.data.volume_reader import read_volume
from deformux.inference.metrics import dice_per_label, surface_dice_per_label

__all__ = ["ORGAN_METRICS", "OrganScores", "labels_on_grid", "score_organ"]

ORGAN_METRICS = ("dice", "surface_dice")
# Case to metric to one value per label; None if a label is in neither volume.
OrganScores = dict[str, dict[str, list[float | None]]]


def score_organ(
    cases: Sequence[Case],
    segment_case: Callable[[Case], np.ndarray],
    *,
    n_labels: int,
    on_case: Callable[[int], None] = lambda _: None,
) -> OrganScores:
    """Segment each case and compare it with its label.

    The tolerance of the surface Dice is one voxel; of anisotropic scans one voxel of the plane of highest resolution,
    the larger of its two sides.

    Args:
        cases: labelled scans.
        segment_case: returns labels ``(X, Y, Z)`` on the scan's own grid and in its axis order.
        n_labels: labels 1..N.
        on_case: called after each case with the number of cases that are done.
    """
    scores: OrganScores = {}
    for case in cases:
        found = segment_case(case)
        truth = read_volume(case.label)
        values = np.rint(truth.values).astype(np.uint8)
        spacing = [float(size) for size in voxel_sizes(truth.affine)]
        # A voxel more in distance by rounding of the header must not decide.
        tolerance = sorted(spacing)[1] * 1.001
        dice = dice_per_label(found, values, n_labels)
        surface = surface_dice_per_label(found, values, n_labels, spacing_mm=spacing, tolerance_mm=tolerance)
        scores[case.id] = {
            metric: [None if np.isnan(value) else float(value) for value in row]
            for metric, row in zip(ORGAN_METRICS, (dice, surface), strict=True)
        }
        on_case(len(scores))
    return scores


def labels_on_grid(found: Path, scan: Path) -> np.ndarray:
    """Return the labels of a NIfTI file at the nearest voxels of a scan's grid, ``(X, Y, Z)``, uint8."""
    label: Any = nib.load(found)
    image: Any = nib.load(scan)
    label = nib.Nifti1Image(np.rint(np.asarray(label.dataobj)).astype(np.uint8), label.affine)
    if label.shape != image.shape or not np.allclose(label.affine, image.affine, atol=1e-3):
        label = resample_from_to(label, (image.shape, image.affine), order=0)
    return np.asarray(label.dataobj)
