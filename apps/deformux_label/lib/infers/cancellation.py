"""Cancellation of long work after its client has closed the connection."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar

__all__ = ["ClientGone", "raise_if_client_gone", "watch_client"]

_gone: ContextVar[Callable[[], bool]] = ContextVar("gone", default=lambda: False)


class ClientGone(Exception):
    """The client has closed its connection, so the result is no longer needed."""


def watch_client(is_gone: Callable[[], bool]) -> None:
    """Set the function that says whether this request's client has left, for all threads of the request."""
    _gone.set(is_gone)


def raise_if_client_gone() -> None:
    """Raise ClientGone once the client has closed its connection; long work calls this regularly."""
    if _gone.get()():
        raise ClientGone
