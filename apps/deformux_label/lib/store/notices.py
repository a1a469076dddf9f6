"""What an operator must know about the studies: in the log once, and in ``/info/`` for as long as it is so."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

__all__ = ["Notices", "listed", "printable"]

logger = logging.getLogger(__name__)

_MOST_LISTED = 50


class Notices:
    """Sentences and files, each told once."""

    def __init__(self) -> None:
        self._told: set[str] = set()
        self._warnings: OrderedDict[str, None] = OrderedDict()

    def warn(self, sentence: str) -> None:
        """Add a sentence to the log and to ``/info/``, which holds the latest ones."""
        sentence = printable(sentence)
        if sentence not in self._warnings:
            logger.warning("%s", sentence[:1].upper() + sentence[1:])
        self._warnings[sentence] = None
        while len(self._warnings) > _MOST_LISTED:
            self._warnings.popitem(last=False)

    def warnings(self) -> list[str]:
        """The latest sentences."""
        return list(self._warnings)

    def tell(self, what: str, reasons: Mapping[str, str]) -> None:
        """Log the names that are new, with their reasons."""
        new = {name: reason for name, reason in reasons.items() if f"{what} {name} {reason}" not in self._told}
        self._told.update(f"{what} {name} {reason}" for name, reason in new.items())
        for name, reason in list(new.items())[:_MOST_LISTED]:
            logger.warning("%s: %s: %s", what, printable(name), printable(reason))
        if len(new) > _MOST_LISTED:
            logger.warning("%s: and %d more; `deformux-label studies` lists them", what, len(new) - _MOST_LISTED)


def listed(reasons: Mapping[str, str]) -> dict[str, Any]:
    """How many files there are, and the first of them with the reasons, for ``/info/``."""
    first = [{"file": printable(name), "reason": printable(why)} for name, why in sorted(reasons.items())]
    return {"count": len(reasons), "first": first[:_MOST_LISTED]}


def printable(text: str) -> str:
    """Text of one line that can be sent: file names may hold line breaks, and bytes that are no text."""
    valid = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in valid)
