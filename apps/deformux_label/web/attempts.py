"""Delays that slow down password guessing but not other users."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from deformux_label.web.known_addresses import KnownAddresses, network_of

__all__ = ["Attempt", "Attempts", "TooManyAttempts"]

# The first failures cost no delay; after them, each delay is twice the last.
_FREE_FOR_NAME, _FREE_FOR_ADDRESS = 3, 10
_FIRST_S, _MAX_S = 0.5, 8.0
# Attempts that would have to wait longer are refused, so that waiting requests cannot fill the server.
_PATIENCE_S = 10.0
# Most that failures from anywhere delay a name at a new address: a guesser can make a user wait there, but not lock
# them out.
_MAX_ANYWHERE_S = 2.0
# Most concurrent attempts: of a name at an address, from an address, and in total. Attempts from known addresses do not
# count in the last two.
_MAX_PER_PAIR, _MAX_PER_ADDRESS, _MAX_TOTAL = 16, 32, 1_000
_FORGOTTEN_S = 900.0
_MAX_REMEMBERED = 10_000
# Refusals of an address are logged at most this often.
_LOG_INTERVAL_S = 60.0


class TooManyAttempts(Exception):
    """Too many logins have failed or are waiting.

    Args:
        seconds: time to wait before the next attempt.
        should_log: False if a refusal of the same address was logged recently, so that a flood does not fill the logs.
    """

    def __init__(self, seconds: float, *, should_log: bool) -> None:
        super().__init__(f"too many logins failed; try again in {max(1, round(seconds))} seconds")
        self.seconds = max(1, round(seconds))
        self.should_log = should_log


@dataclass
class Attempt:
    """One check of a password; it counts as failed unless ``succeeded`` is called.

    Args:
        from_known_address: whether the user has logged in from this address before.
    """

    from_known_address: bool
    good: bool = False

    def succeeded(self) -> None:
        """Record that the password was correct."""
        self.good = True


@dataclass
class _Failed:
    """Failures of a name, an address or both, and the time of the next check; attempts are checked one at a time."""

    count: int = 0
    free_at: float = 0.0
    last: float = 0.0
    last_logged: float = float("-inf")
    under_way: int = 0
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    def add(self, free: int, now: float) -> None:
        self.count += 1
        self.last = now
        self.free_at = now + _delay(self.count - free, _MAX_S)


class Attempts:
    """Delays that grow with the failures of a user name at an address, and with those of the address.

    Only failures count. Attempts for one name and address are checked one at a time, so that sending many at once does
    not avoid the delays. At an address from which a user has logged in before, failures of other names do not delay
    them. Use it from one event loop only.

    Args:
        known_addresses: addresses from which users have logged in before.
        clock: returns seconds since any fixed moment.
    """

    def __init__(
        self, known_addresses: KnownAddresses | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.known_addresses = known_addresses or KnownAddresses()
        self._clock = clock
        self._failed: OrderedDict[tuple[str, ...], _Failed] = OrderedDict()
        self._from_unknown = 0

    @asynccontextmanager
    async def attempt(self, name: str, address: str) -> AsyncIterator[Attempt]:
        """Wait until an attempt may be checked; the caller checks it inside the block.

        Raises:
            TooManyAttempts: it would have to wait too long.
        """
        network = network_of(address)
        attempt = Attempt((name, network) in self.known_addresses)
        source = self._entry("address", network)
        known = self._failed.get(("pair", name, network))
        full = known is not None and known.under_way >= _MAX_PER_PAIR
        if not attempt.from_known_address:
            full |= source.under_way >= _MAX_PER_ADDRESS or self._from_unknown >= _MAX_TOTAL
        if full:
            # Refused before the name is remembered: a flood of names must not push out others.
            raise self._refusal(source, source.free_at - self._clock())
        pair, anywhere = self._entry("pair", name, network), self._entry("name", name)
        limits = (
            [(pair, _FREE_FOR_NAME)]
            if attempt.from_known_address
            else [(pair, _FREE_FOR_NAME), (source, _FREE_FOR_ADDRESS)]
        )
        with self._under_way([entry for entry, _ in limits], unknown=not attempt.from_known_address):
            if not attempt.from_known_address:
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
            # Failures of the address still count: a guesser may have a login of their own.
            pair, _ = limits[0]
            pair.count, pair.free_at = 0, 0.0
            return
        for entry, free in limits:
            entry.add(free, now)
        if not attempt.from_known_address:
            anywhere.add(_FREE_FOR_ADDRESS, now)

    def _refusal(self, source: _Failed, seconds: float) -> TooManyAttempts:
        now = self._clock()
        should_log = now - source.last_logged > _LOG_INTERVAL_S
        source.last_logged = now if should_log else source.last_logged
        return TooManyAttempts(seconds, should_log=should_log)

    @contextmanager
    def _under_way(self, entries: Iterable[_Failed], *, unknown: bool) -> Iterator[None]:
        self._from_unknown += unknown
        for entry in entries:
            entry.under_way += 1
        try:
            yield
        finally:
            self._from_unknown -= unknown
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
    """Return the delay in seconds after ``beyond`` failures more than are free."""
    return min(longest, _FIRST_S * 2 ** min(beyond - 1, 10)) if beyond > 0 else 0.0
