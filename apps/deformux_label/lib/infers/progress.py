"""Progress of running inferences: windows done, of how many, seconds left."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from deformux_label.lib.infers.cancellation import raise_if_client_gone

__all__ = ["WindowProgress", "report_windows", "watch_windows"]

logger = logging.getLogger(__name__)

# Seconds between two lines of the log about one inference.
_LOG_SECONDS = 10.0


class WindowProgress:
    """Windows of one inference; one thread reports them, others read.

    Args:
        clock: returns seconds since any fixed moment.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._logged = clock()
        # Windows done, of how many; windows done at a moment from which on the rest is timed, and that moment.
        self._state: tuple[int, int, int, float] | None = None

    def report(self, done: int, of: int) -> None:
        """Note that ``done`` windows of the scan, ``of`` in all, are computed; log it now and then."""
        now = self._clock()
        # The first window also loads and compiles: those after it tell the time of the rest.
        start = (done, now) if self._state is None or done <= 1 else self._state[2:]
        self._state = (done, of, *start)
        if now - self._logged >= _LOG_SECONDS:
            self._logged = now
            left = self.to_dict().get("seconds_left")
            logger.info("%d of %d windows%s", done, of, "" if left is None else f", {left:.0f} s left")

    def to_dict(self) -> dict[str, Any]:
        """Return ``windows_done``, ``windows`` and ``seconds_left``; nothing before the first window."""
        state = self._state
        if state is None:
            return {}
        done, of, first, began = state
        found: dict[str, Any] = {"windows_done": done, "windows": of}
        if done > first:
            found["seconds_left"] = round((self._clock() - began) / (done - first) * (of - done), 1)
        elif done == of:
            found["seconds_left"] = 0.0
        return found


_progress: ContextVar[WindowProgress | None] = ContextVar("windows", default=None)


def watch_windows(progress: WindowProgress) -> None:
    """Set where this request's inference reports its windows, for all threads of the request."""
    _progress.set(progress)


def report_windows(done: int, of: int) -> None:
    """Report the windows of this request's inference; raise ClientGone once its client has closed the connection."""
    raise_if_client_gone()
    progress = _progress.get()
    if progress is None:
        # A process of its own, such as a batch inference: the log is what shows it.
        progress = WindowProgress()
        _progress.set(progress)
    progress.report(done, of)
