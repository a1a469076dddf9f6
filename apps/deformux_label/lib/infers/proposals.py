"""Model versions of recent proposals: a submitted label records the model that it started from."""

from __future__ import annotations

import threading

from cachetools import FIFOCache

__all__ = ["Proposals"]


class Proposals:
    """The model versions of the latest proposals, by annotator and image. Thread-safe.

    Args:
        most: most proposals to remember.
    """

    def __init__(self, most: int = 10_000) -> None:
        self._versions: FIFOCache[tuple[str, str], str | None] = FIFOCache(most)
        self._lock = threading.Lock()

    def remember(self, annotator: str, image_id: str, version: str | None) -> None:
        """Record a proposal; ``version`` is None without a model."""
        with self._lock:
            self._versions[annotator, image_id] = version

    def find(self, annotator: str, image_id: str, default: str | None) -> str | None:
        """Return the version of the last proposal, or ``default`` if it is unknown."""
        with self._lock:
            return self._versions.get((annotator, image_id), default)
