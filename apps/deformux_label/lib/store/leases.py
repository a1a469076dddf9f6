"""Leases of volumes: no other annotator is offered a volume until its lease ends."""

from __future__ import annotations

import json
import logging
import math
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deformux_label.lib.requests.identifiers import checked_text, is_image_id, is_text
from deformux_label.lib.store.state import StateDatabase, put_aside

__all__ = ["MAX_LEASES", "Lease", "Leases"]

logger = logging.getLogger(__name__)

MAX_LEASES = 50
"""Most leases that an annotator, or an address, may hold at a time."""
_MAX_NAME_LENGTH = 200


@dataclass(frozen=True)
class Lease:
    """A volume that an annotator is working on.

    Args:
        image: id of the volume.
        annotator: the holder.
        since, until: seconds since 1970.
        strategy: the active-learning strategy that chose it.
        model_version: the model that was published at that time.
    """

    image: str
    annotator: str
    since: float
    until: float
    strategy: str = ""
    model_version: str | None = None


class Leases:
    """Leases in the project's database, one row each: the same after a restart and in every process.

    An annotator who asks again without submitting gets a different volume. If no volume is free, or they hold ``most``
    leases, they get one of their own again, oldest first. They never get a different annotator's volume before its
    lease expires, with one exception: at an address that holds ``most`` leases, under any names, an annotator without a
    lease takes over the oldest.

    Args:
        path: file with the leases of earlier versions, imported once; the database is in the same folder.
        minutes: duration of a lease; 0 switches leases off.
        most: most leases of an annotator or an address.
        clock: seconds since 1970.
    """

    def __init__(
        self, path: Path, *, minutes: float = 60.0, most: int = MAX_LEASES, clock: Callable[[], float] = time.time
    ) -> None:
        self.path = path
        self.seconds = 60.0 * minutes
        self.most = most
        self._clock = clock
        self.state = StateDatabase(path.parent, on_open=self._opened)
        self._lock = threading.Lock()
        # The leases in the database, with the connection and its count of other connections' changes.
        self._known: tuple[sqlite3.Connection, int, _Held] | None = None

    def claim(
        self,
        annotator: str,
        ranked: Iterable[str],
        *,
        strategy: str = "",
        model_version: str | None = None,
        address: str = "",
    ) -> str | None:
        """Lease the first volume of ``ranked`` (ids, best first) that this annotator may have, and return its id.

        Return None if others hold all of ``ranked``, or if it is empty. The leases of an ``address`` are counted
        together; without an address, only the annotator's are.

        Raises:
            HTTPException: 400 for a name that is not text.
        """
        checked_text("client_id", annotator, _MAX_NAME_LENGTH)
        if self.seconds <= 0:
            return next(iter(ranked), None)
        address = address if is_text(address, _MAX_NAME_LENGTH) else "unknown"

        def give(db: sqlite3.Connection) -> str | None:
            held, now = self._held(db), self._clock()
            if expired := held.expired(now):
                db.execute("DELETE FROM leases WHERE until <= ?", (now,))
                for image in expired:
                    held.drop(image)
            chosen = _choose(held, annotator, address, ranked, self.most)
            if chosen is not None:
                lease = Lease(chosen, annotator, now, now + self.seconds, strategy, model_version)
                held.put(lease, address)
                _insert(db, lease, address)
            return chosen

        return self._change(give)

    def release(self, image: str, *, check: Callable[[Lease], None] | None = None) -> Lease | None:
        """End the lease of a volume and return it, or None if the volume is not leased.

        ``check`` gets the lease, and raises if it must not end.
        """
        if image not in self.active():
            return None

        def end(db: sqlite3.Connection) -> Lease | None:
            held = self._held(db)
            if check is not None and image in held.leases:
                check(held.leases[image])
            lease = held.drop(image)
            db.execute("DELETE FROM leases WHERE image = ?", (image,))
            return lease

        return self._change(end)

    def active(self) -> dict[str, Lease]:
        """Return the leases that have not expired, by volume."""
        now = self._clock()
        with self._lock:
            held = self.state.read(self._held)
            return {image: lease for image, lease in held.leases.items() if lease.until > now}

    def others(self, annotator: str) -> Collection[str]:
        """Return the volumes that other annotators hold."""
        return {image for image, lease in self.active().items() if lease.annotator != annotator}

    def warnings(self) -> list[str]:
        """Return one sentence for each problem that an operator should know about."""
        return self.state.warnings()

    def _change(self, do: Callable[[sqlite3.Connection], Any]) -> Any:
        with self._lock:
            try:
                return self.state.change(do)
            except BaseException:
                # The leases in memory may be ahead of those on disk.
                self._known = None
                raise

    def _held(self, db: sqlite3.Connection) -> _Held:
        """Return all leases; read them again only after a different connection has changed them."""
        version = db.execute("PRAGMA data_version").fetchone()[0]
        if self._known is not None and self._known[:2] == (db, version):
            return self._known[2]
        held, bad = _Held(), []
        columns = "image, annotator, since, until, strategy, model_version, address"
        for *values, address in db.execute(f"SELECT {columns} FROM leases"):
            lease = Lease(*values)
            if reason := _fault(lease):
                bad.append((lease, reason))
            else:
                held.put(lease, str(address))
        if bad and db.in_transaction:
            for lease, reason in bad:
                self.state.set_aside(db, "leases", vars(lease), reason)
                raw = lease.image.encode(errors="surrogateescape") if isinstance(lease.image, str) else lease.image
                db.execute("DELETE FROM leases WHERE CAST(image AS BLOB) = ?", (raw,))
        self._known = (db, version, held)
        return held

    def _opened(self, db: sqlite3.Connection) -> Callable[[], None] | None:
        after = self._import_file(db)
        self._held(db)
        return after

    def _import_file(self, db: sqlite3.Connection) -> Callable[[], None] | None:
        """Import the file of earlier versions, and keep it under a different name."""
        try:
            listed = json.loads(self.path.read_text())["leases"]
            records = list(listed)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError, OSError) as error:
            # Without them two annotators may get the same volume once; that is better than no server.
            reason = str(error)
            return lambda: self.state.warn(
                f"the leases of an earlier version cannot be read ({reason}) and are forgotten; they are kept as "
                f"{put_aside(self.path)}"
            )
        for record in records:
            try:
                lease = Lease(**record)
                reason = _fault(lease)
            except TypeError as error:
                reason = str(error)
            if reason:
                self.state.set_aside(db, "leases", record, reason)
            else:
                _insert(db, lease, "")
        return lambda: os.replace(self.path, self.path.with_name(f"{self.path.name}.taken-over"))


