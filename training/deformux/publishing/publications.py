"""Record of the versions of a model that were published."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

__all__ = ["KINDS", "REBUILT", "Publication", "PublicationRecord", "published_stack", "versions_to_keep"]

KINDS = ("training", "publish", "rollback", "pin")
REBUILT = "rebuilt"
_NAME = re.compile(r"v\d+")


@dataclass(frozen=True)
class Publication:
    """Publication of a version.

    Args:
        version: its name.
        kind: ``training`` (the gate let it through), ``publish``, ``rollback`` or ``pin`` (a person asked for it), or
            ``rebuilt`` (the history was lost, and this version is the newest that may be served).
        reason: one sentence.
        by: user who asked for it.
        time: UTC, ISO 8601.
    """

    version: str
    kind: str
    reason: str
    by: str
    time: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class PublicationRecord:
    """Contents of ``publications.json``: one file, so that pointer, history and pin never contradict each other.

    ``fault`` says what was wrong with the file, and ``lost`` whether its copy was lost too; neither is written.
    """

    last_number: int = 0
    pinned: str | None = None
    history: tuple[Publication, ...] = ()
    fault: str | None = None
    lost: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return what the file holds."""
        values = dataclasses.asdict(self)
        return {name: values[name] for name in ("last_number", "pinned", "history")}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PublicationRecord:
        """Invert ``to_dict``; raise ValueError, TypeError or KeyError if the values are not a record."""
        history = tuple(Publication(**entry) for entry in values["history"])
        state = cls(int(values["last_number"]), values["pinned"], history)
        for name in (state.pinned, *(entry.version for entry in history)):
            if name is not None and not _NAME.fullmatch(name):
                raise ValueError(f"{name!r} is not the name of a version")
        return state


def versions_to_keep(record: PublicationRecord, n_latest: int) -> set[str]:
    """Return the versions that were published last, the target of a rollback, and all that were ever pinned."""
    latest = list(dict.fromkeys(entry.version for entry in reversed(record.history)))[:n_latest]
    pinned = [entry.version for entry in record.history if entry.kind == "pin"]
    return {*latest, *published_stack(record.history)[-2:], *pinned}


def published_stack(history: tuple[Publication, ...]) -> list[str]:
    """Return the published version on top of those it replaced; a rollback removes all above its target."""
    stack: list[str] = []
    for entry in history:
        if entry.kind == "rollback" and entry.version in stack:
            while stack[-1] != entry.version:
                stack.pop()
        elif not stack or stack[-1] != entry.version:
            stack.append(entry.version)
    return stack
