"""Simulated annotators: they know the truth and hand in what a radiologist would, for demos and benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Correction", "WholeLabelAnnotator", "dense_labels"]

Labels = npt.NDArray[np.uint8]


def dense_labels(label: npt.NDArray[np.generic], values: Sequence[int]) -> Labels:
    """Return `label` (D, H, W) with `values[0]` as 1, `values[1]` as 2, … and everything else as background 0.

    MONAI Label's clients number labels by their position, so sparse values would silently lose classes.
    Raises ValueError for more than 255 values, repeated values or the background value 0 among them.
    """
    if len(values) > 255 or len(set(values)) != len(values) or 0 in values:
        raise ValueError(f"label values: got {list(values)}, expected at most 255 different values other than 0")
    dense = np.zeros(label.shape, np.uint8)
    for position, value in enumerate(values, start=1):
        dense[label == value] = position
    return dense


@dataclass(frozen=True)
class Correction:
    """What the annotator hands in: `label` (D, H, W), and how much of the prediction had to change to get there.

    `edited` holds per label name the share of voxels changed, among those that the prediction or the truth gives
    to that label: 0 = untouched, 1 = redrawn. Labels absent from both are left out. `edited_voxels` counts voxels.
    """

    label: Labels
    edited: Mapping[str, float]
    edited_voxels: int


class WholeLabelAnnotator:
    """An annotator who corrects every voxel of a volume before submitting it."""

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = tuple(labels)

    def correct(self, truth: Labels, prediction: Labels | None = None) -> Correction:
        """Return the true label and its distance from the `prediction` shown, both (D, H, W) with values 0..N.

        Without a prediction the annotator draws everything. Raises ValueError when shapes differ or values exceed N.
        """
        shown = np.zeros_like(truth) if prediction is None else prediction
        if shown.shape != truth.shape:
            raise ValueError(f"prediction: got shape {shown.shape}, expected the truth's shape {truth.shape}")
        highest = max(int(truth.max(initial=0)), int(shown.max(initial=0)))
        if highest > len(self.labels):
            raise ValueError(
                f"label values: got {highest}, expected 0 to {len(self.labels)} for {', '.join(self.labels)}"
            )
        edited = {}
        for value, name in enumerate(self.labels, start=1):
            is_true, is_shown = truth == value, shown == value
            either = int(np.count_nonzero(is_true | is_shown))
            if either:
                edited[name] = float(np.count_nonzero(is_true != is_shown)) / either
        return Correction(truth.copy(), edited, int(np.count_nonzero(truth != shown)))
