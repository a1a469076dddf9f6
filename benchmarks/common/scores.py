"""Scores of a network on labelled cases: Dice, surface Dice at 1 mm, and the 95th percentile Hausdorff distance."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from monai.metrics import compute_hausdorff_distance
from torch import nn

from deformux.data.cases import Case
from deformux.data.loading import LoadLabeld, LoadVolumed
from deformux.data.preprocessing import Preprocessing
from deformux.data.transforms import run_transforms
from deformux.inference.metrics import dice_per_label, surface_dice_per_label
from deformux.inference.sliding_window import segment

__all__ = ["METRICS", "TOLERANCE_MM", "score", "score_volume"]

METRICS = ("dice", "surface_dice", "hd95_mm")
TOLERANCE_MM = 1.0

# Case to metric to one value per label; None if a label is in neither volume.
Scores = dict[str, dict[str, list[float | None]]]


def score(
    network: nn.Module,
    cases: Sequence[Case],
    prep: Preprocessing,
    *,
    n_labels: int,
    device: str,
    on_case: Callable[[], None] = lambda: None,
) -> Scores:
    """Segment each case and compare it with its label, both on the scan's own grid."""
    load = (LoadVolumed("image"), LoadLabeld("label", n_labels=n_labels))
    scores: Scores = {}
    for case in cases:
        found, _ = segment(network, case.images, prep, device=device)
        truth = run_transforms(load, {"image": case.image, "label": case.label})["label"]
        spacing_mm = [float(size) for size in truth.pixdim]
        scores[case.id] = score_volume(np.asarray(found[0]), np.asarray(truth[0]), n_labels, spacing_mm)
        on_case()
    return scores


def score_volume(
    found: np.ndarray, truth: np.ndarray, n_labels: int, spacing_mm: Sequence[float]
) -> dict[str, list[float | None]]:
    """Return each metric for labels 1..n_labels of two volumes ``(X, Y, Z)``.

    If only one of them has a label, surface Dice is 0 and the Hausdorff distance is the volume's diagonal: an infinite
    one would hide everything else in a mean.
    """
    dice = dice_per_label(found, truth, n_labels)
    surface = surface_dice_per_label(found, truth, n_labels, spacing_mm=spacing_mm, tolerance_mm=TOLERANCE_MM)
    diagonal = float(np.linalg.norm(np.multiply(truth.shape, spacing_mm)))
    distances: list[float] = []
    for label in range(1, n_labels + 1):
        pair = [torch.as_tensor(volume == label)[None, None] for volume in (found, truth)]
        present = [bool(mask.any()) for mask in pair]
        if all(present):
            options = {"include_background": True, "percentile": 95, "spacing": list(spacing_mm)}
            distances.append(float(compute_hausdorff_distance(*pair, **options)))
        else:
            distances.append(diagonal if any(present) else np.nan)
    columns = zip(METRICS, (dice, surface, distances), strict=True)
    return {metric: [None if np.isnan(v) else float(v) for v in values] for metric, values in columns}
