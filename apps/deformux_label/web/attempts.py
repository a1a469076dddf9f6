"""Slowing down who guesses passwords, without keeping others waiting."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

__all__ = ["Attempts", "TooManyAttempts"]

# Mistyping is free, then each wait is twice the last one.
_FREE_FOR_NAME, _FREE_FOR_ADDRESS = 3, 10
_FIRST_S, _LONGEST_S = 0.5, 8.0
# Whoever would have to wait longer is sent away, so that nobody fills the server with waiting requests.
_PATIENCE_S = 10.0
_MOST_WAITING = 64
_FORGOTTEN_S = 900.0
_MOST_REMEMBERED = 10_000
# Refusals of an address are told once in so many seconds.
_SILENT_S = 60.0


class TooManyAttempts(Exception):
    """Too many logins failed, or too many wait.

    Args:
        seconds: when to come again.
        news: whether this has not just been told of the same address, so that a flood does not fill the logs.
    """

    def __init__(self, seconds: float, *, news: bool) -> None:
        super().__init__(f"too many logins failed; try again in {max(1, round(seconds))} seconds")
        self.seconds = max(1, round(seconds))
        self.news = news


@dataclass
class _Failed:
    """Attempts of a name or an address that failed or are under way, and when the next may begin."""

    count: int = 0
    free_at: float = 0.0
    last: float = 0.0
    told: float = float("-inf")


class Attempts:
    """Delays that grow with the failures of a user name, and with those of an address. Lives on one event loop.

    Failures from elsewhere do not delay a name at an address where it has logged in before: a stranger cannot lock a
    user out.

    Args:
        clock: seconds from some moment on.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failed: OrderedDict[Hashable, _Failed] = OrderedDict()
        self._at_home: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._waiting = 0

    async def wait(self, name: str, address: str) -> None:
        """Wait until this attempt may be checked; it counts as failed until ``succeeded`` is called.

        Raises:
            TooManyAttempts: it would have to wait too long.
        """
        now = self._clock()
        limits: dict[Hashable, int] = {
            self._key(name, address): _FREE_FOR_NAME,
            ("address", address): _FREE_FOR_ADDRESS,
        }
        entries = {key: self._entry(key, now) for key in limits}
        begin = max(now, *(entry.free_at for entry in entries.values()))
        if begin - now > _PATIENCE_S or self._waiting >= _MOST_WAITING:
            source = entries["address", address]
            news = now - source.told > _SILENT_S
            source.told = now if news else source.told
            raise TooManyAttempts(begin - now, news=news)
        for key, entry in entries.items():
            beyond = entry.count - limits[key]
            entry.count += 1
            entry.last = begin
            if beyond >= 0:
                entry.free_at = begin + min(_LONGEST_S, _FIRST_S * 2 ** min(beyond, 10))
        self._waiting += 1
        try:
            await asyncio.sleep(begin - now)
        finally:
            self._waiting -= 1

    def succeeded(self, name: str, address: str) -> None:
        """Forget the failures of a name; those of the address stay, less this attempt: it may have one good user."""
        self._failed.pop(self._key(name, address), None)
        if (entry := self._failed.get(("address", address))) is not None:
            entry.count = max(0, entry.count - 1)
        self._at_home[name, address] = None
        if len(self._at_home) > _MOST_REMEMBERED:
            self._at_home.popitem(last=False)

    def _key(self, name: str, address: str) -> Hashable:
        return ("home", name, address) if (name, address) in self._at_home else ("name", name)

    def _entry(self, key: Hashable, now: float) -> _Failed:
        entry = self._failed.get(key)
        if entry is None or now - entry.last > _FORGOTTEN_S:
            entry = self._failed[key] = _Failed()
        self._failed.move_to_end(key)
        if len(self._failed) > _MOST_REMEMBERED:
            self._failed.popitem(last=False)
        return entry
