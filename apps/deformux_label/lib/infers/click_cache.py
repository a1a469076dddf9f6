"""A cache of scans and editors between clicks, so that the next click is fast.

It never changes a result: without it, as after a restart of the server, the same request gets the same result, only
later.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cachetools import TLRUCache

from deformux.data.sequences import ScanFiles

if TYPE_CHECKING:
    from deformux.interactive.editor import Editor
    from deformux.interactive.open_scan import OpenScan
    from deformux_label.lib.infers.served_network import ServedNetwork

__all__ = ["ClickCache", "ClientEditor", "ScanKey"]


@dataclass(frozen=True)
class ScanKey:
    """Key of a scan: one state of an image file, and of those of other sequences, one model version, one device."""

    path: str
    modified_ns: int
    size: int
    version: str
    device: str
    others: tuple[tuple[str, int, int], ...] = ()

    @classmethod
    def of(cls, files: ScanFiles, version: str, device: str) -> ScanKey:
        """Return the key of a scan's files in their current state."""
        paths = [Path(files)] if isinstance(files, str | Path) else [path for path in files if path.is_file()]
        states = [(path.resolve(), path.stat()) for path in paths]
        first, *others = [(str(path), state.st_mtime_ns, state.st_size) for path, state in states]
        return cls(*first, version, device, tuple(others))


@dataclass(frozen=True)
class ClientEditor:
    """An editor and its network."""

    editor: Editor
    network: ServedNetwork

    @property
    def nbytes(self) -> int:
        """Return the bytes that the editor holds in addition to its scan and the model."""
        return self.editor.nbytes


@dataclass
class _Editing:
    """A client's editor for one starting mask, which ``mask`` identifies."""

    editor: ClientEditor
    mask: str
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def nbytes(self) -> int:
        return self.editor.nbytes


class _Held(TLRUCache[Any, Any]):
    """Scans by their key, and editors by the key of their scan and a client; no editor outlives its scan."""

    def __init__(self, most_bytes: int, idle_s: float, clock: Callable[[], float]) -> None:
        super().__init__(
            most_bytes, ttu=lambda _key, _value, now: now + idle_s, timer=clock, getsizeof=lambda value: value.nbytes
        )
        self.evictions = 0

    def popitem(self) -> tuple[Any, Any]:
        self.evictions += 1
        return super().popitem()

    def __delitem__(self, key: Any) -> None:
        super().__delitem__(key)
        for editor in [other for other in self if isinstance(other, tuple) and other[0] == key]:
            with suppress(KeyError):  # it has just expired
                super().__delitem__(editor)

    def scans(self) -> list[ScanKey]:
        """Return the keys of all scans."""
        return [key for key in self if isinstance(key, ScanKey)]

    def use(self, key: Any) -> None:
        """Mark an item as used now."""
        self[key] = self[key]


class ClickCache:
    """Scans, and on top of each the editors of its clients; the least recently used are dropped first.

    Thread-safe. A scan that two requests need is computed once; other requests do not wait for it.

    Args:
        most_bytes: limit of the memory; an item that exceeds it is used once and not cached.
        idle_s: seconds after which an unused item is dropped.
        clock: returns seconds since any fixed moment.
    """

    def __init__(
        self, most_bytes: int, *, idle_s: float = 1_800.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.most_bytes = most_bytes
        self.idle_s = idle_s
        self._held = _Held(most_bytes, idle_s, clock)
        self._lock = threading.Lock()
        self._opening: dict[ScanKey, tuple[threading.Lock, int]] = {}
        self._timer: threading.Timer | None = None

    def state(self) -> dict[str, Any]:
        """Return sizes and counts for the operator."""
        with self._lock:
            volumes = len(self._held.scans())
            return {
                "bytes": int(self._held.currsize),
                "most_bytes": self.most_bytes,
                "volumes": volumes,
                "editors": len(self._held) - volumes,
                "evictions": self._held.evictions,
            }

    def peek(self, key: ScanKey) -> OpenScan | None:
        """Return a cached scan, or None."""
        with self._lock:
            if key not in self._held:
                return None
            self._held.use(key)
            return self._held[key]

    def fits(self, nbytes: int) -> bool:
        """Return whether an item of this size can be cached."""
        return nbytes <= self.most_bytes

    def put(self, key: ScanKey, scan: OpenScan) -> None:
        """Cache a scan; drop those of earlier states of its file, and of other model versions."""
        with self._lock:
            if key in self._held or scan.nbytes > self.most_bytes:
                return
            for other in self._held.scans():
                if other.path == key.path and other.device == key.device:
                    del self._held[other]
            self._held[key] = scan
            self._watch()

    def scan(self, key: ScanKey, compute: Callable[[], OpenScan]) -> OpenScan:
        """Return the cached scan, or the result of ``compute``; simultaneous requests for it wait."""
        with self._one_at_a_time(key):
            held = self.peek(key)
            if held is not None:
                return held
            scan = compute()
        self.put(key, scan)
        return scan

    @contextmanager
    def editor(self, key: ScanKey, client: str, mask: str, make: Callable[[], ClientEditor]) -> Iterator[ClientEditor]:
        """Lend the client's editor for this starting mask to one thread; ``make`` creates it if none is cached."""
        with self._lock:
            editing: _Editing | None = self._held.get((key, client))
        if editing is None or editing.mask != mask:
            editing = _Editing(make(), mask)
        with editing.lock:
            try:
                yield editing.editor
            finally:
                self._used(key, client, editing)

    def forget_other_versions(self, version: str | None) -> None:
        """Drop the scans of other versions of the model."""
        with self._lock:
            for key in self._held.scans():
                if key.version != version:
                    del self._held[key]

    def expire(self) -> None:
        """Drop items that were not used for ``idle_s``."""
        with self._lock:
            self._held.expire()

    def _used(self, key: ScanKey, client: str, editing: _Editing) -> None:
        with self._lock:
            if key not in self._held:
                return
            self._held.use(key)
            self._held.pop((key, client), None)
            if self._held[key].nbytes + editing.nbytes <= self.most_bytes:
                self._held[key, client] = editing
                # An editor is dropped before its scan.
                self._held.use(key)

    @contextmanager
    def _one_at_a_time(self, key: ScanKey) -> Iterator[None]:
        with self._lock:
            lock, users = self._opening.get(key, (threading.Lock(), 0))
            self._opening[key] = (lock, users + 1)
        try:
            with lock:
                yield
        finally:
            with self._lock:
                _, users = self._opening[key]
                if users == 1:
                    del self._opening[key]
                else:
                    self._opening[key] = (lock, users - 1)

    def _watch(self) -> None:
        """Start the timer that drops expired items even without requests."""
        if self._timer is None and len(self._held):
            self._timer = threading.Timer(self.idle_s, self._drop_expired)
            self._timer.daemon = True
            self._timer.start()

    def _drop_expired(self) -> None:
        self.expire()
        with self._lock:
            self._timer = None
            self._watch()
