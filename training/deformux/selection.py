"""Scores for choosing which volume to label next."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["volume_uncertainty"]


def volume_uncertainty(probabilities: Tensor) -> float:
    """Mean entropy of a segmentation where it sees foreground, 0 (sure) to 1 (every class equally likely).

    Each voxel's entropy, divided by its maximum log C, counts with the voxel's foreground probability, so that the
    background around an organ does not make a volume look certain.

    Args:
        probabilities: ``(C, D, H, W)``, summing to 1 over the classes; class 0 is background.

    Raises:
        ValueError: another number of dimensions, fewer than two classes, or values that are not probabilities.
    """
    if probabilities.ndim != 4 or probabilities.shape[0] < 2:
        raise ValueError(f"expected probabilities (C >= 2, D, H, W), got shape {tuple(probabilities.shape)}")
    p = probabilities.float()
    # Also false for NaN.
    if not bool(((p >= 0) & (p <= 1 + 1e-4)).all()):
        raise ValueError("expected probabilities between 0 and 1, got values outside; apply softmax to logits first")
    entropy = torch.special.entr(p).sum(0) / math.log(p.shape[0])
    weight = 1 - p[0]
    total = weight.sum(dtype=torch.float64)
    if total <= 0:
        return 0.0
    return min(1.0, max(0.0, float((weight * entropy).sum(dtype=torch.float64) / total)))
