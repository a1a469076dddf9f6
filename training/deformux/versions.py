"""Numbered model versions in a folder, one of them published; everything is written by rename."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from deformux.files import write_text
from deformux.weights import ModelCard, read_card, remove_unfinished, save_model

__all__ = ["ModelVersions", "Publication", "VersionInfo"]

_STATE = "publications.json"
_KINDS = ("training", "publish", "rollback", "pin")


@dataclass(frozen=True)
class Publication:
    """That a version became the published one.

    Args:
        version: its name.
        kind: ``training`` (the gate let it through), ``publish``, ``rollback`` or ``pin`` (a person asked for it).
        reason: one sentence.
        by: who asked.
        time: UTC, ISO 8601.
    """

    version: str
    kind: str
    reason: str
    by: str
    time: str

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class VersionInfo:
    """A version as it is listed: its name, its card, and whether it is published, pinned, or ever was published."""

    name: str
    card: ModelCard
    published: bool
    pinned: bool
    ever_published: bool

    def to_json(self) -> dict[str, Any]:
        """Plain values, the card among them."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "card"}
        return values | {"card": json.loads(self.card.to_json())}


@dataclass(frozen=True)
class _State:
    """What ``publications.json`` holds: one file, so that pointer, history and pin never contradict each other."""

    last_number: int = 0
    pinned: str | None = None
    history: tuple[Publication, ...] = field(default=())

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> _State:
        try:
            values = json.loads(path.read_text())
            history = tuple(Publication(**entry) for entry in values["history"])
            return cls(int(values["last_number"]), values["pinned"], history)
        except FileNotFoundError:
            return cls()
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is damaged; move it away and publish a version again") from error


