"""Background scoring: scores of all volumes by the served model, and each strategy's order of the volumes."""

from __future__ import annotations

import logging
import math
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.scoring import ScoringMethod
from monailabel.utils.others.generic import name_to_device

from deformux.active_learning.feature_file import read_features, write_features
from deformux.active_learning.observe import encode, observe
from deformux.active_learning.strategies import NEEDS_SCORES, choose
from deformux.active_learning.uncertainty_scores import VolumeScores
from deformux.data.checked_json import read_checked, write_checked
from deformux.data.preprocessing import Preprocessing
from deformux.data.volume_reader import InvalidVolume
from deformux.networks.deformux_net import DeformUXNet
from deformux.networks.model_file import (
    InvalidModel,
    ModelCard,
    load_model,
    planned_network,
    remove_unfinished,
    warm_start,
)
from deformux.networks.pretrained import pretrained_path
from deformux_label.lib.configs.project import Project
from deformux_label.lib.infers.model_loader import ServedModels
from deformux_label.lib.store.listed_studies import image_files

__all__ = ["UNTRAINED_MODEL", "Orders", "SelectionScores", "SelectionScoring", "changed_since"]

logger = logging.getLogger(__name__)

UNTRAINED_MODEL = "untrained"
"""Name of the model before the first training; even its untrained encoder distinguishes volumes."""

# Number of volumes that are chosen jointly; more are rarely annotated between two versions.
_AHEAD = 64
# Number of published versions to compare if training mirrors no axis.
_SNAPSHOTS = 3
_SECONDS_BETWEEN_WRITES = 5.0
# Largest share of time for writing.
_SHARE_OF_WRITING = 0.1


@dataclass(frozen=True)
class Orders:
    """Results for one model: each strategy's order, best first, and each volume's uncertainty.

    Unreadable volumes have uncertainty None and are in no order. Files that changed after ``written`` (seconds
    since 1970) have not been scored.
    """

    model: str
    by_strategy: Mapping[str, Sequence[str]] = field(default_factory=dict)
    uncertainty: Mapping[str, float | None] = field(default_factory=dict)
    unreadable: frozenset[str] = frozenset()
    written: float = 0.0


