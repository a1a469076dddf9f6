"""Fine-tuning on all submitted labels."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from fastapi import HTTPException
from monailabel.interfaces.datastore import Datastore, DefaultLabelTag
from monailabel.interfaces.tasks.train import TrainTask
from monailabel.utils.others.generic import device_list

from deformux.cases import Case
from deformux.engine import Progress, TrainingError, fit
from deformux.network import DeformUXNet
from deformux.recipe import RECIPES, Recipe
from deformux.weights import InvalidModel, ModelCard, pretrained_path, warm_start

from ..checks import checked_device
from ..configs.project import Project
from ..models import ServedModels
from .status import TrainingStatus

__all__ = ["FineTune", "held_out"]

logger = logging.getLogger(__name__)

_FEWEST_LABELS = 2
_FEWEST_LABELS_TO_VALIDATE = 5
_STEPS_PER_EPOCH = 20
# The same labels give the same model, but for rounding.
_SEED = 0
_STARTS = ("published", "pretrained", "scratch")


class FineTune(TrainTask):
    """Train on every submitted label, write the result as a version, and publish it.

    MONAI Label runs this in a process of its own; ``stats`` is read by the server from the status file.
    """

    def __init__(self, project: Project, models: ServedModels, state_folder: Path) -> None:
        super().__init__("Fine-tune DeformUX-Net on all submitted labels")
        self.project = project
        self.models = models
        self.status = TrainingStatus(state_folder / "training.json")

    def config(self) -> dict[str, Any]:
        """Options as the Slicer extension shows them: of a list it sends the first unless another is chosen."""
        recipe = RECIPES["finetune"]
        return {
            "device": device_list(),
            "steps": recipe.steps,
            "batch_size": recipe.batch_size,
            "learning_rate": recipe.learning_rate,
            "start_from": list(self._starts),
        }

    def stats(self) -> dict[str, Any]:
        return self.status.read()

    def check(self, request: Mapping[str, Any], datastore: Datastore) -> None:
        """Refuse what could not be trained, before a process is started for it.

        Raises:
            HTTPException: 409 with fewer than two labels, 400 on a bad option.
        """
        count = len(datastore.get_labeled_images())
        if count < _FEWEST_LABELS:
            raise HTTPException(
                409, f"training needs at least {_FEWEST_LABELS} submitted labels; there {_are(count)} so far"
            )
        self._recipe(request)
        checked_device(request.get("device"))
        start = _first(request.get("start_from", _STARTS[0]))
        if start not in self._starts:
            raise HTTPException(400, f"start_from must be one of {', '.join(self._starts)}; got {start!r}")

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any]:
        self.check(request, datastore)
        recipe = self._recipe(request)
        self.status.start(total_epochs=recipe.epochs, total_steps=recipe.steps, start_ts=int(time.time()))
        try:
            version = self._train(recipe, request, datastore)
        except TrainingError as error:
            self.status.update(now=True, status="failed", error=str(error))
            raise HTTPException(422, str(error)) from error
        except Exception:
            self.status.update(now=True, status="failed", error="the training failed; the server's log says why")
            raise
        return {"version": version, **self.status.read()}

    @property
    def _starts(self) -> tuple[str, ...]:
        return tuple(start for start in _STARTS if start != "pretrained" or self.project.pretrained)

    def _train(self, recipe: Recipe, request: Mapping[str, Any], datastore: Datastore) -> str:
        cases = [
            Case(
                image, Path(datastore.get_image_uri(image)), Path(datastore.get_label_uri(image, DefaultLabelTag.FINAL))
            )
            for image in sorted(datastore.get_labeled_images())
        ]
        validation = [case for case in cases if held_out(case.id)] if len(cases) >= _FEWEST_LABELS_TO_VALIDATE else []
        training = [case for case in cases if case not in validation]
        if len(training) < _FEWEST_LABELS:
            training, validation = cases, []
        # With fewer than five, every case trains: the first validated model may have begun from weights that saw
        # its validation cases.
        torch.manual_seed(_SEED)
        network = DeformUXNet(1, len(self.project.labels) + 1, self.project.preset)
        parent = self._warm_start(network, _first(request.get("start_from", _STARTS[0])))
        device = checked_device(request.get("device"))
        logger.info("Training on %d volumes, %d held out, from %s", len(training), len(validation), parent or "scratch")
        result = fit(
            network,
            training,
            recipe=recipe,
            prep=self.project.preprocessing,
            labels=self.project.labels,
            val_cases=validation,
            device=device,
            on_progress=self._report,
            seed=_SEED,
        )
        card = ModelCard(
            labels=self.project.labels,
            preprocessing=self.project.preprocessing,
            preset=self.project.preset,
            parent=parent,
            training_cases=tuple(case.id for case in training),
            recipe=recipe.to_json(),
            validation={"mean_dice": result.best_dice, "per_case": result.per_case},
            seconds=result.seconds,
            device=device,
        )
        version = self.models.versions.write(network, card)
        self.models.versions.publish(version)
        self.status.update(
            now=True,
            status="done",
            epoch=recipe.epochs,
            total_time=max(1, round(result.seconds)),
            best_metric=_share(result.best_dice),
            eta_seconds=0,
            version=version,
        )
        return version

    def _warm_start(self, network: DeformUXNet, start: str) -> str | None:
        """Load the weights to start from and name them; what has another architecture cannot be started from."""
        published = self.models.current() if start == "published" else None
        pretrained = self.project.pretrained if start != "scratch" else None
        if published:
            name, path = published, self.models.path(published)
        elif pretrained:
            name, path = f"pretrained-{pretrained}", pretrained_path(pretrained)
        else:
            return None
        try:
            warm_start(network, path)
        except InvalidModel as error:
            logger.warning("Starting from scratch: %s", error)
            return None
        return name

    def _report(self, progress: Progress) -> None:
        self.status.update(
            epoch=progress.epoch,
            total_epochs=progress.total_epochs,
            step=progress.step,
            total_steps=progress.total_steps,
            loss=_finite(progress.loss),
            mean_dice=_finite(progress.mean_dice),
            best_metric=_share(progress.best_dice),
            eta_seconds=_finite(progress.eta_s),
        )

    def _recipe(self, request: Mapping[str, Any]) -> Recipe:
        recipe = RECIPES["finetune"]
        steps = _number(request, "steps", recipe.steps, 1, 1_000_000)
        return recipe.replace(
            steps=int(steps),
            # An average over more than a tenth of the run lags behind a short one.
            ema_decay=1 - 1 / max(2.0, 0.1 * steps),
            # Validating takes about as long as ten steps.
            epochs=max(1, min(recipe.epochs, int(steps) // _STEPS_PER_EPOCH)),
            batch_size=int(_number(request, "batch_size", recipe.batch_size, 1, 64)),
            learning_rate=_number(request, "learning_rate", recipe.learning_rate, 1e-8, 1.0),
        )


def held_out(case_id: str) -> bool:
    """Whether a case validates instead of trains: by its id alone, so that the assignment never drifts."""
    return int.from_bytes(hashlib.sha256(case_id.encode()).digest()[:4], "big") % 5 == 0


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else value


def _number(request: Mapping[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = _first(request.get(name, default))
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not low <= number <= high or (isinstance(default, int) and number != int(number)):
        kind = "a whole number" if isinstance(default, int) else "a number"
        raise HTTPException(400, f"{name} must be {kind} from {low:g} to {high:g}; got {value!r}")
    return number


def _are(count: int) -> str:
    return {0: "are none", 1: "is 1"}.get(count, f"are {count}")


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(float(value), 5)


def _share(value: float | None) -> float:
    """A Dice between 0 and 1 that the Slicer extension can draw; 0 where nothing was validated."""
    return min(1.0, max(0.0, _finite(value) or 0.0))
