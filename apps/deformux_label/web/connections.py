"""Limits on connections: their number per address, slow requests, and replies that are not read."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import time
from asyncio import sslproto
from collections import Counter
from collections.abc import Iterable
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

__all__ = ["watch_connections"]

logger = logging.getLogger(__name__)

# Longest wait for complete request headers, from the connection or the end of the last request; also for a TLS
# handshake.
_MAX_HEADERS_S = 15.0
# Longest time in which a client accepts no byte of a reply.
_MAX_STALLED_S = 60.0
_MAX_PER_ADDRESS = 256
_MAX_FILES = 65_536
# Files that the server itself opens.
_OWN_FILES = 512
_CHECK_INTERVAL_S = 1.0
# A flood of connections must not fill the log.
_WARNING_INTERVAL_S = 10.0


class _Watch:
    """The open connections of this process."""

    def __init__(self) -> None:
        self._open: dict[Any, tuple[object, float]] = {}
        self._stalled: dict[Any, tuple[int, float]] = {}
        # Addresses of TLS connections: the HTTP protocol sees a connection only after its handshake.
        self._below: dict[Any, str] = {}
        self._most = _raise_open_file_limit() - _OWN_FILES
        self._running = False
        self._last_warning = float("-inf")

    def made(self, protocol: Any) -> bool:
        """Count a new connection; return False if its address has too many."""
        address = _address(protocol)
        if self._too_many(address, (_address(other) for other in self._open if not other.transport.is_closing())):
            return False
        self._open[protocol] = (None, time.monotonic())
        if not self._running:
            self._running = True
            asyncio.get_running_loop().call_later(_CHECK_INTERVAL_S, self._drop_slow)
        return True

    def made_below(self, protocol: Any, transport: asyncio.BaseTransport) -> bool:
        """Count a new connection that begins with a TLS handshake; return False if its address has too many."""
        peer = transport.get_extra_info("peername")
        address = str(peer[0]) if isinstance(peer, tuple) else ""
        if self._too_many(address, self._below.values()):
            return False
        self._below[protocol] = address
        return True

    def lost_below(self, protocol: Any) -> None:
        self._below.pop(protocol, None)

    def _too_many(self, address: str, others: Iterable[str]) -> bool:
        count = Counter(others)
        if count[address] < _MAX_PER_ADDRESS and count.total() < self._most:
            return False
        now = time.monotonic()
        if now - self._last_warning > _WARNING_INTERVAL_S:
            logger.warning("Refusing connections from %s and possibly others: %d are open", address, count.total())
            self._last_warning = now
        return True

    def lost(self, protocol: Any) -> None:
        self._open.pop(protocol, None)
        self._stalled.pop(protocol, None)

    def _drop_slow(self) -> None:
        now = time.monotonic()
        for protocol in list(self._open):
            if protocol.transport.is_closing() and protocol.transport.get_write_buffer_size() == 0:
                self.lost(protocol)
            elif self._idle_since(protocol, now) < now - _MAX_HEADERS_S or self._stalls(protocol, now):
                logger.warning("Dropped a connection from %s: too slow", _address(protocol))
                protocol.transport.abort()
                self.lost(protocol)
        self._running = bool(self._open)
        if self._running:
            asyncio.get_running_loop().call_later(_CHECK_INTERVAL_S, self._drop_slow)

    def _idle_since(self, protocol: Any, now: float) -> float:
        """Return the time since which a connection has waited for request headers; ``now`` during a reply."""
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
        return since < now - _MAX_STALLED_S


def watch_connections() -> None:
    """Limit the connections of uvicorn's HTTP protocol in this process, and drop slow ones.

    uvicorn has no such limits. MONAI Label chooses the protocol class before it loads the app, so the class itself is
    patched to report its connections.
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
    _watch_handshakes(watch)


def _watch_handshakes(watch: _Watch) -> None:
    """Limit the number of TLS connections to the server, and the duration of their handshakes."""
    below: Any = sslproto.SSLProtocol
    made, lost = below.connection_made, below.connection_lost

    def connection_made(self: Any, transport: asyncio.Transport) -> None:
        if not self._server_side:
            made(self, transport)
            return
        self._ssl_handshake_timeout = min(self._ssl_handshake_timeout, _MAX_HEADERS_S)
        made(self, transport)
        if not watch.made_below(self, transport):
            transport.abort()

    def connection_lost(self: Any, error: Exception | None) -> None:
        watch.lost_below(self)
        lost(self, error)

    below.connection_made = connection_made
    below.connection_lost = connection_lost


def _address(protocol: Any) -> str:
    return protocol.client[0] if protocol.client else ""


def _raise_open_file_limit() -> int:
    """Raise this process's limit of open files, which include connections, and return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            return wanted
    return wanted if soft == resource.RLIM_INFINITY else soft
