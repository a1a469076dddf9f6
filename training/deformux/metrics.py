"""How well two label volumes agree."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from monai.metrics import compute_dice
from numpy.typing import ArrayLike

__all__ = ["dice_per_label", "mean_dice"]


def dice_per_label(pred: ArrayLike, truth: ArrayLike, n_labels: int) -> np.ndarray:
    """Dice of labels 1..n_labels of two label volumes of one shape; NaN where a label is in neither.

    Raises:
        ValueError: the shapes differ.
    """
    a, b = (torch.as_tensor(np.asarray(volume)).long() for volume in (pred, truth))
    if a.shape != b.shape:
        raise ValueError(f"volumes to compare must have one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    # One label at a time: a one-hot volume of all labels can be larger than the scan a hundredfold.
    values = []
    for label in range(1, n_labels + 1):
        pair = [(volume == label)[None, None] for volume in (a, b)]
        present = any(bool(mask.any()) for mask in pair)
        values.append(float(compute_dice(*pair, include_background=True, ignore_empty=False)) if present else np.nan)
    return np.array(values)


def mean_dice(per_case: ArrayLike) -> float:
    """Mean over labels of the mean over cases of ``(cases, labels)`` Dice without NaN; NaN where nothing is left."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a label that is in no case
        return float(np.nanmean(np.nanmean(np.atleast_2d(np.asarray(per_case, dtype=float)), axis=0)))
