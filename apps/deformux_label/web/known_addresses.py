"""Addresses from which users have logged in before: guesses from elsewhere do not delay logins there."""

from __future__ import annotations

import ipaddress
import threading
from collections import OrderedDict
from pathlib import Path

from deformux_label.web.shared_json import SharedJson

__all__ = ["KnownAddresses", "network_of"]

# One user must not push out the addresses of others.
_MAX_PER_USER = 20
_MAX_PAIRS = 10_000


def network_of(address: str) -> str:
    """Return an address itself, or for IPv6 its /64 network, which may belong to one machine."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((parsed, 64), strict=False))


class KnownAddresses:
    """Pairs of a user's name and a network from which they have logged in.

    Args:
        path: file that keeps the pairs across restarts, readable only by its owner; None to keep them in memory.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._file: SharedJson | None = None
        if path is not None:
            self._file = SharedJson(
                path,
                unreadable="Cannot read the addresses of earlier logins from %s, so none are known: %s",
                unwritten="Cannot write %s, so the addresses of logins are known only until this server ends: %s",
            )
        self._pairs: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._lock = threading.Lock()
        self._read()

    def __contains__(self, pair: tuple[str, str]) -> bool:
        return pair in self._pairs

    def add(self, name: str, network: str) -> None:
        """Remember a network of a user; write the file only if the pair is new."""
        with self._lock:
            if (name, network) in self._pairs:
                self._pairs.move_to_end((name, network))
                return

            def merged() -> list[tuple[str, str]]:
                # Another server with the same users file may have added some.
                self._read()
                self._remember(name, network)
                return list(self._pairs)

            if self._file is None or not self._file.rewrite(merged):
                self._remember(name, network)

    def _remember(self, name: str, network: str) -> None:
        self._pairs[name, network] = None
        of_user = [pair for pair in self._pairs if pair[0] == name]
        for pair in of_user[:-_MAX_PER_USER]:
            del self._pairs[pair]
        while len(self._pairs) > _MAX_PAIRS:
            self._pairs.popitem(last=False)

    def _read(self) -> None:
        if self._file is None:
            return
        found = self._file.read(lambda listed: [(str(name), str(network)) for name, network in listed])
        for name, network in (found or [])[-_MAX_PAIRS:]:
            if (name, network) not in self._pairs:
                self._remember(name, network)