class _Held:
    """Leases by volume, and by annotator and address."""

    def __init__(self) -> None:
        self.leases: dict[str, Lease] = {}
        self._first_end = math.inf
        self._addresses: dict[str, str] = {}
        self._of: dict[tuple[str, str], dict[str, None]] = {}

    def put(self, lease: Lease, address: str) -> None:
        self.drop(lease.image)
        self.leases[lease.image] = lease
        self._first_end = min(self._first_end, lease.until)
        self._addresses[lease.image] = address
        for holder in self._holders(lease, address):
            self._of.setdefault(holder, {})[lease.image] = None

    def drop(self, image: str) -> Lease | None:
        lease = self.leases.pop(image, None)
        if lease is not None:
            for holder in self._holders(lease, self._addresses.pop(image)):
                del self._of[holder][image]
                if not self._of[holder]:
                    del self._of[holder]
        return lease

    def of(self, kind: str, name: str) -> Collection[str]:
        """Return the volumes of an ``annotator`` or an ``address``."""
        return self._of.get((kind, name), {})

    def expired(self, now: float) -> list[str]:
        """Return the volumes with expired leases; search them only if one may have expired."""
        if now < self._first_end:
            return []
        self._first_end = min((lease.until for lease in self.leases.values() if lease.until > now), default=math.inf)
        return [image for image, lease in self.leases.items() if lease.until <= now]

    @staticmethod
    def _holders(lease: Lease, address: str) -> list[tuple[str, str]]:
        return [("annotator", lease.annotator), *([("address", address)] if address else [])]


def _choose(held: _Held, annotator: str, address: str, ranked: Iterable[str], most: int) -> str | None:
    own = held.of("annotator", annotator)
    of_address = held.of("address", address) if address else ()
    seen = set()
    full = len(own) >= most or len(of_address) >= most
    for image in ranked:
        if not full and image not in held.leases:
            return image
        seen.add(image)
    candidates = seen.intersection(own)
    if not candidates and len(of_address) >= most:
        candidates = seen.intersection(of_address)
    return min(candidates, key=lambda image: held.leases[image].since, default=None)


def _insert(db: sqlite3.Connection, lease: Lease, address: str) -> None:
    values = (lease.image, lease.annotator, address, lease.since, lease.until, lease.strategy, lease.model_version)
    db.execute("INSERT OR REPLACE INTO leases VALUES (?, ?, ?, ?, ?, ?, ?)", values)


def _fault(lease: Lease) -> str:
    """Return what is wrong with a stored lease; empty if it is valid."""
    if not is_image_id(lease.image):
        return "its image is not an image id"
    if not is_text(lease.annotator, _MAX_NAME_LENGTH) or not is_text(lease.strategy):
        return "its annotator or strategy is not text"
    if lease.model_version is not None and not is_text(lease.model_version):
        return "its model version is not text"
    times = (lease.since, lease.until)
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in times):
        return "its times are not numbers"
    return ""
