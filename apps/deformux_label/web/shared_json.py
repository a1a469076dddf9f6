"""A small JSON file next to the users file, which several servers write."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock

from deformux.data.atomic_files import write_text

__all__ = ["SharedJson"]

logger = logging.getLogger(__name__)

_Parsed = TypeVar("_Parsed")


class SharedJson:
    """A JSON file that only its owner can read; failures are logged, and lose content only at a restart.

    Args:
        path: the file; written by rename, under a lock file next to it.
        unreadable: warning if it cannot be read, with ``%s`` for the path and for the error.
        unwritten: the same if it cannot be written.
    """

    def __init__(self, path: Path, *, unreadable: str, unwritten: str) -> None:
        self.path = path
        self._unreadable = unreadable
        self._unwritten = unwritten

    def read(self, parse: Callable[[Any], _Parsed]) -> _Parsed | None:
        """Return the parsed content; None if the file is missing or damaged."""
        try:
            return parse(json.loads(self.path.read_bytes()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            logger.warning(self._unreadable, self.path, error)
            return None

    def rewrite(self, merged: Callable[[], Any]) -> bool:
        """Write the result of ``merged``, which is called under the lock; return whether writing succeeded."""
        try:
            with FileLock(self.path.with_name(f"{self.path.name}.lock")):
                write_text(self.path, json.dumps(merged()) + "\n", mode=0o600)
        except OSError as error:
            logger.warning(self._unwritten, self.path, error)
            return False
        return True
