"""What is kept in memory between the clicks of a session, so that the next one is answered fast.

Nothing here decides what an answer is: without it, as after a restart of the server, the same request has the same
answer, only later.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deformux.interactive.editor import Editor
    from deformux.interactive.open_scan import OpenScan
    from deformux_label.lib.infers.served_network import ServedNetwork

__all__ = ["ClientEditor", "Sessions", "StudyKey"]


@dataclass(frozen=True)
class StudyKey:
    """One state of an image file, as one version of the model sees it on one device."""

    path: str
    modified_ns: int
    size: int
    version: str
    device: str

    @classmethod
    def of(cls, path: str | Path, version: str, device: str) -> StudyKey:
        """The key of a file as it is now."""
        real = Path(path).resolve()
        state = real.stat()
        return cls(str(real), state.st_mtime_ns, state.st_size, version, device)


@dataclass(frozen=True)
class ClientEditor:
    """An editor, and the network that it calls."""

    editor: Editor
    network: ServedNetwork

    @property
    def nbytes(self) -> int:
        """Bytes that it holds beside its study and the model."""
        return self.editor.nbytes


@dataclass
class _Editing:
    """A client's editor: for one starting mask, which ``mask`` identifies."""

    editor: ClientEditor
    mask: str
    used: float
    nbytes: int
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass
class _Open:
    study: OpenScan
    nbytes: int
    used: float
    editing: dict[str, _Editing] = field(default_factory=dict)


class Sessions:
    """Studies, and on top of each the editors of its clients, least recently used out first.

    All methods may be called from any thread. Nothing is computed while others wait, except for what they wait for:
    a study that two requests need is computed once.

    Args:
        most_bytes: bound of what is held; what does not fit by itself is used once and not held.
        idle_s: seconds after which what nobody used is dropped.
        clock: seconds from some moment on.
    """

    def __init__(
        self, most_bytes: int, *, idle_s: float = 1_800.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.most_bytes = most_bytes
        self.idle_s = idle_s
        self.evictions = 0
        self._clock = clock
        self._open: dict[StudyKey, _Open] = {}
        self._lock = threading.Lock()
        self._opening: dict[StudyKey, tuple[threading.Lock, int]] = {}
        self._timer: threading.Timer | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        with self._lock:
            return self._nbytes()

    def state(self) -> dict[str, Any]:
        """What is held, for whoever runs the server."""
        with self._lock:
            return {
                "bytes": self._nbytes(),
                "most_bytes": self.most_bytes,
                "volumes": len(self._open),
                "editors": sum(len(opened.editing) for opened in self._open.values()),
                "evictions": self.evictions,
            }

    def peek(self, key: StudyKey) -> OpenScan | None:
        """A study that is held, or None."""
        with self._lock:
            opened = self._open.get(key)
            if opened is None:
                return None
            opened.used = self._clock()
            return opened.study

    def fits(self, nbytes: int) -> bool:
        """Whether something of so many bytes could be held."""
        return nbytes <= self.most_bytes

    def put(self, key: StudyKey, study: OpenScan) -> None:
        """Hold a study; those of earlier states of its file, or of other versions, go."""
        with self._lock:
            if key in self._open or study.nbytes > self.most_bytes:
                return
            for other in [k for k in self._open if k.path == key.path and k.device == key.device]:
                del self._open[other]
            self._open[key] = _Open(study, study.nbytes, self._clock())
            self._shrink()
            self._watch()

    def study(self, key: StudyKey, compute: Callable[[], OpenScan]) -> OpenScan:
        """The study that is held, or what ``compute`` makes; others who want the same one meanwhile wait for it."""
        with self._one_at_a_time(key):
            held = self.peek(key)
            if held is not None:
                return held
            study = compute()
        self.put(key, study)
        return study

    @contextmanager
    def editor(self, key: StudyKey, client: str, mask: str, make: Callable[[], ClientEditor]) -> Iterator[ClientEditor]:
        """The client's editor for this starting mask, for one thread; ``make`` makes it where none is held."""
        with self._lock:
            opened = self._open.get(key)
            editing = opened.editing.get(client) if opened is not None else None
        if editing is None or editing.mask != mask:
            editor = make()
            editing = _Editing(editor, mask, self._clock(), editor.nbytes)
        with editing.lock:
            try:
                yield editing.editor
            finally:
                self._used(key, client, editing)

    def forget_other_versions(self, version: str | None) -> None:
        """Drop what other versions of the model made."""
        with self._lock:
            for key in [key for key in self._open if key.version != version]:
                del self._open[key]

    def expire(self) -> None:
        """Drop what nobody used for ``idle_s``."""
        with self._lock:
            end = self._clock() - self.idle_s
            for key, opened in list(self._open.items()):
                for client in [c for c, editing in opened.editing.items() if editing.used <= end]:
                    del opened.editing[client]
                if opened.used <= end:
                    del self._open[key]

    def _used(self, key: StudyKey, client: str, editing: _Editing) -> None:
        with self._lock:
            opened = self._open.get(key)
            if opened is None:
                return
            opened.used = editing.used = self._clock()
            editing.nbytes = editing.editor.nbytes
            opened.editing.pop(client, None)
            if opened.nbytes + editing.nbytes <= self.most_bytes:
                opened.editing[client] = editing
                self._shrink()

    def _nbytes(self) -> int:
        return sum(o.nbytes + sum(e.nbytes for e in o.editing.values()) for o in self._open.values())

    def _shrink(self) -> None:
        excess = self._nbytes() - self.most_bytes
        # An editor is not used later than its study, so it goes before it.
        while excess > 0 and self._open:
            self.evictions += 1
            key, opened = min(self._open.items(), key=lambda item: item[1].used)
            editors = [(e.used, k, client) for k, o in self._open.items() for client, e in o.editing.items()]
            used, of, client = min(editors, default=(float("inf"), key, ""), key=lambda item: item[0])
            if used <= opened.used:
                excess -= self._open[of].editing.pop(client).nbytes
            else:
                del self._open[key]
                excess -= opened.nbytes + sum(e.nbytes for e in opened.editing.values())

    @contextmanager
    def _one_at_a_time(self, key: StudyKey) -> Iterator[None]:
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
        """Look for what has expired even if no request comes."""
        if self._timer is None and self._open:
            self._timer = threading.Timer(self.idle_s, self._look)
            self._timer.daemon = True
            self._timer.start()

    def _look(self) -> None:
        self.expire()
        with self._lock:
            self._timer = None
            self._watch()
