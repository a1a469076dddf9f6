"""Who is working on which volume: a volume that was handed out is offered to nobody else for a while."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from deformux.files import write_text

__all__ = ["ANONYMOUS", "Lease", "Leases", "annotator_of"]

logger = logging.getLogger(__name__)

ANONYMOUS = "anonymous"


@dataclass(frozen=True)
class Lease:
    """A volume in somebody's hands.

    Args:
        image: id of the volume.
        annotator: who has it.
        since, until: seconds since 1970.
        strategy: the active-learning strategy that chose it.
        model_version: the model that was published then.
    """

    image: str
    annotator: str
    since: float
    until: float
    strategy: str = ""
    model_version: str | None = None


class Leases:
    """Leases in one file, written by rename under a lock: the same after a restart and in every process.

    An annotator who asks again without submitting skips: they get another volume. When no free one is left, their own
    come round again, the one that they have had longest first; another annotator's never do before they expire.

    Args:
        path: the file.
        minutes: how long a lease lasts; 0 switches leases off.
        clock: seconds since 1970.
    """

    def __init__(self, path: Path, *, minutes: float = 60.0, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self.seconds = 60.0 * minutes
        self._clock = clock
        # A file lock by itself would let two threads of this process in: it is re-entrant.
        self._thread_lock = threading.Lock()
        self._file_lock = FileLock(path.with_suffix(".lock"), thread_local=False)
        # What was read or written last, with what tells one version of the file from the next.
        self._seen: tuple[tuple[int, ...], dict[str, Lease]] | None = None

    def claim(
        self, annotator: str, ranked: Iterable[str], *, strategy: str = "", model_version: str | None = None
    ) -> str | None:
        """Lease the first of ``ranked`` (ids, best first) that may be given to this annotator, and return it.

        None where everything in ``ranked`` is in other hands, or nothing is in it.
        """
        if self.seconds <= 0:
            return next(iter(ranked), None)
        with self._changing() as leases:
            own: list[Lease] = []
            chosen = None
            for image in ranked:
                held = leases.get(image)
                if held is None:
                    chosen = image
                    break
                if held.annotator == annotator:
                    own.append(held)
            if chosen is None:
                if not own:
                    return None
                chosen = min(own, key=lambda lease: lease.since).image
            now = self._clock()
            leases[chosen] = Lease(chosen, annotator, now, now + self.seconds, strategy, model_version)
            return chosen

    def release(self, image: str) -> Lease | None:
        """End the lease of a volume and return it; None where there was none."""
        if image not in self._read():
            return None
        with self._changing() as leases:
            return leases.pop(image, None)

    def active(self) -> dict[str, Lease]:
        """The leases that have not expired, by volume."""
        return self._current(self._read())

    def others(self, annotator: str) -> Collection[str]:
        """Volumes that are in other hands than this annotator's."""
        return {image for image, lease in self.active().items() if lease.annotator != annotator}

    @contextmanager
    def _changing(self) -> Iterator[dict[str, Lease]]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._thread_lock, self._file_lock:
            before = self._read()
            leases = self._current(before)
            yield leases
            if leases != before:
                # Without indentation, which would take ten times as long: a lease may be asked for every second.
                text = json.dumps({"leases": [vars(lease) for lease in leases.values()]})
                write_text(self.path, text + "\n")
                self._seen = (self._version(), leases)

    def _version(self) -> tuple[int, ...]:
        """Every change is a new file, by rename."""
        status = self.path.stat()
        return status.st_ino, status.st_mtime_ns, status.st_size

    def _current(self, leases: Mapping[str, Lease]) -> dict[str, Lease]:
        now = self._clock()
        return {image: lease for image, lease in leases.items() if lease.until > now}

    def _read(self) -> Mapping[str, Lease]:
        try:
            version = self._version()
            if self._seen is not None and self._seen[0] == version:
                return self._seen[1]
            listed = json.loads(self.path.read_text())["leases"]
            leases = {item["image"]: Lease(**item) for item in listed}
            self._seen = (version, leases)
            return leases
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError, KeyError) as error:
            # Somebody edited it; without it two annotators may meet once, which is better than no server.
            logger.error("The leases in %s cannot be read and are forgotten: %s", self.path, error)
            return {}


def annotator_of(request: Mapping[str, Any]) -> str:
    """Who asks: the login, which only the server writes under ``user``, else the client id that Slicer sends.

    ``anonymous`` where there is neither.
    """
    for name in (request.get("user"), request.get("client_id")):
        if isinstance(name, str) and name.strip():
            return name.strip()
    return ANONYMOUS
