"""Ending long work whose client has closed its connection."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar

__all__ = ["ClientGone", "raise_if_client_gone", "watch_client"]

_gone: ContextVar[Callable[[], bool]] = ContextVar("gone", default=lambda: False)


class ClientGone(Exception):
    """The client has closed its connection: nobody waits for the result."""


def watch_client(is_gone: Callable[[], bool]) -> None:
    """Let ``is_gone`` tell the work of this request, in all of its threads, whether its client has left."""
    _gone.set(is_gone)


def raise_if_client_gone() -> None:
    """Raise ClientGone once the client has closed its connection; long work calls this now and then."""
    if _gone.get()():
        raise ClientGone
