"""Two ways to do the same, timed in turns, so that other work on the machine slows both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

__all__ = ["in_turns"]


def in_turns(one: Callable[[], None], other: Callable[[], None], pairs: int) -> tuple[float, float, float]:
    """Return the median seconds of each, and the median of the ratios of ``pairs`` pairs, first over second."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for index in range(pairs + 1):
        for run, kept in zip((one, other), seconds, strict=True):
            began = time.perf_counter()
            run()
            if index:  # the first pair compiles
                kept.append(time.perf_counter() - began)
    ratios = (first / second for first, second in zip(*seconds, strict=True))
    return statistics.median(seconds[0]), statistics.median(seconds[1]), statistics.median(ratios)
