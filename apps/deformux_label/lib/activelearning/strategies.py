"""Strategies that choose the next volume to label, by orders that are computed in the background."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.strategy import Strategy

from deformux_label.lib.activelearning.background_scores import UNTRAINED_MODEL, Orders, SelectionScores
from deformux_label.lib.activelearning.waiting_volumes import Waiting, WaitingVolumes
from deformux_label.lib.store.annotator import annotator_of
from deformux_label.lib.store.leases import Leases

__all__ = ["ADDRESS", "First", "Ordered", "Random", "all_strategies"]

logger = logging.getLogger(__name__)

ADDRESS = "_address"
"""Key of the client's address in a request; only the server sets it."""

_DESCRIPTIONS = {
    "adaptive": "Typical volumes before the first model, then those it is unsure of and that differ",
    "typicality": "The most typical volume of each group that has no label yet",
    "uncertainty": "The volume whose labels the model is least sure of",
    "entropy": "The volume with the highest entropy over all voxels",
    "bald": "The volume on which predictions of the model disagree most",
    "stochastic_batch": "Of random batches of volumes, the one with the highest entropy",
}


def all_strategies(
    scores: SelectionScores,
    leases: Leases,
    request_scoring: Callable[[], object],
    volumes: WaitingVolumes | None = None,
) -> dict[str, Strategy]:
    """Return the strategies by name; the Slicer extension starts with the first."""
    dispenser = _Dispenser(leases, volumes or WaitingVolumes(scores))
    ordered = {name: Ordered(name, scores, dispenser, request_scoring) for name in _DESCRIPTIONS}
    return {
        "adaptive": ordered.pop("adaptive"),
        "random": Random(dispenser),
        "first": First(dispenser),
        **ordered,
    }


class _Dispenser:
    """The part of all strategies that leases volumes, or explains why none is available."""

    def __init__(self, leases: Leases, volumes: WaitingVolumes) -> None:
        self.leases = leases
        self.volumes = volumes

    def offer(
        self,
        request: dict[str, Any],
        waiting: Waiting,
        ranked: Iterable[str],
        strategy: str,
        model: str | None = None,
    ) -> dict[str, Any]:
        """Return the ``id`` of a leased volume, or only a ``note``: without an ``id``, clients show no volume."""
        annotator = annotator_of(request)
        address = str(request.get(ADDRESS) or "")
        image = self.leases.claim(annotator, ranked, strategy=strategy, model_version=model, address=address)
        if image is None:
            return {"note": waiting.why_none(self.leases.active())}
        return {"id": image, "strategy_used": strategy}


class Random(Strategy):
    """A random unlabelled volume that no other annotator has leased."""

    def __init__(self, dispenser: _Dispenser) -> None:
        super().__init__("A random volume")
        self.dispenser = dispenser

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any]:
        waiting = self.dispenser.volumes.now(datastore)
        return self.dispenser.offer(request, waiting, _shuffled(waiting.images), "random")


class First(Strategy):
    """The first unlabelled volume by name that no other annotator has leased."""

    def __init__(self, dispenser: _Dispenser) -> None:
        super().__init__("The first volume by name")
        self.dispenser = dispenser

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any]:
        waiting = self.dispenser.volumes.now(datastore)
        return self.dispenser.offer(request, waiting, waiting.images, "first")


class Ordered(Strategy):
    """The next volume of a strategy of ``deformux.active_learning``, in the order that scoring has written.

    Volumes without a score come after all others, in random order, and are scored in the background. The reply names
    the model of the order, with a note if it is not the served model.
    """

    _SECONDS_BETWEEN_REQUESTS = 60.0

    def __init__(
        self, name: str, scores: SelectionScores, dispenser: _Dispenser, request_scoring: Callable[[], object]
    ) -> None:
        super().__init__(_DESCRIPTIONS[name])
        self.name = name
        self.scores = scores
        self.dispenser = dispenser
        self.request_scoring = request_scoring
        self._requested: tuple[str, float] | None = None
        # The last result of ``_order``, with the orders and volumes that it was computed from.
        self._ranked: tuple[Orders, Waiting, list[str], frozenset[str], bool] | None = None

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any]:
        model = self.scores.current()
        orders = self.scores.latest_orders()
        waiting = self.dispenser.volumes.now(datastore, orders)
        order, placed, all_known = self._order(orders, waiting)
        if not all_known or (orders.model != model and waiting.images):
            self._request_scoring(model)

        def ranked() -> Iterator[str]:
            yield from order
            yield from _shuffled([image for image in waiting.images if image not in placed])

        reply = self.dispenser.offer(request, waiting, ranked(), self.name, model=model)
        if "id" not in reply:
            return reply
        reply["uncertainty"] = orders.uncertainty.get(reply["id"])
        reply["scored_with"] = orders.model if reply["id"] in placed else None
        if note := self._note(reply["scored_with"], model):
            reply["note"] = note
            logger.info("%s: %s", self.name, note)
        return reply

    def _order(self, orders: Orders, waiting: Waiting) -> tuple[list[str], frozenset[str], bool]:
        """Return the unlabelled volumes, best first, the same as a set, and whether all have been scored."""
        known = self._ranked
        if known is None or known[0] != orders or known[1] is not waiting:
            listed = orders.by_strategy.get(self.name, orders.by_strategy.get("adaptive", ()))
            order = [image for image in listed if image in waiting.names]
            all_known = not waiting.changed and all(image in orders.uncertainty for image in waiting.images)
            # Requests run in threads, so the tuple is replaced as a whole.
            known = self._ranked = (orders, waiting, order, frozenset(order), all_known)
        return known[2], known[3], known[4]

    def _request_scoring(self, model: str) -> None:
        """Request scoring in the background, but not again soon in case it fails."""
        now = time.monotonic()
        if (
            self._requested is None
            or self._requested[0] != model
            or now - self._requested[1] > self._SECONDS_BETWEEN_REQUESTS
        ):
            self._requested = (model, now)
            self.request_scoring()

    def _note(self, scored_with: str | None, model: str) -> str | None:
        if scored_with is None:
            return "a random volume; scores are being computed"
        if scored_with != model:
            cold = scored_with == UNTRAINED_MODEL
            what = "typical volumes come first" if cold else f"chosen with the scores of {scored_with}"
            return f"{what}, until those of {model} are there"
        if model == UNTRAINED_MODEL and self.name not in ("adaptive", "typicality"):
            return "typical volumes come first, until there is a trained model"
        return None


def _shuffled(images: Sequence[str]) -> Iterator[str]:
    """Yield the images in random order, lazily, because usually only the first is needed."""
    left = list(images)
    while left:
        index = random.randrange(len(left))
        left[index], left[-1] = left[-1], left[index]
        yield left.pop()
