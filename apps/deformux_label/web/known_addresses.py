"""Places where users have logged in before: there, a stranger's guesses do not lock them out."""

from __future__ import annotations

import ipaddress
import threading
from collections import OrderedDict
from pathlib import Path

from deformux_label.web.shared_json import SharedJson

__all__ = ["AtHome", "place_of"]

# Of one user, who could otherwise make the server forget the places of others.
_MAX_NAME_LENGTH = 20
_MAX_PLACES = 10_000


def place_of(address: str) -> str:
    """Return the place of an address: itself, or for IPv6 its network of 64 bits, which one machine may own."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((parsed, 64), strict=False))


class AtHome:
    """Pairs of a user's name and a place where their password was right.

    Args:
        path: file that keeps them over restarts, readable by its owner alone; None for memory only.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._file: SharedJson | None = None
        if path is not None:
            self._file = SharedJson(
                path,
                unreadable="Where users logged in before cannot be read, and is not known: %s: %s",
                unwritten="Where users log in is known until this server ends only: %s: %s",
            )
        self._places: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._lock = threading.Lock()
        self._read()

    def __contains__(self, pair: tuple[str, str]) -> bool:
        return pair in self._places

    def add(self, name: str, place: str) -> None:
        """Remember a place of a user; write the file only if the place is new."""
        with self._lock:
            if (name, place) in self._places:
                self._places.move_to_end((name, place))
                return

            def merged() -> list[tuple[str, str]]:
                # Another server of these users may have added some.
                self._read()
                self._remember(name, place)
                return list(self._places)

            if self._file is None or not self._file.rewrite(merged):
                self._remember(name, place)

    def _remember(self, name: str, place: str) -> None:
        self._places[name, place] = None
        of_name = [pair for pair in self._places if pair[0] == name]
        for pair in of_name[:-_MAX_NAME_LENGTH]:
            del self._places[pair]
        while len(self._places) > _MAX_PLACES:
            self._places.popitem(last=False)

    def _read(self) -> None:
        if self._file is None:
            return
        found = self._file.read(lambda listed: [(str(name), str(place)) for name, place in listed])
        for name, place in (found or [])[-_MAX_PLACES:]:
            if (name, place) not in self._places:
                self._remember(name, place)
