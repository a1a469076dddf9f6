"""Which unlabelled volume comes next."""

from __future__ import annotations

import logging
import random
import time
from typing import Any

from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.strategy import Strategy

from ..scoring.uncertainty import UncertaintyScores

__all__ = ["Random", "Uncertainty"]

logger = logging.getLogger(__name__)


class Random(Strategy):
    """A random unlabelled volume, those handed out lately less often."""

    def __init__(self) -> None:
        super().__init__("A random volume")

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any] | None:
        images = datastore.get_unlabeled_images()
        if not images:
            return None
        name = request.get("strategy", "random")
        handed_out = [datastore.get_image_info(i).get("strategy", {}).get(name, {}).get("ts", 0) for i in images]
        # MONAI Label's own leaves out the 1, and fails when the last volume is asked for twice within a second.
        weights = [max(0, time.time() - ts) + 1 for ts in handed_out]
        return {"id": random.choices(images, weights=weights)[0]}


class Uncertainty(Strategy):
    """The volume whose segmentation the model is least sure of.

    Scores of the served model are kept; within one request volumes without a score are scored for a few seconds.
    """

    _SECONDS = 8.0

    def __init__(self, scores: UncertaintyScores) -> None:
        super().__init__("The volume that the model is least sure of")
        self.scores = scores

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any] | None:
        images = sorted(datastore.get_unlabeled_images())
        if not images:
            return None
        if self.scores.models.current() is None:
            logger.info("There is no trained model yet: a random volume instead of the most uncertain one")
            return Random()(request, datastore)
        scored = self.scores.update(datastore, images, seconds=self._SECONDS)
        if not scored:
            return {"id": images[0]}
        best = max(scored, key=lambda image: scored[image])
        logger.info("Uncertainty of %d of %d volumes; next is %s: %.3f", len(scored), len(images), best, scored[best])
        return {"id": best, "uncertainty": scored[best]}
