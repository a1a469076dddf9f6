"""What is known of labels and of models on them, so that nothing is read or computed twice."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from deformux.cases import Case
from deformux.files import write_text
from deformux.inference import evaluate
from deformux.quality import LabelFacts, label_facts
from deformux.transforms import InvalidVolume
from deformux.weights import load_model

__all__ = ["ScoreBook"]

_FACTS, _SCORES = "label_facts.json", "validation_scores.json"


class ScoreBook:
    """Facts about labels by checksum, and Dice by model, case and label checksum, in two files of a folder.

    Args:
        root: the folder.
        labels: names of labels 1..N.
    """

    def __init__(self, root: Path, labels: Sequence[str]) -> None:
        self.root = Path(root)
        self.labels = tuple(labels)

    def facts(self, cases: Sequence[Case], checksums: Mapping[str, str]) -> dict[str, LabelFacts]:
        """What each case's label is like; one that cannot be read has its fault in a sentence."""
        known = self._read(_FACTS)
        facts: dict[str, LabelFacts] = {}
        unreadable: dict[str, LabelFacts] = {}
        for case in cases:
            entry = known.get(checksums[case.id])
            if entry is not None and len(entry["shares"]) == len(self.labels):
                facts[case.id] = LabelFacts(tuple(entry["shares"]), entry["fault"])
                continue
            try:
                facts[case.id] = label_facts(case, self.labels)
            except InvalidVolume as error:
                unreadable[case.id] = LabelFacts((), str(error))
        self._write(_FACTS, {checksums[case]: dataclasses.asdict(fact) for case, fact in facts.items()})
        # One unusable file must not keep all others from being learnt.
        return {**facts, **unreadable}

    def scores(
        self, model: str, path: Path, cases: Sequence[Case], checksums: Mapping[str, str], *, device: str
    ) -> dict[str, list[float]]:
        """Dice of a model file on cases, by label; only cases that are new, or have a new label, are computed."""
        known = self._read(_SCORES).get(model, {})
        scores = {
            case.id: [math.nan if value is None else float(value) for value in known[case.id]["dice"]]
            for case in cases
            if known.get(case.id, {}).get("label") == checksums[case.id]
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

    def remember(
        self,
        model: str,
        scores: Mapping[str, Sequence[float]],
        checksums: Mapping[str, str],
        *,
        keep: Collection[str] | None = None,
    ) -> None:
        """Add a model's Dice on cases; of the other models only those in ``keep`` (None: all) are kept."""
        known = {name: of for name, of in self._read(_SCORES).items() if keep is None or name in keep}
        new = {
            case: {"label": checksums[case], "dice": [None if math.isnan(value) else value for value in dice]}
            for case, dice in scores.items()
        }
        self._write(_SCORES, {**known, model: {**known.get(model, {}), **new}})

    def _read(self, name: str) -> dict[str, Any]:
        try:
            return dict(json.loads((self.root / name).read_text()))
        except (FileNotFoundError, ValueError):
            # Nothing is kept in these files that cannot be computed again.
            return {}

    def _write(self, name: str, values: Mapping[str, Any]) -> None:
        write_text(self.root / name, json.dumps(values))
