"""The caller of the current request, and what the request did, for all code that runs for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

from fastapi import HTTPException

from deformux_label.lib.requests.roles import may

__all__ = ["Caller", "LoggedIn", "calling", "current_caller", "current_user", "note", "require", "with_login"]


class LoggedIn(Protocol):
    """A user who has logged in."""

    @property
    def name(self) -> str:
        """Return the name that all records of their work show."""

    @property
    def role(self) -> str:
        """Return one of ``roles.ROLES``."""


@dataclass
class Caller:
    """One request's caller.

    Args:
        address: address of the client, without the port.
        user: the logged-in user; None while login is off, and before the login.
        done: fields for the audit log, such as image, revision and version.
    """

    address: str = ""
    user: LoggedIn | None = None
    done: dict[str, Any] = field(default_factory=dict)


# Worker threads of a request get a copy of its context, which refers to the same object.
_caller: ContextVar[Caller | None] = ContextVar("caller", default=None)


@contextmanager
def calling(caller: Caller) -> Iterator[Caller]:
    """Make ``caller`` the current one inside the block."""
    token = _caller.set(caller)
    try:
        yield caller
    finally:
        _caller.reset(token)


def current_caller() -> Caller:
    """Return the current caller; outside requests, a new one that nothing reads."""
    return _caller.get() or Caller()


def current_user() -> LoggedIn | None:
    """Return the logged-in user of this request; None while login is off, and outside requests."""
    caller = _caller.get()
    return caller.user if caller is not None else None


def note(**done: Any) -> None:
    """Record what the request did for the audit log, such as ``revision=3``; do nothing outside requests."""
    caller = _caller.get()
    if caller is not None:
        caller.done.update(done)


def with_login(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return a request's params with the logged-in name under ``user``; drop a name that the client sent."""
    user = current_user()
    claimed = {key: value for key, value in params.items() if key != "user"}
    return claimed if user is None else {**claimed, "user": user.name}


def require(role: str, what: str) -> None:
    """Refuse a caller whose role is below ``role``; without a login everyone may do everything.

    Raises:
        HTTPException: 403.
    """
    user = current_user()
    if user is not None and not may(user.role, role):
        raise HTTPException(403, f"{what} needs the role {role} or higher; {user.name!r} has the role {user.role}")
