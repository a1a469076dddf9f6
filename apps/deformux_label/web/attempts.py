"""Slowing down password guessing without delaying other users."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from deformux_label.web.at_home import AtHome, place_of

__all__ = ["Attempt", "Attempts", "TooManyAttempts"]

# The first failures are free; then each wait is twice the last one.
_FREE_FOR_NAME, _FREE_FOR_ADDRESS = 3, 10
_FIRST_S, _MAX_S = 0.5, 8.0
# Attempts that would have to wait longer are refused, so that waiting requests cannot fill the server.
_PATIENCE_S = 10.0
# Failures of a name, from anywhere, delay it at new places by at most this: a stranger can make a user wait there, but
# not lock them out.
_MAX_ANYWHERE_S = 2.0
# Concurrent attempts: of a name at an address, of an address, and of all addresses. Users at home do not count in the
# last two.
_MAX_PER_PAIR, _MAX_PER_ADDRESS, _MAX_TOTAL = 16, 32, 1_000
_FORGOTTEN_S = 900.0
_MAX_REMEMBERED = 10_000
# Refusals of an address are logged once in this number of seconds.
_SILENT_S = 60.0


class TooManyAttempts(Exception):
    """Too many logins failed, or too many wait.

    Args:
        seconds: time to wait before the next attempt.
        news: whether to log it: not just logged for the same address, so that a flood does not fill the logs.
    """

    def __init__(self, seconds: float, *, news: bool) -> None:
        super().__init__(f"too many logins failed; try again in {max(1, round(seconds))} seconds")
        self.seconds = max(1, round(seconds))
        self.news = news


@dataclass
class Attempt:
    """One check of a password; it counts as failed unless ``succeeded`` is called.

    Args:
        at_home: whether the user has logged in at this place before.
    """

    at_home: bool
    good: bool = False

    def succeeded(self) -> None:
        """Record that the password was right."""
        self.good = True


@dataclass
class _Failed:
    """Failures of a name, an address or both, and when the next attempt may be checked: one after the other."""

    count: int = 0
    free_at: float = 0.0
    last: float = 0.0
    told: float = float("-inf")
    under_way: int = 0
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    def add(self, free: int, now: float) -> None:
        self.count += 1
        self.last = now
        self.free_at = now + _delay(self.count - free, _MAX_S)


class Attempts:
    """Delays that grow with the failures of a user name at an address, and with those of the address.

    Only failures count. Attempts of one name and address are checked one after the other, so that sending many at once
    does not avoid the delays. A user is at home where they have logged in before; the failures of others at the same
    address do not count for them. Belongs to one event loop.

    Args:
        home: where users have logged in before.
        clock: returns seconds since any fixed moment.
    """

    def __init__(self, home: AtHome | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.home = home or AtHome()
        self._clock = clock
        self._failed: OrderedDict[tuple[str, ...], _Failed] = OrderedDict()
        self._strangers = 0

    @asynccontextmanager
    async def attempt(self, name: str, address: str) -> AsyncIterator[Attempt]:
        """Wait until an attempt may be checked, and check it inside the block.

        Raises:
            TooManyAttempts: it would have to wait too long.
        """
        place = place_of(address)
        attempt = Attempt((name, place) in self.home)
        source = self._entry("address", place)
        known = self._failed.get(("pair", name, place))
        full = known is not None and known.under_way >= _MAX_PER_PAIR
        if not attempt.at_home:
            full |= source.under_way >= _MAX_PER_ADDRESS or self._strangers >= _MAX_TOTAL
        if full:
            # Before the name is remembered: a flood of names must not push out others.
            raise self._refusal(source, source.free_at - self._clock())
        pair, anywhere = self._entry("pair", name, place), self._entry("name", name)
        limits = [(pair, _FREE_FOR_NAME)] if attempt.at_home else [(pair, _FREE_FOR_NAME), (source, _FREE_FOR_ADDRESS)]
        with self._under_way([entry for entry, _ in limits], stranger=not attempt.at_home):
            if not attempt.at_home:
                await asyncio.sleep(_delay(anywhere.count - _FREE_FOR_ADDRESS, _MAX_ANYWHERE_S))
            since = self._clock()
            async with AsyncExitStack() as turns:
                for entry, _ in limits:
                    await turns.enter_async_context(entry.turn)
                    now = self._clock()
                    if entry.free_at > now and entry.free_at - since > _PATIENCE_S:
                        raise self._refusal(source, entry.free_at - now)
                    await asyncio.sleep(max(0.0, entry.free_at - now))
                try:
                    yield attempt
                finally:
                    self._ended(attempt, limits, anywhere)

    def _ended(self, attempt: Attempt, limits: Sequence[tuple[_Failed, int]], anywhere: _Failed) -> None:
        now = self._clock()
        if attempt.good:
            # The failures of the address stay: a guesser may have a login of their own.
            pair, _ = limits[0]
            pair.count, pair.free_at = 0, 0.0
            return
        for entry, free in limits:
            entry.add(free, now)
        if not attempt.at_home:
            anywhere.add(_FREE_FOR_ADDRESS, now)

    def _refusal(self, source: _Failed, seconds: float) -> TooManyAttempts:
        now = self._clock()
        news = now - source.told > _SILENT_S
        source.told = now if news else source.told
        return TooManyAttempts(seconds, news=news)

    @contextmanager
    def _under_way(self, entries: Iterable[_Failed], *, stranger: bool) -> Iterator[None]:
        self._strangers += stranger
        for entry in entries:
            entry.under_way += 1
        try:
            yield
        finally:
            self._strangers -= stranger
            for entry in entries:
                entry.under_way -= 1

    def _entry(self, *key: str) -> _Failed:
        now = self._clock()
        entry = self._failed.get(key)
        if entry is None:
            entry = self._failed[key] = _Failed(last=now)
        elif now - entry.last > _FORGOTTEN_S:
            entry.count, entry.free_at = 0, 0.0
        self._failed.move_to_end(key)
        if len(self._failed) > _MAX_REMEMBERED:
            oldest, known = self._failed.popitem(last=False)
            if known.under_way:
                self._failed[oldest] = known
        return entry


def _delay(beyond: int, longest: float) -> float:
    """Return the seconds to wait after this number of failures beyond the free ones."""
    return min(longest, _FIRST_S * 2 ** min(beyond - 1, 10)) if beyond > 0 else 0.0
