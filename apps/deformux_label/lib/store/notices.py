"""Notices for an operator about the studies: logged once, and shown in ``/info/`` while they apply."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

__all__ = ["Notices", "count_and_first", "printable"]

logger = logging.getLogger(__name__)

_MAX_LISTED = 50


class Notices:
    """Sentences and files, each logged once."""

    def __init__(self) -> None:
        self._logged: set[str] = set()
        self._warnings: OrderedDict[str, None] = OrderedDict()

    def warn(self, sentence: str) -> None:
        """Add a sentence to the log and to ``/info/``, which keeps the latest ones."""
        sentence = printable(sentence)
        if sentence not in self._warnings:
            logger.warning("%s", sentence[:1].upper() + sentence[1:])
        self._warnings[sentence] = None
        while len(self._warnings) > _MAX_LISTED:
            self._warnings.popitem(last=False)

    def warnings(self) -> list[str]:
        """Return the latest sentences."""
        return list(self._warnings)

    def log_new(self, what: str, reasons: Mapping[str, str]) -> None:
        """Log names that were not logged before, with their reasons."""
        new = {name: reason for name, reason in reasons.items() if f"{what} {name} {reason}" not in self._logged}
        self._logged.update(f"{what} {name} {reason}" for name, reason in new.items())
        for name, reason in list(new.items())[:_MAX_LISTED]:
            logger.warning("%s: %s: %s", what, printable(name), printable(reason))
        if len(new) > _MAX_LISTED:
            logger.warning("%s: and %d more; `deformux-label studies` lists them", what, len(new) - _MAX_LISTED)


def count_and_first(reasons: Mapping[str, str]) -> dict[str, Any]:
    """Return the number of files, and the first of them with their reasons, for ``/info/``."""
    first = [{"file": printable(name), "reason": printable(why)} for name, why in sorted(reasons.items())]
    return {"count": len(reasons), "first": first[:_MAX_LISTED]}


def printable(text: str) -> str:
    """Return text as one printable line: file names may hold line breaks, and bytes that are not text."""
    valid = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in valid)
