"""How unsure the served model is of each unlabelled volume."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.scoring import ScoringMethod
from monailabel.utils.others.generic import name_to_device

from deformux.files import write_text
from deformux.inference import segment
from deformux.selection import volume_uncertainty
from deformux.transforms import InvalidVolume

from ..models import ServedModels

__all__ = ["UncertaintyScores", "UncertaintyScoring"]

logger = logging.getLogger(__name__)


class UncertaintyScores:
    """Scores in one file per model version, so that a new model never meets an old score."""

    def __init__(self, models: ServedModels, folder: Path) -> None:
        self.models = models
        self.folder = folder

    def update(self, datastore: Datastore, images: Sequence[str], *, seconds: float = math.inf) -> dict[str, float]:
        """Score volumes that the served model has not scored, at least one, until ``seconds`` are over.

        Returns:
            all scores, 0..1, of ``images`` that are known now; unreadable volumes have none.
        """
        model = self.models.current()
        if model is None:
            return {}
        known = self._read(model)
        deadline = time.monotonic() + seconds
        for image in images:
            if image in known:
                continue
            known[image] = self._score(model, Path(datastore.get_image_uri(image)))
            self._write(model, image, known[image])
            if time.monotonic() > deadline:
                break
        return {image: score for image in images if (score := known.get(image)) is not None}

    def _score(self, model: str, image: Path) -> float | None:
        device = name_to_device(None)
        network, card = self.models.load(model, device)
        try:
            _, probabilities = segment(network, image, card.preprocessing, device=device)
        except InvalidVolume as error:
            logger.warning("Not scored: %s", error)
            return None
        return volume_uncertainty(probabilities)

    def _path(self, model: str) -> Path:
        return self.folder / f"{model}.json"

    def _read(self, model: str) -> dict[str, float | None]:
        try:
            return json.loads(self._path(model).read_text())
        except FileNotFoundError:
            return {}

    def _write(self, model: str, image: str, score: float | None) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        # The server and the scoring process add to the same file.
        with FileLock(self.folder / ".lock"):
            write_text(self._path(model), json.dumps(self._read(model) | {image: score}))


class UncertaintyScoring(ScoringMethod):
    """Scores every unlabelled volume; run in the background after each training."""

    def __init__(self, scores: UncertaintyScores) -> None:
        super().__init__("Uncertainty of the model about each unlabelled volume")
        self.scores = scores

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any]:
        return dict(self.scores.update(datastore, sorted(datastore.get_unlabeled_images())))
