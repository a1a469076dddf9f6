"""Scores of a model's uncertainty about a whole volume, from one or several predictions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "VolumeScores",
    "label_sums",
    "label_uncertainty",
    "score_samples",
    "uncertainty_of_sums",
    "volume_uncertainty",
    "voxel_entropy",
]

# A label with a smaller expected volume counts as absent, and has no uncertainty.
_MIN_VOXELS = 1.0


@dataclass(frozen=True)
class VolumeScores:
    """Uncertainty of a volume's predictions; every value is divided by log C, so that it lies between 0 and 1.

    Args:
        uncertainty: mean over the labels in ``per_label``.
        per_label: entropy weighted by the label's own probability; None for a label that is not in the volume.
        entropy: mean over all voxels, background included.
        mutual_information: mean disagreement of the samples over all voxels; 0 for a single sample.
    """

    uncertainty: float
    per_label: tuple[float | None, ...]
    entropy: float
    mutual_information: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "uncertainty": self.uncertainty,
            "per_label": list(self.per_label),
            "entropy": self.entropy,
            "mutual_information": self.mutual_information,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VolumeScores:
        """Invert ``to_dict``."""
        return cls(**{**values, "per_label": tuple(values["per_label"])})


def label_uncertainty(probabilities: Tensor) -> tuple[float | None, ...]:
    """Return the entropy of each label 1..C-1 where the label may be, 0 (sure) to 1 (every class equally likely).

    Each voxel's entropy, divided by its maximum log C, counts with the voxel's probability of that label: a small
    organ counts as much as a large one, and background around them changes nothing.

    Args:
        probabilities: ``(C, D, H, W)``, summing to 1 over the classes; class 0 is background.

    Returns:
        One value per label; None if its probabilities sum to less than one voxel.

    Raises:
        ValueError: a wrong number of dimensions, fewer than two classes, or values that are not probabilities.
    """
    return _per_label(*label_sums(probabilities))


def label_sums(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Return sums over voxels ``(C - 1,)``, float64, of a part of a volume, of which ``uncertainty_of_sums`` is made.

    They are the sums of each label's probabilities, and of these times the voxel's entropy divided by log C.

    Raises:
        ValueError: a wrong number of dimensions, fewer than two classes, or values that are not probabilities.
    """
    p = _checked(probabilities)
    entropy = voxel_entropy(p) / math.log(p.shape[0])
    weights = torch.stack([weight.sum(dtype=torch.float64) for weight in p[1:]])
    return weights, torch.stack([(weight * entropy).sum(dtype=torch.float64) for weight in p[1:]])


def uncertainty_of_sums(weights: Tensor, entropies: Tensor) -> float:
    """Return ``volume_uncertainty`` of a volume from the sums over its parts of ``label_sums``."""
    return _mean(_per_label(weights, entropies))


def volume_uncertainty(probabilities: Tensor) -> float:
    """Return the mean of ``label_uncertainty`` over the labels in a volume; 0 if there is none.

    Args:
        probabilities: ``(C, D, H, W)``, summing to 1 over the classes; class 0 is background.

    Raises:
        ValueError: a wrong number of dimensions, fewer than two classes, or values that are not probabilities.
    """
    return _mean(label_uncertainty(probabilities))


def voxel_entropy(probabilities: Tensor) -> Tensor:
    """Return the entropy ``(D, H, W)`` of each voxel's probabilities ``(C, D, H, W)``, in nats: 0 to log C.

    Raises:
        ValueError: a wrong number of dimensions, fewer than two classes, or values that are not probabilities.
    """
    return torch.special.entr(_checked(probabilities)).sum(0)


def score_samples(samples: Iterable[Tensor]) -> VolumeScores:
    """Score a volume by several predictions of it, such as mirrored ones or those of several models.

    Entropies are those of the mean prediction. The mutual information between prediction and model, the entropy of
    the mean less the mean of the entropies, is BALD's score (Houlsby et al., arXiv 1112.5745). Samples are
    taken one at a time, so that an iterator keeps only one in memory.

    Args:
        samples: each ``(C, D, H, W)``, summing to 1 over the classes; class 0 is background.

    Raises:
        ValueError: no sample, samples of different shapes, or values that are not probabilities.
    """
    mean: Tensor | None = None
    entropies = 0.0
    count = 0
    for sample in samples:
        p = _checked(sample)
        if mean is None:
            mean = torch.zeros_like(p)
        elif mean.shape != p.shape:
            raise ValueError(f"samples must have one shape, got {tuple(mean.shape)} and {tuple(p.shape)}")
        mean += p
        entropies += _mean_entropy(p)
        count += 1
    if mean is None:
        raise ValueError("expected at least one sample of probabilities, got none")
    mean /= count
    scale = math.log(mean.shape[0])
    entropy = _mean_entropy(mean)
    per_label = label_uncertainty(mean)
    return VolumeScores(
        uncertainty=_mean(per_label),
        per_label=per_label,
        entropy=_clamped(entropy / scale),
        mutual_information=_clamped((entropy - entropies / count) / scale),
    )


def _checked(probabilities: Tensor) -> Tensor:
    if probabilities.ndim != 4 or probabilities.shape[0] < 2:
        raise ValueError(f"expected probabilities (C >= 2, D, H, W), got shape {tuple(probabilities.shape)}")
    p = probabilities.float()
    # Also false for NaN.
    if not bool(((p >= 0) & (p <= 1 + 1e-4)).all()):
        raise ValueError("expected probabilities between 0 and 1, got values outside; apply softmax to logits first")
    return p


def _per_label(weights: Tensor, entropies: Tensor) -> tuple[float | None, ...]:
    pairs = zip(weights.tolist(), entropies.tolist(), strict=True)
    return tuple(None if weight < _MIN_VOXELS else _clamped(entropy / weight) for weight, entropy in pairs)


def _mean_entropy(p: Tensor) -> float:
    return float(voxel_entropy(p).mean(dtype=torch.float64))


def _mean(values: Iterable[float | None]) -> float:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else 0.0


def _clamped(value: float) -> float:
    return min(1.0, max(0.0, value))
