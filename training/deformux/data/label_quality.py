"""Quality of a label file: the share of each label, and whether it is more than noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from deformux.data.cases import Case
from deformux.data.label_values import UNLABELLED
from deformux.data.loading import LoadLabeld, LoadVolumed
from deformux.data.transforms import run_transforms

__all__ = ["LabelFacts", "coherence", "label_facts"]

# A straight line of single voxels has 0.33, a sheet 0.67, independent voxels 0.
_MIN_COHERENCE = 0.2
# Fewer voxels may be single clicks or the thinnest vessels: draw no conclusion.
_MIN_VOXELS, _MIN_SHARE = 200, 0.01


@dataclass(frozen=True)
class LabelFacts:
    """Share of the volume that each label fills (0 to 1), and why training on it is useless, or an empty string."""

    shares: tuple[float, ...]
    fault: str = ""


def label_facts(case: Case, labels: Sequence[str]) -> LabelFacts:
    """Read a case's label and describe it.

    Raises:
        InvalidVolume: the scan or the label is not usable.
    """
    load = (LoadVolumed("image"), LoadLabeld("label", n_labels=len(labels), unlabelled=True))
    label = np.asarray(run_transforms(load, {"image": case.image, "label": case.label})["label"][0]).astype(np.uint8)
    known = max(1, int((label != UNLABELLED).sum()))
    shares = tuple(float((label == value).sum()) / known for value in range(1, len(labels) + 1))
    value = coherence(label)
    fault = ""
    if value is not None and value < _MIN_COHERENCE:
        found = f"coherence {value:.2f}, expected at least {_MIN_COHERENCE}"
        fault = f"its voxels are as unrelated as random ones ({found})"
    return LabelFacts(shares, fault)


def coherence(label: npt.NDArray[np.uint8]) -> float | None:
    """Return how much likelier than chance a labelled voxel's neighbour has its label: 1 solid, 0 independent voxels.

    A join-count statistic (Cliff and Ord, Spatial Autocorrelation, 1973) in the form of Cohen's kappa: ``(p - q) /
    (1 - q)``, p the share of face neighbours of labelled voxels with the same label, q that share if voxels were
    shuffled. None if too few voxels are labelled to tell.

    Args:
        label: ``(D, H, W)``, 0 background, 255 unlabelled.
    """
    same = pairs = 0
    for axis in range(label.ndim):
        size = label.shape[axis]
        a, b = label.take(range(size - 1), axis), label.take(range(1, size), axis)
        known = (a != UNLABELLED) & (b != UNLABELLED)
        # Each pair is seen from both of its ends.
        pairs += int(((a > 0) & known).sum()) + int(((b > 0) & known).sum())
        same += 2 * int(((a == b) & (a > 0) & known).sum())
    counts = np.bincount(label[label != UNLABELLED].ravel(), minlength=2).astype(float)
    foreground = counts[1:].sum()
    if foreground < max(_MIN_VOXELS, _MIN_SHARE * counts.sum()) or pairs == 0:
        return None
    expected = float((counts[1:] ** 2).sum() / (foreground * counts.sum()))
    return (same / pairs - expected) / (1 - expected) if expected < 1 else 1.0
