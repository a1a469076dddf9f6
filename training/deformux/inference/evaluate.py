"""Scores of a network on labelled volumes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from deformux.data.cases import Case
from deformux.data.label_values import UNLABELLED
from deformux.data.loading import LoadLabeld, LoadVolumed, filled_voxels
from deformux.data.preprocessing import Preprocessing
from deformux.data.transforms import run_transforms
from deformux.inference.captured_network import prepared
from deformux.inference.metrics import dice_per_label
from deformux.inference.sliding_window import Network, segment

__all__ = ["evaluate"]


def evaluate(
    network: Network,
    cases: Sequence[Case],
    prep: Preprocessing,
    *,
    n_labels: int,
    labels: Sequence[str] = (),
    device: str | torch.device = "cpu",
    on_case: Callable[[Case, np.ndarray], None] | None = None,
    on_warning: Callable[[Case, str], None] | None = None,
) -> dict[str, list[float]]:
    """Score a network by Dice on the scans' own grids.

    Unlabelled voxels (255) do not count.

    Args:
        network: a network, or the result of ``prepared``.
        cases: labelled volumes.
        prep: the model's preprocessing.
        n_labels: labels 1..N.
        labels: names of labels 1..N; needed for cases that are annotated for some labels only.
        device: where to compute.
        on_case: takes each case and its values.
        on_warning: takes each case whose scan holds voxels that are not finite, and a sentence about them.

    Returns:
        Case id to ``n_labels`` values; NaN where a label is absent, or was not annotated.

    Raises:
        InvalidVolume: a scan or a label is not usable.
    """
    load_truth = (LoadVolumed("image"), LoadLabeld("label", n_labels=n_labels, unlabelled=True))
    scores: dict[str, list[float]] = {}
    network = prepared(network, device)
    for case in cases:
        found, _ = segment(network, case.images, prep, device=device)
        filled = filled_voxels(found)
        if filled and on_warning is not None:
            on_warning(case, filled)
        truth = run_transforms(load_truth, {"image": case.image, "label": case.label})["label"]
        known = truth != UNLABELLED
        dice = dice_per_label((found * known)[0], (truth * known)[0], n_labels)
        dice[~case.annotates(labels, n_labels)] = np.nan
        scores[case.id] = [float(value) for value in dice]
        if on_case is not None:
            on_case(case, dice)
    return scores