class SelectionScores:
    """Scores and features of all volumes, in two files per model, so that models never mix.

    A background process writes them (``update``); the server only reads finished orders (``orders``).
    """

    def __init__(self, project: Project, models: ServedModels, folder: Path) -> None:
        self.project = project
        self.models = models
        self.folder = folder
        self._held: dict[str, tuple[int, Orders]] = {}

    def current(self) -> str:
        """Return the model for which scores are needed now."""
        return self.models.current() or UNTRAINED_MODEL

    def orders(self, model: str) -> Orders:
        """Return the results for a model; read the file again only after it has been replaced."""
        path = self._path(model)
        try:
            written = path.stat().st_mtime_ns
        except FileNotFoundError:
            return Orders(model)
        # Requests run in threads, so the dict is replaced as a whole.
        all_held = self._held
        held = all_held.get(model)
        if held is None or held[0] != written:
            values = _read(path)
            uncertainty = {name: score and score["uncertainty"] for name, score in values["scores"].items()}
            held = (written, Orders(model, values["orders"], uncertainty, values["unreadable"], values["written"]))
            # Earlier models are needed only until the new one has scores.
            self._held = {model: held} | {name: all_held[name] for name in list(all_held)[:2] if name != model}
        return held[1]

    def latest_orders(self) -> Orders:
        """Return the orders of the served model, else of the newest earlier model with orders, else empty ones."""
        for model in (self.current(), *self._earlier(), UNTRAINED_MODEL):
            orders = self.orders(model)
            if orders.by_strategy:
                return orders
        return Orders(self.current())

    def update(self, datastore: Datastore, *, wanted: Callable[[], bool] = lambda: True) -> Orders:
        """Score the volumes that the served model has not scored; if a new model is published, continue with that.

        Do nothing while a different process is scoring, and end early once ``wanted`` returns False.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.folder / ".lock", timeout=0):
                remove_unfinished(self.folder)
                model = None
                while wanted() and model != self.current():
                    model = self.current()
                    _Update(self, model, datastore, wanted).run()
                self._prune()
        except Timeout:
            logger.info("A different process is scoring the volumes")
        return self.orders(self.current())

    def networks(self, model: str) -> tuple[list[DeformUXNet], Preprocessing, tuple[int, ...]]:
        """Return the networks to compare, newest first, their preprocessing and mirrored axes."""
        if model == UNTRAINED_MODEL:
            torch.manual_seed(0)
            plan = self.models.untrained_plan()
            network = planned_network(plan, len(self.project.labels))
            if self.project.pretrained:
                warm_start(network, pretrained_path(self.project.pretrained))
            return [network], plan.preprocessing.with_dropout(1.0), ()
        network, card = load_model(self.models.path(model))
        networks, axes = [network], tuple(card.recipe.get("flip_axes") or ())
        if not axes:
            networks += islice(self._comparable(card), _SNAPSHOTS - 1)
        return networks, card.preprocessing, axes

    def round(self) -> int:
        """Return the number of models that were published before the served one."""
        return len(self._earlier())

    def _comparable(self, card: ModelCard) -> Iterator[DeformUXNet]:
        for name in self._earlier():
            try:
                network, earlier = load_model(self.models.path(name))
            except (InvalidModel, ValueError):
                continue  # pruned or damaged: compare one prediction fewer
            # Scores are of probabilities: what is kept of a mask does not matter.
            same = earlier.preprocessing.without_output() == card.preprocessing.without_output()
            if earlier.labels == card.labels and same:
                yield network

    def _earlier(self) -> list[str]:
        """Return the models that were served before, latest first."""
        try:
            names = [publication.version for publication in reversed(self.models.versions.history())]
        except ValueError as error:
            logger.error("The history of publications cannot be read: %s", error)
            return []
        current = self.models.current()
        return [name for name in dict.fromkeys(names) if name != current]

    def _prune(self) -> None:
        wanted = {self.current(), UNTRAINED_MODEL, *self._earlier()[:_SNAPSHOTS]}
        for path in self.folder.iterdir():
            if path.suffix in (".json", ".safetensors") and path.stem not in wanted:
                path.unlink(missing_ok=True)

    def _path(self, model: str) -> Path:
        return self.folder / f"{model}.json"


class _Update:
    """Scoring of all volumes with one model; results are written from time to time."""

    def __init__(self, scores: SelectionScores, model: str, datastore: Datastore, wanted: Callable[[], bool]) -> None:
        self.owner, self.model, self.datastore, self.wanted = scores, model, datastore, wanted
        self.path = scores.folder / f"{model}.json"
        values = _read(self.path)
        self.features = read_features(self.path.with_suffix(".safetensors"))
        # One file may be newer than the other, and an unreadable scan may have been repaired.
        repaired = set(changed_since(values["unreadable"], datastore, values["written"]))
        self.scores: dict[str, dict[str, Any] | None] = {
            name: score
            for name, score in values["scores"].items()
            if name not in repaired and (score is None or name in self.features)
        }
        self.device = name_to_device(None)
        self.rng = np.random.default_rng(zlib.crc32(model.encode()))

    def run(self) -> None:
        unlabelled = sorted(self.datastore.get_unlabeled_images())
        labelled = sorted(self.datastore.get_labeled_images())
        # Random order, so that the first results are a fair sample.
        todo = [str(name) for name in self.rng.permutation([n for n in unlabelled if n not in self.scores])]
        todo += [name for name in labelled if name not in self.features and self.scores.get(name, {}) is not None]
        if not todo and self.path.is_file():
            return
        networks, prep, axes = self.owner.networks(self.model)
        wait, written = 0.0, -math.inf
        for name in todo:
            if not self.wanted() or self.owner.current() != self.model:
                return
            self._score(name, networks, prep, axes, score=name not in labelled and self.model != UNTRAINED_MODEL)
            if time.monotonic() - written > wait:
                began = time.monotonic()
                self._write()
                written = time.monotonic()
                wait = max(_SECONDS_BETWEEN_WRITES, (written - began) / _SHARE_OF_WRITING)
        self._write()
        logger.info("Scored %d of %d volumes with model %s", len(todo), len(unlabelled), self.model)

    def _score(
        self, name: str, networks: list[DeformUXNet], prep: Preprocessing, axes: tuple[int, ...], *, score: bool
    ) -> None:
        image = image_files(self.datastore, name)
        try:
            if score:
                seen = self._on_device(lambda device: observe(networks, image, prep, flip_axes=axes, device=device))
                self.scores[name], self.features[name] = seen.scores.to_dict(), seen.features
            else:
                self.features[name] = self._on_device(lambda device: encode(networks[0], image, prep, device=device))
                if self.model == UNTRAINED_MODEL:
                    self.scores[name] = {"uncertainty": None}
        except (InvalidVolume, OSError) as error:
            # Deleted meanwhile, or not a scan; this model does not try it again.
            logger.warning("Not scored: %s", error)
            self.scores[name] = None

    def _on_device(self, run: Callable[[str], Any]) -> Any:
        try:
            return run(self.device)
        except torch.cuda.OutOfMemoryError:
            logger.warning("The GPU has no memory left for scoring; continuing on the CPU")
            self.device = "cpu"
            torch.cuda.empty_cache()
            return run(self.device)

    def _write(self) -> None:
        unlabelled = [name for name in self.datastore.get_unlabeled_images() if self.scores.get(name) is not None]
        orders = self._orders(unlabelled, self.datastore.get_labeled_images())
        write_features(self.path.with_suffix(".safetensors"), self.features)
        write_checked(self.path, {"model": self.model, "scores": self.scores, "orders": orders})

    def _orders(self, unlabelled: Sequence[str], labelled: Sequence[str]) -> dict[str, list[str]]:
        if self.model == UNTRAINED_MODEL:
            scores: dict[str, VolumeScores] = {}
            strategies: tuple[str, ...] = ("adaptive", "typicality")
        else:
            scores = {name: VolumeScores.from_dict(self.scores[name] or {}) for name in unlabelled}
            strategies = ("typicality", *NEEDS_SCORES)
        orders = {}
        for strategy in strategies:
            first = choose(
                strategy,
                unlabelled=unlabelled,
                labelled=labelled,
                batch=_AHEAD,
                round_=self.owner.round(),
                rng=self.rng,
                scores=scores,
                features=self.features,
            )
            chosen = set(first)
            rest = [name for name in unlabelled if name not in chosen]
            if strategy in NEEDS_SCORES and scores:
                greedy = "uncertainty" if strategy in ("adaptive", "stochastic_batch") else strategy
                rest = choose(greedy, unlabelled=rest, batch=len(rest), round_=0, rng=self.rng, scores=scores)
            orders[strategy] = [*first, *rest]
        return orders


class SelectionScoring(ScoringMethod):
    """MONAI Label's scoring method that scores all volumes with the served model after each publication."""

    def __init__(self, scores: SelectionScores) -> None:
        super().__init__("Uncertainty and features of each volume, for active learning")
        self.scores = scores

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any]:  # noqa: ARG002
        parent = os.getppid()
        # The background process ends with the server that started it.
        return dict(self.scores.update(datastore, wanted=lambda: os.getppid() == parent).uncertainty)


def changed_since(images: Iterable[str], datastore: Datastore, when: float) -> list[str]:
    """Return the volumes whose files were added or changed after ``when`` (seconds since 1970)."""
    found = []
    for image in images:
        states = []
        for path in image_files(datastore, image):
            with suppress(OSError):
                states.append(os.stat(path))
        # A copied file may keep its modification time.
        if any(max(status.st_mtime, status.st_ctime) > when for status in states):
            found.append(image)
    return found


def _read(path: Path) -> dict[str, Any]:
    nothing: dict[str, Any] = {"scores": {}, "orders": {}, "unreadable": frozenset(), "written": 0.0}
    try:
        written = path.stat().st_mtime
        values = read_checked(path, dict)
        unreadable = frozenset(name for name, score in values["scores"].items() if score is None)
        orders = dict(values["orders"])
        return {"scores": dict(values["scores"]), "orders": orders, "unreadable": unreadable, "written": written}
    except FileNotFoundError:
        return nothing
    except (ValueError, TypeError, KeyError, AttributeError):
        # The scores are computed again.
        logger.warning("%s is damaged and will be replaced", path)
        return nothing
