"""A watcher of the studies folder, for files that are added or removed by hand."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from typing import Any

from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer
from watchdog.observers.polling import PollingObserver

from deformux_label.lib.store.volumes import LABEL_SUFFIXES, split_suffix

__all__ = ["StudiesWatcher"]

logger = logging.getLogger(__name__)

_PAUSE_S = 0.3


class StudiesWatcher(FileSystemEventHandler):
    """Calls ``refresh`` shortly after volumes or labels changed, and ``reload`` when the index was replaced.

    Args:
        folder, index: the studies, and the path of their index.
        is_unknown_change: whether the index does not know yet that a path was ``created``, ``modified`` or ``deleted``.
        refresh, reload: called from a thread of the watcher.
    """

    def __init__(
        self,
        folder: str,
        index: str,
        *,
        is_unknown_change: Callable[[str, str], bool],
        refresh: Callable[[], None],
        reload: Callable[[], None],
    ) -> None:
        self._folder, self._index = folder, index
        self._is_unknown_change, self._refresh, self._reload = is_unknown_change, refresh, reload
        self._soon: threading.Timer | None = None
        self._lock = threading.Lock()

    def start(self) -> None:
        """Start watching; a mounted file system may not report changes, so it is polled."""
        observer: Any = PollingObserver() if _is_on_mount(self._folder) else Observer()
        try:
            observer.schedule(self, path=self._folder, recursive=True)
            observer.start()
        except OSError as error:
            logger.error("The studies cannot be watched, so files copied in by hand are not noticed: %s", error)

    def dispatch(self, event: FileSystemEvent) -> None:
        """Handle one event; only volumes, labels, folders and the index matter."""
        kind = event.event_type
        if kind == "moved":
            self._handle("deleted", os.fsdecode(event.src_path), event.is_directory)
            self._handle("created", os.fsdecode(event.dest_path), event.is_directory)
        elif kind in ("created", "deleted", "modified"):
            self._handle(kind, os.fsdecode(event.src_path), event.is_directory)

    def _handle(self, kind: str, path: str, is_folder: bool) -> None:
        if path == self._index:
            if kind == "deleted":
                self._refresh_soon()
            else:
                self._reload()
            return
        parts = os.path.relpath(path, self._folder).split(os.sep)
        if any(part.startswith(".") for part in parts):
            return
        if is_folder:
            # A folder that is moved here causes no events for its files.
            if kind != "modified":
                self._refresh_soon()
        elif split_suffix(parts[-1], LABEL_SUFFIXES) and self._is_unknown_change(kind, path):
            self._refresh_soon()

    def _refresh_soon(self) -> None:
        """Refresh once for files that are copied at about the same time: each refresh lists the whole folder."""
        with self._lock:
            if self._soon is None:
                self._soon = threading.Timer(_PAUSE_S, self._now)
                self._soon.daemon = True
                self._soon.start()

    def _now(self) -> None:
        with self._lock:
            self._soon = None
        self._refresh()


def _is_on_mount(path: str) -> bool:
    while path != os.path.dirname(path):
        if os.path.ismount(path):
            return True
        path = os.path.dirname(path)
    return False
