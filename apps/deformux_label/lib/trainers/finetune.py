"""Fine-tuning on all submitted labels."""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from fastapi import HTTPException
from monailabel.interfaces.datastore import Datastore, DefaultLabelTag
from monailabel.interfaces.tasks.train import TrainTask
from monailabel.utils.others.generic import device_list

from deformux.data.cases import Case, Scan
from deformux.data.choices import AUTO
from deformux.data.planning import default_minutes
from deformux.data.sequences import first_present
from deformux.fitting.fit import Progress, TrainingError, TrainingStopped
from deformux.fitting.recipe import RECIPES, Recipe
from deformux.networks.pretrained import pretrained_path
from deformux.publishing.learner import Learner, Outcome, Round
from deformux.publishing.project_plan import ProjectPlanner
from deformux_label.lib.configs.project import Project
from deformux_label.lib.infers.model_loader import ServedModels
from deformux_label.lib.requests.options import checked_device
from deformux_label.lib.requests.training import TrainingRequest
from deformux_label.lib.store.listed_studies import image_files, learnt_label
from deformux_label.lib.trainers.process import TRAININGS_SHARE
from deformux_label.lib.trainers.status import TrainingStatus

__all__ = ["FineTune"]

logger = logging.getLogger(__name__)

_STEPS_PER_EPOCH = 20
# The learning rate for a start from trained weights, as a fraction of the one from scratch.
_CONTINUED_RATE = RECIPES["continue"].learning_rate / RECIPES["finetune"].learning_rate
# Fixed, so that the same labels give the same model, except for rounding.
_SEED = 0
# Most unused or doubtful cases that are reported.
_MAX_REPORTED = 100
_STARTS = ("published", "pretrained", "scratch")


