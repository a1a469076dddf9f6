"""What a training is doing, in a file: it runs in a process of its own, and the server answers for it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from deformux.files import write_text

__all__ = ["TrainingStatus"]


class TrainingStatus:
    """Reads and writes ``training.json``, in the form that MONAI Label's clients expect of ``stats()``.

    The Slicer extension divides ``epoch`` by ``total_epochs``, takes a truthy ``total_time`` as the end, and fails on a
    ``best_metric`` that is not a number.
    """

    _SECONDS_BETWEEN_WRITES = 0.5

    def __init__(self, path: Path) -> None:
        self.path = path
        self._values: dict[str, Any] = {}
        self._written = 0.0

    def start(self, **values: Any) -> None:
        """A new training, with nothing done yet."""
        process = psutil.Process()
        self._values = {
            "status": "running",
            "epoch": 0,
            "total_epochs": 1,
            "total_time": 0,
            "best_metric": 0.0,
            "process": [process.pid, process.create_time()],
        }
        self.update(now=True, **values)

    def update(self, *, now: bool = False, **values: Any) -> None:
        """Set some values; written at most twice a second unless ``now``."""
        self._values |= values
        if now or time.monotonic() - self._written > self._SECONDS_BETWEEN_WRITES:
            write_text(self.path, json.dumps(self._values, allow_nan=False))
            self._written = time.monotonic()

    def read(self) -> dict[str, Any]:
        """The last training, or nothing before the first; one whose process is gone has stopped."""
        try:
            values = json.loads(self.path.read_text())
        except (FileNotFoundError, ValueError):
            return {}
        if values["status"] == "running" and not _alive(values["process"]):
            values |= {
                "status": "stopped",
                "error": "the training was stopped before it finished; no model was published, and the next one on the "
                "same labels goes on from the last checkpoint",
            }
        return _public(values)


def _public(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != "process"}


def _alive(process: tuple[int, float]) -> bool:
    pid, created = process
    if pid == os.getpid():
        return True
    try:
        found = psutil.Process(pid)
        # Numbers of processes are used again.
        return found.create_time() == created and found.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
