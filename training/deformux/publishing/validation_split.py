"""Permanent assignment of labelled cases to training or validation."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from deformux.data.checked_json import read_kept_twice, write_kept_twice

__all__ = ["MIN_CASES_TO_VALIDATE", "Assignment"]

logger = logging.getLogger(__name__)

MIN_CASES_TO_VALIDATE = 5
"""With fewer labelled cases, all of them train."""

# A fifth of the cases, by their hash.
_VALIDATION_SHARE = 5


class Assignment:
    """Assignment of cases to training or validation, in a file that only grows.

    A case is assigned when it is first seen, and never changes sides: models that trained on it are published, and
    scores on it would flatter them. The first four labelled cases train. From the fifth on, a case validates if the
    hash of its id says so (one in five), or if fewer than a fifth of the labelled cases would validate without it. So
    five or more labelled cases always have both sides.

    Args:
        path: JSON file; written by rename, and kept twice.
        rebuild: returns the sides of cases known from elsewhere, if both copies of the file are lost.
    """

    def __init__(self, path: Path, rebuild: Callable[[], Mapping[str, str]] | None = None) -> None:
        self.path = Path(path)
        self._rebuild = rebuild
        self._lock = FileLock(self.path.with_suffix(".lock"))

    def assign(self, case_ids: Iterable[str]) -> None:
        """Assign a side to every new case among the labelled ones.

        Raises:
            ValueError: both copies are lost and cannot be rebuilt; nothing is assigned then, since another assignment
                would mix the sides.
        """
        # The smaller the hash, the later: the first four train, and of cases that come together the hash decides.
        labelled = sorted(set(case_ids), key=_hash, reverse=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock:
            sides = self._read()
            seen = [case for case in labelled if case in sides]
            validating = sum(sides[case] == "validation" for case in seen)
            new = [case for case in labelled if case not in sides]
            for count, case in enumerate(new, start=len(seen) + 1):
                needed = validating < count // _VALIDATION_SHARE
                validates = count >= MIN_CASES_TO_VALIDATE and (_hash(case) % _VALIDATION_SHARE == 0 or needed)
                sides[case] = "validation" if validates else "training"
                validating += validates
            if new:
                write_kept_twice(self.path, {"cases": sides}, indent=1)

    def may_validate(self, case_ids: Iterable[str]) -> set[str]:
        """Return which of some cases validate, or would by the hash of their ids once they are labelled."""
        sides = self._read()
        by_hash = {case: "validation" for case in case_ids if _hash(case) % _VALIDATION_SHARE == 0}
        return {case for case, side in {**by_hash, **sides}.items() if side == "validation"}

    def validates(self, case_id: str) -> bool:
        """Return whether a case validates; raise KeyError for one that was never assigned."""
        return self._read()[case_id] == "validation"

    def _read(self) -> dict[str, str]:
        sides, fault = read_kept_twice(self.path, _sides)
        if sides is not None:
            if fault:
                logger.warning("Which cases validate: %s", fault)
            return sides
        known = dict(self._rebuild()) if self._rebuild is not None else {}
        if fault is None and not known:
            return {}
        if self._rebuild is None:
            raise ValueError(f"{self.path}: {fault}; restore it from a backup, or begin a new project")
        logger.warning("%s; rebuilt from the models' cards: %d cases", fault or f"{self.path} is missing", len(known))
        return known


def _sides(values: Mapping[str, Any]) -> dict[str, str]:
    sides = dict(values["cases"])
    if not set(sides.values()) <= {"training", "validation"}:
        raise ValueError("a case is neither for training nor for validation")
    return sides


def _hash(case_id: str) -> int:
    return int.from_bytes(hashlib.sha256(case_id.encode()).digest()[:8], "big")
