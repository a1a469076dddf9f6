"""A temporary folder for each request that needs one, removed when the request ends or fails."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

__all__ = ["request_folder", "requests_folder"]

# A list that the request shares with its threads; empty until the folder is needed.
_folders: ContextVar[list[Path] | None] = ContextVar("folders", default=None)


@contextmanager
def requests_folder() -> Iterator[None]:
    """Remove the folder of the request at the end of the block."""
    made: list[Path] = []
    token = _folders.set(made)
    try:
        yield
    finally:
        _folders.reset(token)
        for folder in made:
            shutil.rmtree(folder, ignore_errors=True)


def request_folder() -> Path | None:
    """Return the folder of this request, made at the first call; None outside of requests."""
    made = _folders.get()
    if made is None:
        return None
    if not made:
        made.append(Path(tempfile.mkdtemp(prefix="request-")))
    return made[0]
