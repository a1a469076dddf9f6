"""Dice between submitted labels and the model's proposals."""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable
from typing import Any

import numpy as np
from monailabel.interfaces.datastore import Datastore, DefaultLabelTag
from monailabel.interfaces.tasks.scoring import ScoringMethod

from deformux.data.label_values import UNLABELLED
from deformux.data.loading import LoadLabeld, LoadVolumed
from deformux.data.transforms import run_transforms
from deformux.data.volume_reader import InvalidVolume
from deformux.inference.metrics import dice_per_label, mean_dice
from deformux_label.lib.configs.project import Project
from deformux_label.lib.store.listed_studies import learnt_label

__all__ = ["DiceScoring"]

logger = logging.getLogger(__name__)


class DiceScoring(ScoringMethod):
    """MONAI Label's scoring method for Dice between two tags of a volume, stored in the volume's info.

    ``y`` is the submitted label (tag ``final``), ``y_pred`` the stored proposal (tag ``original``). Unlabelled voxels
    (255) do not count, and a label that was not annotated has no Dice.
    """

    def __init__(self, project: Project) -> None:
        super().__init__("Dice of each submitted label and the stored proposal of the model")
        self.project = project

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any]:
        truth = str(request.get("y", DefaultLabelTag.FINAL.value))
        pred = str(request.get("y_pred", DefaultLabelTag.ORIGINAL.value))
        scores = {image: self.score(datastore, image, truth, pred) for image in datastore.list_images()}
        return {image: score for image, score in scores.items() if score is not None}

    def score(self, datastore: Datastore, image_id: str, truth: str = "final", pred: str = "original") -> dict | None:
        """Return the Dice of one volume and store it as ``dice`` (mean) and ``dice_per_label``; None without both."""
        tags = datastore.get_labels_by_image_id(image_id)
        if truth not in tags or pred not in tags:
            return None
        n_labels = len(self.project.labels)
        load = (LoadVolumed("image"), LoadLabeld(("truth", "pred"), n_labels=n_labels, unlabelled=True))
        paths = {tag: learnt_label(datastore, image_id, tag) for tag in (truth, pred)}
        try:
            given: dict[Hashable, Any] = {
                "image": datastore.get_image_uri(image_id),
                "truth": paths[truth],
                "pred": paths[pred],
            }
            volumes = run_transforms(load, given)
        except InvalidVolume as error:
            logger.warning("No Dice for %s: %s", image_id, error)
            return None
        known = (volumes["truth"] != UNLABELLED) & (volumes["pred"] != UNLABELLED)
        dice = dice_per_label((volumes["pred"] * known)[0], (volumes["truth"] * known)[0], n_labels)
        for tag in (truth, pred):
            annotated = datastore.get_label_info(image_id, tag).get("annotated")
            if isinstance(annotated, list):
                dice[[name not in annotated for name in self.project.labels]] = np.nan
        # A label in neither volume has no Dice, and JSON has no NaN.
        per_label = {name: _number(value) for name, value in zip(self.project.labels, dice, strict=True)}
        score = {"dice": _number(mean_dice(dice)), "dice_per_label": per_label}
        datastore.update_image_info(image_id, score)
        return score


def _number(value: float) -> float | None:
    return round(float(value), 4) if math.isfinite(value) else None
