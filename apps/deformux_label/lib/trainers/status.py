"""The status file of a training: the training's process writes it, the server reads it."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
from fastapi import HTTPException

from deformux.data.atomic_files import write_text
from deformux_label.lib.background.task_process import alive
from deformux_label.lib.requests.identifiers import refuse_invalid_text

__all__ = ["TrainingStatus"]

logger = logging.getLogger(__name__)

_MAX_BYTES = 1_000_000


class TrainingStatus:
    """The file ``training.json``, in the format that MONAI Label's clients expect from ``stats()``.

    The Slicer extension divides ``epoch`` by ``total_epochs``, takes a truthy ``total_time`` as the end, and fails on a
    ``best_metric`` that is not a number.
    """

    _SECONDS_BETWEEN_WRITES = 0.5

    def __init__(self, path: Path) -> None:
        self.path = path
        self._values: dict[str, Any] = {}
        self._written = 0.0

    def start(self, **values: Any) -> None:
        """Begin the status of a new training."""
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
        """Set some values; write them at most twice a second, unless ``now``."""
        self._values |= values
        if now or time.monotonic() - self._written > self._SECONDS_BETWEEN_WRITES:
            write_text(self.path, json.dumps(self._values, allow_nan=False))
            self._written = time.monotonic()

    def read(self) -> dict[str, Any]:
        """Return the status of the last training, empty before the first; it is stopped if its process is gone."""
        try:
            values = _checked(self.path.read_bytes())
        except FileNotFoundError:
            return {}
        except (ValueError, OSError, RecursionError) as error:
            # It only informs clients; the versions and the queue do not depend on it.
            logger.warning("%s is damaged, and counts as empty until the next training: %s", self.path, error)
            return {}
        if values["status"] == "running" and not _alive(values["process"]):
            values |= {
                "status": "stopped",
                "error": "the training was stopped before it finished; no model was published, and the next one on the "
                "same labels resumes from the last checkpoint",
            }
        return _public(values)


def _checked(content: bytes) -> dict[str, Any]:
    """Return the values of a file, checked because clients compute with them.

    Raises:
        ValueError: the file is damaged.
    """
    if len(content) > _MAX_BYTES:
        raise ValueError(f"it has {len(content)} bytes")
    values = json.loads(content, parse_constant=_no_constant)
    if not isinstance(values, dict) or not isinstance(values.get("status"), str):
        raise ValueError("it has no status")
    try:
        refuse_invalid_text(values, name="it")
    except HTTPException as error:
        raise ValueError(error.detail) from error
    for name in ("epoch", "total_epochs", "total_time", "best_metric"):
        if isinstance(values.get(name), bool) or not isinstance(values.get(name), int | float):
            raise ValueError(f"its {name} is not a number")
    if values["total_epochs"] <= 0 or not 0 <= values["epoch"] <= values["total_epochs"]:
        raise ValueError("its epochs are invalid")
    process = values.get("process")
    if not isinstance(process, list) or [type(part) for part in process] not in ([int, float], [int, int]):
        raise ValueError("its process is invalid")
    return values


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _public(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != "process"}


def _alive(process: list[Any]) -> bool:
    return process[0] == os.getpid() or alive(process) is not None