class ModelVersions:
    """Versions ``v0001.safetensors`` and ``v0001.json``, …, and ``publications.json``, which says what is served.

    The published version is the last entry of the history of publications, so that one rename moves the pointer.
    Weights are written after their card and deleted before it: a version exists while its weights do, and what a crash
    leaves behind is never listed and is removed by the next ``write`` or ``prune``. A number is never used twice.

    All methods may be called from several processes at once.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self._state_path = self.root / _STATE
        # One re-entrant lock: publishing is also a part of larger changes.
        self._file_lock = FileLock(self.root / ".lock")

    def names(self) -> list[str]:
        """All versions, oldest first."""
        return sorted(
            (path.stem for path in self._numbered(".safetensors") if path.with_suffix(".json").is_file()), key=_number
        )

    def path(self, name: str) -> Path:
        """The model file of a version; raises ValueError listing the versions where there is none of that name."""
        path = self.root / f"{name}.safetensors"
        if name not in self.names():
            raise ValueError(f"no version {name!r}; there are {', '.join(self.names()) or 'none yet'}")
        return path

    def card(self, name: str) -> ModelCard:
        """The card of a version; raises ValueError where there is none of that name, or its card is damaged."""
        return read_card(self.path(name))

    def infos(self) -> list[VersionInfo]:
        """All versions with their cards, oldest first."""
        state = _State.read(self._state_path)
        ever = {entry.version for entry in state.history}
        current = state.history[-1].version if state.history else None
        return [
            VersionInfo(name, self.card(name), name == current, name == state.pinned, name in ever)
            for name in self.names()
        ]

    def write(self, network: torch.nn.Module, card: ModelCard) -> str:
        """Store a new version and return its name; it is not served before ``publish``."""
        with self._lock():
            self._remove_leftovers()
            state = _State.read(self._state_path)
            number = max([state.last_number, *(_number(name) for name in self.names())]) + 1
            # Counted before it is written: a crash on the way, or deleting the newest version, must not free a name.
            self._write(dataclasses.replace(state, last_number=number))
            name = f"v{number:04d}"
            save_model(self.root / f"{name}.safetensors", network, card)
            return name

    def publish(self, name: str, reason: str = "published by hand", *, by: str = "user") -> None:
        """Serve this version from now on.

        Raises:
            ValueError: there is no such version, or another one is pinned.
        """
        self._publish(name, "publish", reason, by)

    def publish_trained(self, name: str, reason: str) -> bool:
        """Serve what a training made, unless a version is pinned; returns whether it is served."""
        with self._lock():
            if _State.read(self._state_path).pinned is not None:
                return False
            self._publish(name, "training", reason, "training")
            return True

    def published(self) -> str | None:
        """The version that is served, or None before the first; raises ValueError where its files are gone."""
        history = _State.read(self._state_path).history
        return self.path(history[-1].version).stem if history else None

    def rollback(self, reason: str = "rolled back", *, by: str = "user") -> str:
        """Serve what was published before the present version, and return its name; again goes further back.

        Raises:
            ValueError: nothing was published before, or a version is pinned.
        """
        with self._lock():
            *before, present = _stack(_State.read(self._state_path).history) or ["now"]
            names = set(self.names())
            target = next((name for name in reversed(before) if name in names), None)
            if target is None:
                raise ValueError(f"nothing was published before {present}; there is nothing to roll back to")
            self._publish(target, "rollback", reason, by)
            return target

    def pin(self, name: str | None = None, reason: str = "pinned", *, by: str = "user") -> str:
        """Serve this version (None: the published one) until ``unpin``, whatever trainings give; returns its name."""
        with self._lock():
            pinned = name or self.published()
            if pinned is None:
                raise ValueError("nothing is published yet; name the version to pin")
            state = _State.read(self._state_path)
            self._write(dataclasses.replace(self._with(state, pinned, "pin", reason, by), pinned=pinned))
            return pinned

    def unpin(self) -> None:
        """Let trainings publish again."""
        with self._lock():
            self._write(dataclasses.replace(_State.read(self._state_path), pinned=None))

    def pinned(self) -> str | None:
        """The pinned version, or None."""
        return _State.read(self._state_path).pinned

    def history(self) -> list[Publication]:
        """Every publication, oldest first; the last one is in force."""
        return [*_State.read(self._state_path).history]

    def prune(self, keep: int = 5) -> list[str]:
        """Delete all but the last ``keep`` versions and those that were ever published; returns what is gone."""
        if keep < 1:
            raise ValueError(f"keep must be at least 1 version; got {keep}")
        with self._lock():
            self._remove_leftovers()
            state = _State.read(self._state_path)
            names = self.names()
            kept = {*names[-keep:], *(entry.version for entry in state.history), state.pinned}
            gone = [name for name in names if name not in kept]
            for name in gone:
                (self.root / f"{name}.safetensors").unlink()
                (self.root / f"{name}.json").unlink()
            return gone

    def _publish(self, name: str, kind: str, reason: str, by: str) -> None:
        with self._lock():
            state = _State.read(self._state_path)
            if state.pinned not in (None, name):
                raise ValueError(f"version {state.pinned} is pinned; unpin it before publishing {name}")
            self._write(self._with(state, name, kind, reason, by))

    def _with(self, state: _State, name: str, kind: str, reason: str, by: str) -> _State:
        assert kind in _KINDS
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        entry = Publication(self.path(name).stem, kind, reason, by, now)
        return dataclasses.replace(state, history=(*state.history, entry))

    def _write(self, state: _State) -> None:
        write_text(self._state_path, state.to_json())

    def _lock(self) -> FileLock:
        self.root.mkdir(parents=True, exist_ok=True)
        return self._file_lock

    def _numbered(self, suffix: str) -> Iterable[Path]:
        return (path for path in self.root.glob(f"v*{suffix}") if re.fullmatch(r"v\d+", path.stem))

    def _remove_leftovers(self) -> None:
        """Only under the lock, under which nothing is being written."""
        remove_unfinished(self.root)
        for card in self._numbered(".json"):
            if not card.with_suffix(".safetensors").exists():
                card.unlink(missing_ok=True)


def _number(name: str) -> int:
    return int(name[1:])


def _stack(history: tuple[Publication, ...]) -> list[str]:
    """What is published, above what it replaced; a rollback takes back what lay above its target."""
    stack: list[str] = []
    for entry in history:
        if entry.kind == "rollback" and entry.version in stack:
            while stack[-1] != entry.version:
                stack.pop()
        elif not stack or stack[-1] != entry.version:
            stack.append(entry.version)
    return stack
