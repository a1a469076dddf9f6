"""Who calls, and what the call did: one note for each request, in reach of all code that works for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

from fastapi import HTTPException

from deformux_label.lib.requests.roles import may

__all__ = ["Caller", "LoggedIn", "calling", "calling_now", "current_user", "note", "require", "with_login"]


class LoggedIn(Protocol):
    """A user who has logged in."""

    @property
    def name(self) -> str:
        """As every record of their work shows it."""

    @property
    def role(self) -> str:
        """One of ``roles.ROLES``."""


@dataclass
class Caller:
    """One request's caller.

    Args:
        address: the client's, without the port.
        user: who has logged in; None where the login is off, or before it.
        done: what the request did, for the audit log: which image, revision, version.
    """

    address: str = ""
    user: LoggedIn | None = None
    done: dict[str, Any] = field(default_factory=dict)


# Threads that a request's work runs in get a copy of its context, and with it this same object.
_caller: ContextVar[Caller | None] = ContextVar("caller", default=None)


@contextmanager
def calling(caller: Caller) -> Iterator[Caller]:
    """Make ``caller`` the one whose request is worked on inside the block."""
    token = _caller.set(caller)
    try:
        yield caller
    finally:
        _caller.reset(token)


def calling_now() -> Caller:
    """Return the note of the request that is worked on; outside requests one that nobody reads."""
    return _caller.get() or Caller()


def current_user() -> LoggedIn | None:
    """Return who has logged in for this request; None where the login is off, and outside requests."""
    caller = _caller.get()
    return caller.user if caller is not None else None


def note(**done: Any) -> None:
    """Say what the request did, for the audit log, such as ``revision=3``; without effect outside requests."""
    caller = _caller.get()
    if caller is not None:
        caller.done.update(done)


def with_login(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return a request's params with the login's name under ``user``; whatever the client says there is dropped."""
    user = current_user()
    claimed = {key: value for key, value in params.items() if key != "user"}
    return claimed if user is None else {**claimed, "user": user.name}


def require(role: str, what: str) -> None:
    """Refuse a caller whose role is less than ``role``; without a login everybody may do all.

    Raises:
        HTTPException: 403.
    """
    user = current_user()
    if user is not None and not may(user.role, role):
        raise HTTPException(403, f"{what} needs the role {role} or more; {user.name!r} has the role {user.role}")
