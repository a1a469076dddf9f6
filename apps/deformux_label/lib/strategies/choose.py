"""Which unlabelled volume comes next. Nothing here computes: a reply comes from orders that lie ready."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.strategy import Strategy

from ..leases import Leases, annotator_of
from ..scoring.selection import UNTRAINED, SelectionScores

__all__ = ["First", "Ordered", "Random", "all_strategies"]

logger = logging.getLogger(__name__)

_DESCRIPTIONS = {
    "adaptive": "Typical volumes before there is a model, then those it is unsure of and that differ",
    "typicality": "The most typical volume of each group that has no label yet",
    "uncertainty": "The volume whose labels the model is least sure of",
    "entropy": "The volume with the highest entropy over all voxels",
    "bald": "The volume on which predictions of the model disagree most",
    "stochastic_batch": "Of random batches of volumes, the one with the highest entropy",
}


def all_strategies(
    scores: SelectionScores, leases: Leases, request_scoring: Callable[[], object]
) -> dict[str, Strategy]:
    """The strategies by name; the first is the one that the Slicer extension starts with."""
    ordered = {name: Ordered(name, scores, leases, request_scoring) for name in _DESCRIPTIONS}
    return {
        "adaptive": ordered.pop("adaptive"),
        "random": Random(leases),
        "first": First(leases),
        **ordered,
    }


class Random(Strategy):
    """A random unlabelled volume that nobody else has."""

    def __init__(self, leases: Leases) -> None:
        super().__init__("A random volume")
        self.leases = leases

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any] | None:
        images = datastore.get_unlabeled_images()
        return _handed_out(self.leases, request, _shuffled(images), "random")


class First(Strategy):
    """The first unlabelled volume by name that nobody else has."""

    def __init__(self, leases: Leases) -> None:
        super().__init__("The first volume by name")
        self.leases = leases

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any] | None:
        return _handed_out(self.leases, request, sorted(datastore.get_unlabeled_images()), "first")


class Ordered(Strategy):
    """The next volume of a strategy of ``deformux.selection``, from the order that scoring left behind.

    Volumes without a score come after all others, at random, and are scored in the background meanwhile. The reply
    says which model's order was used, and why when it is not that of the served model.
    """

    _SECONDS_BETWEEN_REQUESTS = 60.0

    def __init__(
        self, name: str, scores: SelectionScores, leases: Leases, request_scoring: Callable[[], object]
    ) -> None:
        super().__init__(_DESCRIPTIONS[name])
        self.name = name
        self.scores = scores
        self.leases = leases
        self.request_scoring = request_scoring
        self._asked: tuple[str, float] | None = None

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any] | None:
        images = datastore.get_unlabeled_images()
        model = self.scores.current()
        orders = self.scores.latest_orders()
        order = orders.by_strategy.get(self.name, orders.by_strategy.get("adaptive", ()))
        waiting = set(images)
        unknown = [image for image in images if image not in orders.uncertainty]
        if unknown or (orders.model != model and images):
            self._ask(model)

        def ranked() -> Iterator[str]:
            seen = set()
            for image in order:
                if image in waiting:
                    seen.add(image)
                    yield image
            yield from _shuffled([image for image in images if image not in seen])

        reply = _handed_out(self.leases, request, ranked(), self.name, model=model)
        if reply is None:
            return None
        listed = reply["id"] in orders.uncertainty and orders.uncertainty[reply["id"]] is not None
        reply["uncertainty"] = orders.uncertainty[reply["id"]] if listed else None
        reply["scored_with"] = orders.model if reply["id"] in set(order) else None
        if note := self._note(reply["scored_with"], model):
            reply["note"] = note
            logger.info("%s: %s", self.name, note)
        return reply

    def _ask(self, model: str) -> None:
        """Have the volumes scored in the background; not again at once, should that fail."""
        now = time.monotonic()
        if self._asked is None or self._asked[0] != model or now - self._asked[1] > self._SECONDS_BETWEEN_REQUESTS:
            self._asked = (model, now)
            self.request_scoring()

    def _note(self, scored_with: str | None, model: str) -> str | None:
        if scored_with is None:
            return "a random volume; scores are being computed"
        if scored_with != model:
            what = (
                "typical volumes come first" if scored_with == UNTRAINED else f"chosen with the scores of {scored_with}"
            )
            return f"{what}, until those of {model} are there"
        if model == UNTRAINED and self.name not in ("adaptive", "typicality"):
            return "typical volumes come first, until there is a trained model"
        return None


def _handed_out(
    leases: Leases, request: dict[str, Any], ranked: Iterable[str], strategy: str, model: str | None = None
) -> dict[str, Any] | None:
    image = leases.claim(annotator_of(request), ranked, strategy=strategy, model_version=model)
    return None if image is None else {"id": image, "strategy_used": strategy}


def _shuffled(images: Sequence[str]) -> Iterator[str]:
    """The images in random order, made as they are asked for: mostly one of thousands."""
    left = list(images)
    while left:
        index = random.randrange(len(left))
        left[index], left[-1] = left[-1], left[index]
        yield left.pop()