class FineTune(TrainTask):
    """Train on every submitted label, write the result as a version, and publish it unless it is worse.

    MONAI Label runs this in a separate process; in the server, ``stats`` reads the status file. On SIGTERM the current
    step is finished and kept, and the next training on the same labels continues from there.
    """

    def __init__(self, project: Project, models: ServedModels, state_folder: Path, planner: ProjectPlanner) -> None:
        super().__init__("Fine-tune DeformUX-Net on all submitted labels")
        self.project = project
        self.planner = planner
        self.learner = Learner(state_folder, labels=project.labels, planner=planner)
        self.models = models
        self.status = TrainingStatus(state_folder / "training.json")

    def config(self) -> dict[str, Any]:
        """Return the options as the Slicer extension shows them; the first of a list is its default."""
        recipe = RECIPES["finetune"]
        return {
            "device": device_list(),
            "minutes": self._minutes(device_list()[0]),
            "steps": AUTO,
            "batch_size": AUTO,
            "learning_rate": recipe.learning_rate,
            "start_from": list(self._starts),
        }

    def stats(self) -> dict[str, Any]:
        return self.status.read()

    def check(self, request: Mapping[str, Any], datastore: Datastore) -> None:
        """Refuse a training that cannot work, before its process is started.

        Raises:
            HTTPException: 409 without a label, 400 on a bad option.
        """
        if not datastore.get_labeled_images():
            raise HTTPException(409, "training needs at least 1 submitted label; none has been submitted yet")
        self._parsed(request)

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any]:
        self.check(request, datastore)
        asked = self._parsed(request)
        recipe = _recipe(asked)
        self.planner.device = asked.device
        self.planner.minutes = asked.minutes
        self.status.start(
            total_epochs=recipe.epochs,
            total_steps=recipe.steps,
            start_ts=int(time.time()),
            task_id=request.get("task_id"),
        )
        try:
            with _stop_on_sigterm() as stop:
                outcome = self.learner.learn(
                    self.cases(datastore),
                    self._round(recipe, asked),
                    scans=_unlabelled(datastore),
                    on_progress=self._report,
                    stop=stop.is_set,
                )
        except TrainingStopped as error:
            self.status.update(now=True, status="stopped", error=f"{error}; no model was published")
            # Same exit status as without the handler.
            raise SystemExit(128 + signal.SIGTERM) from error
        except TrainingError as error:
            self.status.update(now=True, status="failed", error=str(error))
            raise HTTPException(422, str(error)) from error
        except Exception:
            self.status.update(now=True, status="failed", error="the training failed; the server's log says why")
            raise
        self._report_outcome(outcome)
        return {"version": outcome.version, **self.status.read()}

    @property
    def _starts(self) -> tuple[str, ...]:
        return tuple(start for start in _STARTS if start != "pretrained" or self.project.pretrained)

    def _minutes(self, device: str) -> float:
        return self.project.train_minutes or default_minutes(checked_device(device))

    def _parsed(self, request: Mapping[str, Any]) -> TrainingRequest:
        return TrainingRequest.of(request, self.config(), starts=self._starts)

    def cases(self, datastore: Datastore) -> list[Case]:
        """Return the volumes with a submitted label."""
        cases = []
        for image in sorted(datastore.get_labeled_images()):
            label = learnt_label(datastore, image, DefaultLabelTag.FINAL.value)
            annotated = datastore.get_label_info(image, DefaultLabelTag.FINAL).get("annotated")
            known = tuple(name for name in self.project.labels if isinstance(annotated, list) and name in annotated)
            files = image_files(datastore, image)
            cases.append(Case(image, first_present(files), label, known or None, files))
        return cases

    def _round(self, recipe: Recipe, asked: TrainingRequest) -> Round:
        pretrained = self.project.pretrained
        gentle = recipe.replace(
            schedule="cosine", learning_rate=_CONTINUED_RATE * recipe.learning_rate, click_start=0.0
        )
        devices = self._devices(recipe, asked.device)
        return Round(
            scratch_recipe=recipe,
            continue_recipe=gentle,
            start=pretrained_path(pretrained) if pretrained else None,
            served=self.models.pretrained,
            from_scratch=asked.start_from == "scratch",
            from_start=asked.start_from == "pretrained",
            device=devices[0],
            devices=devices,
            memory_share=TRAININGS_SHARE,
            seed=_SEED,
            minutes=asked.minutes if asked.steps is None else None,
            fixed={"batch_size": asked.batch_size} if asked.batch_size is not None else {},
        )

    def _devices(self, recipe: Recipe, one: str) -> tuple[str, ...]:
        """Return the devices to train on.

        This is the device that a request chooses, else as many of the project's as evenly divide a step's volumes.

        Raises:
            TrainingError: this process does not see a GPU that the project names.
        """
        first = checked_device(device_list()[0])
        if self.project.train_devices == "one" or one not in (first, checked_device(None)):
            return (one,)
        if self.project.train_devices == "auto":
            devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())] or [one]
        else:
            devices = self.project.train_devices.split(",")
        visible = torch.cuda.device_count()
        if missing := [name for name in devices if name != "cpu" and int(name.partition(":")[2]) >= visible]:
            raise TrainingError(f"train_devices names {missing[0]}, but only {visible} GPUs are visible")
        volumes = recipe.batch_size // recipe.patches_per_volume
        used = max(n for n in range(1, len(devices) + 1) if volumes % n == 0)
        if used < len(devices):
            logger.info("Training on %d of %d devices, which share %d volumes of a step", used, len(devices), volumes)
        return tuple(devices[:used])

    def _report_outcome(self, outcome: Outcome) -> None:
        """Report a written version; the Slicer extension takes a nonzero ``total_time`` as the end."""
        last = self.status.read()
        self.status.update(
            now=True,
            status="done" if outcome.published else "rejected",
            published=outcome.published,
            reason=outcome.decision.reason,
            epoch=last["total_epochs"],
            total_time=max(1, round(outcome.card.seconds)),
            best_metric=_share(outcome.card.validation["mean_dice"]),
            eta_seconds=0,
            version=outcome.version,
            provisional=outcome.decision.provisional,
            not_used=_first(outcome.set_aside),
            doubtful=_first(outcome.decision.doubtful),
        )

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


def _unlabelled(datastore: Datastore) -> list[Scan]:
    """Return the volumes without a submitted label."""
    labelled = set(datastore.get_labeled_images())
    return [
        Scan(image, image_files(datastore, image)) for image in sorted(datastore.list_images()) if image not in labelled
    ]


def _recipe(asked: TrainingRequest) -> Recipe:
    recipe = RECIPES["finetune"].replace(learning_rate=asked.learning_rate)
    if asked.batch_size is not None:
        recipe = recipe.replace(batch_size=asked.batch_size)
    if asked.steps is None:
        return recipe
    # Validating takes about as long as ten steps.
    return recipe.in_steps(asked.steps, epochs=min(recipe.epochs, asked.steps // _STEPS_PER_EPOCH))


@contextmanager
def _stop_on_sigterm() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM sets; it stays unset outside the main thread, which alone can set handlers."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


def _first(by_case: Mapping[str, Any]) -> dict[str, Any]:
    """Return only the first cases, because every reply to ``GET /info/`` contains them."""
    return dict(islice(by_case.items(), _MAX_REPORTED))


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(float(value), 5)


def _share(value: float | None) -> float:
    """Return a Dice from 0 to 1 that the Slicer extension can draw; 0 if nothing was validated."""
    return min(1.0, max(0.0, _finite(value) or 0.0))
