"""Connections that hold the server up: too many of one address, requests that never end, replies that nobody reads."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import time
from collections import Counter
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

__all__ = ["watch_connections"]

logger = logging.getLogger(__name__)

# Until a request's headers are complete, counted from the connection, or from the end of the request before.
_MOST_HEADERS_S = 15.0
# Of a reply, without a byte of it taken.
_MOST_STALLED_S = 60.0
_MOST_PER_ADDRESS = 256
_MOST_FILES = 65_536
# Files that the server itself has open.
_OWN_FILES = 512
_SECONDS_BETWEEN = 1.0


class _Watch:
    """The open connections of this process."""

    def __init__(self) -> None:
        self._open: dict[Any, tuple[object, float]] = {}
        self._stalled: dict[Any, tuple[int, float]] = {}
        self._most = _more_files() - _OWN_FILES
        self._running = False

    def made(self, protocol: Any) -> bool:
        """Count a new connection; False where its address has too many."""
        address = _address(protocol)
        count = Counter(_address(other) for other in self._open if not other.transport.is_closing())
        if count[address] >= _MOST_PER_ADDRESS or count.total() >= self._most:
            logger.warning("A connection of %s is refused: %d are open", address, count.total())
            return False
        self._open[protocol] = (None, time.monotonic())
        if not self._running:
            self._running = True
            asyncio.get_running_loop().call_later(_SECONDS_BETWEEN, self._look)
        return True

    def lost(self, protocol: Any) -> None:
        self._open.pop(protocol, None)
        self._stalled.pop(protocol, None)

    def _look(self) -> None:
        now = time.monotonic()
        for protocol in list(self._open):
            if protocol.transport.is_closing() and protocol.transport.get_write_buffer_size() == 0:
                self.lost(protocol)
            elif self._idle_since(protocol, now) < now - _MOST_HEADERS_S or self._stalls(protocol, now):
                logger.warning("A connection of %s is dropped: it is too slow", _address(protocol))
                protocol.transport.abort()
                self.lost(protocol)
        self._running = bool(self._open)
        if self._running:
            asyncio.get_running_loop().call_later(_SECONDS_BETWEEN, self._look)

    def _idle_since(self, protocol: Any, now: float) -> float:
        """When the connection began to wait for the headers of a request; ``now`` while one is answered."""
        cycle = protocol.cycle
        busy = (cycle is not None and not cycle.response_complete) or protocol.transport.get_write_buffer_size() > 0
        last, since = self._open[protocol]
        if busy or last is not cycle:
            self._open[protocol] = (cycle, now)
            return now
        return since

    def _stalls(self, protocol: Any, now: float) -> bool:
        size = protocol.transport.get_write_buffer_size()
        before, since = self._stalled.get(protocol, (0, now))
        if size == 0 or size != before:
            self._stalled[protocol] = (size, now)
            return False
        return since < now - _MOST_STALLED_S


def watch_connections() -> None:
    """Bound the connections of uvicorn's HTTP protocol in this process, and drop those that are too slow.

    uvicorn has no such limits, and MONAI Label starts it with a class of its own choice, before the app is asked:
    so the class itself is told to report its connections.
    """
    watched: Any = AutoHTTPProtocol
    if hasattr(watched, "deformux_watch"):
        return
    watch = _Watch()
    made, lost = watched.connection_made, watched.connection_lost

    def connection_made(self: Any, transport: Any) -> None:
        made(self, transport)
        if not watch.made(self):
            transport.abort()

    def connection_lost(self: Any, error: Exception | None) -> None:
        watch.lost(self)
        lost(self, error)

    watched.connection_made = connection_made
    watched.connection_lost = connection_lost
    watched.deformux_watch = watch


def _address(protocol: Any) -> str:
    return protocol.client[0] if protocol.client else ""


def _more_files() -> int:
    """Raise the number of files that this process may open, of which each connection is one, and return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            return wanted
    return wanted if soft == resource.RLIM_INFINITY else soft
