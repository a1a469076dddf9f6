"""Cache of facts about labels and of scores of models on them, so that nothing is computed twice."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from deformux.data.cases import Case
from deformux.data.checked_json import read_checked, write_checked
from deformux.data.label_quality import LabelFacts, label_facts
from deformux.data.volume_reader import InvalidVolume
from deformux.inference.evaluate import evaluate
from deformux.networks.model_file import load_model

__all__ = ["ScoreCache"]

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

_FACTS, _SCORES = "label_facts.json", "validation_scores.json"


class ScoreCache:
    """Keeps facts about labels by checksum, and Dice by model, case and label checksum, in two files of a folder.

    Args:
        root: the folder.
        labels: names of labels 1..N.
    """

    def __init__(self, root: Path, labels: Sequence[str]) -> None:
        self.root = Path(root)
        self.labels = tuple(labels)

    def facts(self, cases: Sequence[Case], checksums: Mapping[str, str]) -> dict[str, LabelFacts]:
        """Return facts about each case's label; for a label that cannot be read, a sentence that says why."""
        known = self._read(_FACTS, _facts)
        facts: dict[str, LabelFacts] = {}
        unreadable: dict[str, LabelFacts] = {}
        for case in cases:
            entry = known.get(checksums[case.id])
            if entry is not None and len(entry.shares) == len(self.labels):
                facts[case.id] = entry
                continue
            try:
                facts[case.id] = label_facts(case, self.labels)
            except InvalidVolume as error:
                unreadable[case.id] = LabelFacts((), str(error))
        self._write(_FACTS, {checksums[case]: dataclasses.asdict(fact) for case, fact in facts.items()})
        # One unusable file must not keep the others from training.
        return {**facts, **unreadable}

    def scores(
        self, model: str, path: Path, cases: Sequence[Case], checksums: Mapping[str, str], *, device: str
    ) -> dict[str, list[float]]:
        """Return the Dice of a model file on cases, by label; compute it only for new cases and new labels."""
        known = self._read(_SCORES, _scores).get(model, {})
        scores = {
            case.id: [math.nan if value is None else value for value in known[case.id]["dice"]]
            for case in cases
            if self._holds(known.get(case.id), checksums[case.id])
        }
        missing = [case for case in cases if case.id not in scores]
        if missing:
            network, card = load_model(path, device=device)
            found = evaluate(
                network, missing, card.preprocessing, n_labels=len(self.labels), labels=self.labels, device=device
            )
            self.remember(model, found, checksums)
            scores |= found
        return scores

    def _holds(self, entry: Mapping[str, Any] | None, checksum: str) -> bool:
        return entry is not None and entry["label"] == checksum and len(entry["dice"]) == len(self.labels)

    def remember(
        self,
        model: str,
        scores: Mapping[str, Sequence[float]],
        checksums: Mapping[str, str],
        *,
        keep: Collection[str] | None = None,
    ) -> None:
        """Add a model's Dice on cases; forget the other models, except those in ``keep`` (None: all)."""
        known = {name: of for name, of in self._read(_SCORES, _scores).items() if keep is None or name in keep}
        new = {
            case: {"label": checksums[case], "dice": [None if math.isnan(value) else value for value in dice]}
            for case, dice in scores.items()
        }
        self._write(_SCORES, {**known, model: {**known.get(model, {}), **new}})

    def _read(self, name: str, parse: Callable[[dict[str, Any]], dict[str, _T]]) -> dict[str, _T]:
        try:
            return read_checked(self.root / name, parse)
        except FileNotFoundError:
            return {}
        except ValueError as error:
            # Everything in these files can be computed again.
            logger.warning("%s; its contents are computed again", error)
            return {}

    def _write(self, name: str, values: Mapping[str, Any]) -> None:
        write_checked(self.root / name, values)


def _facts(values: dict[str, Any]) -> dict[str, LabelFacts]:
    return {
        checksum: LabelFacts(tuple(map(float, entry["shares"])), str(entry["fault"]))
        for checksum, entry in values.items()
    }


def _scores(values: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    return {
        model: {
            case: {
                "label": str(entry["label"]),
                "dice": [None if value is None else float(value) for value in entry["dice"]],
            }
            for case, entry in of.items()
        }
        for model, of in values.items()
    }
