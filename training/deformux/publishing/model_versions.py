"""Numbered model versions in a folder, one of them published; everything is written by rename."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from deformux.data.checked_json import read_kept_twice, write_kept_twice
from deformux.inference.locate import Locator
from deformux.inference.locator_file import locator_path, save_locator
from deformux.networks.model_file import (
    InvalidModel,
    ModelCard,
    check_weights,
    read_card,
    remove_unfinished,
    save_model,
)
from deformux.publishing.publications import (
    KINDS,
    REBUILT,
    Publication,
    PublicationRecord,
    published_stack,
    versions_to_keep,
)

__all__ = ["ModelVersions", "Publication", "VersionInfo"]

_STATE = "publications.json"
# How far a rollback reaches.
_KEEP_PUBLISHED = 10


@dataclass(frozen=True)
class VersionInfo:
    """A version in a list: its name, its card, and whether it is published, pinned, or ever was published."""

    name: str
    card: ModelCard
    published: bool
    pinned: bool
    ever_published: bool

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, the card among them."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "card"}
        return values | {"card": json.loads(self.card.to_json())}


class ModelVersions:
    """Versions ``v0001.safetensors`` and ``v0001.json``, …, and ``publications.json``, which says which is served.

    The published version is the last entry of the history of publications, so that one rename moves the pointer. If
    its files are damaged or gone, the version published before it is served instead. The history is kept twice; where
    both copies are lost, the newest version that the gate did not refuse counts as published. ``warnings`` reports it.

    Weights are written after their card and deleted before it: a version exists while its weights do. Leftovers of a
    crash are never listed, and the next ``write`` or ``prune`` removes them. A number is never used twice.

    All methods may be called from several processes at once.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self._state_path = self.root / _STATE
        # One re-entrant lock: publishing is also a part of larger changes.
        self._file_lock = FileLock(self.root / ".lock")
        self._faults: dict[str, tuple[object, str | None]] = {}

    def names(self) -> list[str]:
        """Return all versions, oldest first."""
        return sorted(
            (path.stem for path in self._numbered(".safetensors") if path.with_suffix(".json").is_file()), key=_number
        )

    def path(self, name: str) -> Path:
        """Return the model file of a version; raise ValueError with all versions if there is none of that name."""
        path = self.root / f"{name}.safetensors"
        if name not in self.names():
            raise ValueError(f"no version {name!r}; there are {', '.join(self.names()) or 'none yet'}")
        return path

    def card(self, name: str) -> ModelCard:
        """Return the card of a version; raise ValueError if there is no such version, or its card is damaged."""
        return read_card(self.path(name))

    def infos(self) -> list[VersionInfo]:
        """Return all versions whose card can be read, oldest first; the others are ``damaged``."""
        state = self._state()
        ever = {entry.version for entry in state.history}
        current = self._served(state)[0]
        infos = []
        for name in self.names():
            try:
                card = read_card(self.root / f"{name}.safetensors")
            except InvalidModel:
                continue
            infos.append(VersionInfo(name, card, name == current, name == state.pinned, name in ever))
        return infos

    def info(self, name: str) -> VersionInfo:
        """Return one version of ``infos``; raise ValueError if there is none of that name, or it is damaged."""
        path = self.path(name)
        found = next((info for info in self.infos() if info.name == name), None)
        if found is None:
            raise ValueError(self.fault(path.stem) or f"version {name} was deleted")
        return found

    def damaged(self, *, quick: bool = False) -> dict[str, str]:
        """Return every version that cannot be served, oldest first, and why: one sentence without folders.

        With ``quick`` no weights are read, and only damage to them that was found before is reported.
        """
        kept = versions_to_keep(self._state(), _KEEP_PUBLISHED)
        cards = {path.stem for path in self._numbered(".json")}
        weights = {path.stem for path in self._numbered(".safetensors")}
        # Any other card without weights belongs to a version that is being written or deleted.
        faults = {name: self.fault(name, quick=quick) for name in sorted(weights | (cards & kept), key=_number)}
        return {name: fault for name, fault in faults.items() if fault}

    def fault(self, name: str, *, quick: bool = False) -> str | None:
        """Return why a version cannot be served, in one sentence without folders; None if it can.

        Its weights are read once, and again when their file has changed; with ``quick`` not at all.
        """
        path = self.root / f"{name}.safetensors"
        signature = _signature(path), _signature(path.with_suffix(".json"))
        known = self._faults.get(name)
        if known is not None and known[0] == signature:
            return known[1]
        fault = self._look_for_fault(name, path, quick=quick)
        if not quick:
            self._faults[name] = signature, fault
        return fault

    def distrust(self, name: str, fault: str) -> None:
        """Stop serving a version in this process, for a fault that showed in its use, until its files change."""
        path = self.root / f"{name}.safetensors"
        signature = _signature(path), _signature(path.with_suffix(".json"))
        self._faults[name] = signature, self._without_folder(fault)

    def _look_for_fault(self, name: str, path: Path, *, quick: bool) -> str | None:
        if not path.exists():
            return f"the weights of {name}, {path.name}, are missing"
        try:
            card = read_card(path)
            if not quick:
                check_weights(path, card)
        except InvalidModel as error:
            return self._without_folder(str(error))
        return None

    def _without_folder(self, text: str) -> str:
        return text.replace(f"{self.root}{os.sep}", "")

    def warnings(self) -> list[str]:
        """Return what is wrong with the served version, or with the record; empty while all is well."""
        state = self._state()
        warning = self._served(state)[1]
        return [text for text in (state.fault, warning) if text]

    def doubt(self) -> str | None:
        """Return why a version other than the published one may be served; None if it is the published one."""
        state = self._state()
        return self._served(state)[1] or (state.fault if state.lost else None)

    def write(self, network: torch.nn.Module, card: ModelCard, *, locator: Locator | None = None) -> str:
        """Write a new version, with its locator if it has one, and return its name; ``publish`` serves it."""
        with self._lock():
            self._remove_leftovers()
            state = self._state()
            number = max([state.last_number, *(_number(name) for name in self.names())]) + 1
            # Counted before it is written: a crash on the way, or deleting the newest version, must not free a name.
            self._write(dataclasses.replace(state, last_number=number))
            name = f"v{number:04d}"
            path = self.root / f"{name}.safetensors"
            save_model(path, network, card if locator is None else save_locator(path, locator, card))
            return name

    def publish(self, name: str, reason: str = "published by hand", *, by: str = "user") -> None:
        """Serve this version from now on.

        Raises:
            ValueError: there is no such version, or a different one is pinned.
        """
        self._publish(name, "publish", reason, by)

    def publish_trained(self, name: str, reason: str) -> bool:
        """Serve a trained version, unless one is pinned; return whether it is served."""
        with self._lock():
            if self._state().pinned is not None:
                return False
            self._publish(name, "training", reason, "training")
            return True

    def published(self) -> str | None:
        """Return the version to serve: the one published last, or if that is damaged the one before it, or None.

        ``warnings`` says when it is not the one published last.
        """
        return self._served(self._state())[0]

    def intended(self) -> str | None:
        """Return the version that was published last, whether it can be served or not; None before the first."""
        history = self._state().history
        return history[-1].version if history else None

    def _served(self, state: PublicationRecord) -> tuple[str | None, str | None]:
        """Return the version to serve, and a sentence if that is not the published one."""
        stack = published_stack(state.history)
        if not stack:
            return None, None
        fault = self.fault(stack[-1])
        if fault is None:
            return stack[-1], None
        sound = next((name for name in reversed(stack[:-1]) if self.fault(name) is None), None)
        instead = f"{sound}, published before it, is served instead" if sound else "no version before it can be served"
        return sound, f"version {stack[-1]} is published but cannot be served: {fault}; {instead}"

    def rollback(self, reason: str = "rolled back", *, by: str = "user") -> str:
        """Serve the version published before the present one, and return its name; a second call goes further back.

        Raises:
            ValueError: nothing was published before, or a version is pinned.
        """
        with self._lock():
            *before, present = published_stack(self._state().history) or ["now"]
            target = next((name for name in reversed(before) if self.fault(name) is None), None)
            if target is None:
                raise ValueError(f"nothing was published before {present}; there is nothing to roll back to")
            self._publish(target, "rollback", reason, by)
            return target

    def pin(self, name: str | None = None, reason: str = "pinned", *, by: str = "user") -> str:
        """Serve this version (None: the published one) until ``unpin``, whatever is trained; return its name."""
        with self._lock():
            pinned = name or self.published()
            if pinned is None:
                raise ValueError("nothing is published yet; name the version to pin")
            state = self._state()
            self._write(dataclasses.replace(self._with(state, pinned, "pin", reason, by), pinned=pinned))
            return pinned

    def unpin(self) -> None:
        """Allow trainings to publish again."""
        with self._lock():
            self._write(dataclasses.replace(self._state(), pinned=None))

    def pinned(self) -> str | None:
        """Return the pinned version, or None."""
        return self._state().pinned

    def history(self) -> list[Publication]:
        """Return every publication, oldest first; the last one is in force."""
        return [*self._state().history]

    def prune(self, keep: int = 5, *, keep_published: int = _KEEP_PUBLISHED) -> list[str]:
        """Delete old versions, and return their names.

        Kept are: the last ``keep`` versions; the last ``keep_published`` that were published, which is how far a
        rollback reaches (ten of preset ``base`` take 2.2 GB); every version that was ever pinned, since a person chose
        it; and for each of these the best model before it, with which the gate compares.
        """
        if keep < 1 or keep_published < 1:
            raise ValueError(f"at least 1 version must be kept of each kind; got {keep} and {keep_published} published")
        with self._lock():
            self._remove_leftovers()
            state = self._state()
            names = self.names()
            kept = {*names[-keep:], *versions_to_keep(state, keep_published), self._served(state)[0]}
            kept |= {info.card.gate.get("champion") for info in self.infos() if info.name in kept}
            gone = [name for name in names if name not in kept]
            for name in gone:
                (self.root / f"{name}.safetensors").unlink()
                (self.root / f"{name}.json").unlink()
                locator_path(self.root / f"{name}.safetensors").unlink(missing_ok=True)
            return gone

    def _publish(self, name: str, kind: str, reason: str, by: str) -> None:
        with self._lock():
            state = self._state()
            if state.pinned not in (None, name):
                raise ValueError(f"version {state.pinned} is pinned; unpin it before publishing {name}")
            self._write(self._with(state, name, kind, reason, by))

    def _with(self, state: PublicationRecord, name: str, kind: str, reason: str, by: str) -> PublicationRecord:
        assert kind in KINDS
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        if fault := self.fault(self.path(name).stem):
            raise ValueError(f"{name} cannot be published: {fault}")
        entry = Publication(name, kind, reason, by, now)
        return dataclasses.replace(state, history=(*state.history, entry))

    def _write(self, state: PublicationRecord) -> None:
        write_kept_twice(self._state_path, state.to_dict(), indent=1)

    def _state(self) -> PublicationRecord:
        """Return the record of publications, or one made from the cards if it is lost."""
        state, fault = read_kept_twice(self._state_path, PublicationRecord.from_dict)
        if state is not None:
            return dataclasses.replace(state, fault=fault)
        names = self.names()
        if fault is None and not names:
            return PublicationRecord()
        newest = next((name for name in reversed(names) if self._may_be_served(name)), None)
        said = f"{newest}, the newest version that can be, is served" if newest else "no version is served"
        reason = f"{fault or f'{_STATE} is missing'}, so it is no longer known which version was published; {said}"
        # Every call returns the same: nothing is written until a version is published.
        history = (Publication(newest, REBUILT, reason, "server", self.card(newest).created),) if newest else ()
        return PublicationRecord(_number(names[-1]) if names else 0, None, history, reason, True)

    def _may_be_served(self, name: str) -> bool:
        return self.fault(name) is None and self.card(name).gate.get("publish") is not False

    def _lock(self) -> FileLock:
        self.root.mkdir(parents=True, exist_ok=True)
        return self._file_lock

    def _numbered(self, suffix: str) -> Iterable[Path]:
        return (path for path in self.root.glob(f"v*{suffix}") if re.fullmatch(r"v\d+", path.stem))

    def _remove_leftovers(self) -> None:
        """Delete what crashes left; only under the lock, where nothing is being written."""
        remove_unfinished(self.root)
        # A version to keep that lost its weights keeps its card: they may come back from a backup.
        kept = versions_to_keep(self._state(), _KEEP_PUBLISHED)
        for card in self._numbered(".json"):
            if card.stem not in kept and not card.with_suffix(".safetensors").exists():
                card.unlink(missing_ok=True)
        for locator in self.root.glob("v*.locator.safetensors"):
            name = locator.name.partition(".")[0]
            if name not in kept and not (self.root / f"{name}.safetensors").exists():
                locator.unlink(missing_ok=True)


def _signature(path: Path) -> tuple[int, int, int] | None:
    """Return a value that changes with the file, or None if there is no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _number(name: str) -> int:
    return int(name[1:])
