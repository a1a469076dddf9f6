"""Agreement of two label volumes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from monai.metrics import compute_dice, compute_surface_dice
from numpy.typing import ArrayLike

__all__ = ["dice_per_label", "mean_dice", "surface_dice_per_label"]


def dice_per_label(pred: ArrayLike, truth: ArrayLike, n_labels: int) -> np.ndarray:
    """Return Dice of labels 1..n_labels of two volumes of one shape; NaN if a label is in neither.

    Raises:
        ValueError: the shapes differ.
    """
    a, b = (torch.as_tensor(np.asarray(volume)).long() for volume in (pred, truth))
    if a.shape != b.shape:
        raise ValueError(f"volumes to compare must have one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    # One label at a time: a one-hot volume of all labels can be a hundred times as large as the scan.
    values = []
    for label in range(1, n_labels + 1):
        pair = [(volume == label)[None, None] for volume in (a, b)]
        present = any(bool(mask.any()) for mask in pair)
        values.append(float(compute_dice(*pair, include_background=True, ignore_empty=False)) if present else np.nan)
    return np.array(values)


def surface_dice_per_label(
    pred: ArrayLike, truth: ArrayLike, n_labels: int, *, spacing_mm: Sequence[float], tolerance_mm: float = 2.0
) -> np.ndarray:
    """Return the share of the surfaces of labels 1..n_labels within a tolerance of each other; NaN if in neither.

    Nikolov et al. (arXiv 1809.04430) define it, MONAI computes it. It is 0 if a label is in one volume only.

    Raises:
        ValueError: the shapes differ.
    """
    a, b = np.asarray(pred), np.asarray(truth)
    if a.shape != b.shape:
        raise ValueError(f"volumes to compare must have one shape, got {a.shape} and {b.shape}")
    values = []
    for label in range(1, n_labels + 1):
        pair = [volume == label for volume in (a, b)]
        if not all(mask.any() for mask in pair):
            values.append(0.0 if any(mask.any() for mask in pair) else np.nan)
            continue
        # The rest of the volume has no surface, and distances to it cost time.
        found = np.argwhere(pair[0] | pair[1])
        box = tuple(slice(max(0, low - 1), high + 2) for low, high in zip(found.min(0), found.max(0), strict=True))
        one_hot = [torch.as_tensor(mask[box])[None, None] for mask in pair]
        share = compute_surface_dice(
            *one_hot, [tolerance_mm], include_background=True, spacing=[float(size) for size in spacing_mm]
        )
        values.append(float(share))
    return np.array(values)


def mean_dice(per_case: ArrayLike) -> float:
    """Return the mean over labels of the mean over cases of Dice ``(cases, labels)``, ignoring NaN; NaN if empty."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a label that is in no case
        return float(np.nanmean(np.nanmean(np.atleast_2d(np.asarray(per_case, dtype=float)), axis=0)))
