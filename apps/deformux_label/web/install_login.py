"""Installation of the login and the audit log in a MONAI Label server."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from fastapi import FastAPI
from monailabel.endpoints.user import auth
from starlette.middleware import Middleware

from deformux_label.lib.requests.caller import current_user
from deformux_label.web.audit import Audited, AuditLog
from deformux_label.web.auth_routes import auth_router
from deformux_label.web.listening import UNSAFE, host_of, is_loopback
from deformux_label.web.login import Gate, Login
from deformux_label.web.users import User, Users, default_users_file

__all__ = ["AUDIT_FILE", "install_login"]

logger = logging.getLogger(__name__)

AUDIT_FILE = "audit.jsonl"


class _Options(Protocol):
    @property
    def users(self) -> Path | None: ...

    @property
    def insecure(self) -> bool: ...


class _App(Protocol):
    """The part of the app that the login needs."""

    server_options: _Options
    state_folder: Path
    studies: str


def install_login(server: FastAPI, app: _App) -> Callable[[], list[str]]:
    """Add the login and the audit log to a running server, inside its other middleware.

    Returns:
        A function that returns the current warnings about both, for ``/info/``.
    """
    log = AuditLog(app.state_folder / AUDIT_FILE)
    users = Users(app.server_options.users or default_users_file(), on_change=_recorder(log))
    gate = Gate(users, insecure=app.server_options.insecure)
    # MONAI Label's endpoints call this for the user; with its own login off, it takes all users for one.
    auth.from_token = _user_of_request
    server.router.routes[:0] = auth_router(gate).routes
    server.user_middleware += [Middleware(Audited, log=log), Middleware(Login, gate=gate)]
    server.middleware_stack = None
    # ``deformux-label audit --studies`` finds this file by the real path.
    roles = {user.name: user.role for user in users.all().values()}
    log.record("start server", studies=os.path.realpath(app.studies), process=os.getpid(), users=roles)
    _record_stop(log)
    host = host_of(sys.argv)
    lasting = []
    if not gate.on and not is_loopback(host):
        lasting.append(UNSAFE)
    if gate.on and not is_loopback(host) and not _encrypted(sys.argv):
        lasting.append("passwords and images cross the network unencrypted; give --ssl-cert and --ssl-key")
    for warning in lasting:
        logger.warning("%s.", warning)
    return lambda: [*lasting, *([log.failure] if log.failure else [])]


def _user_of_request(token: str) -> auth.User:  # noqa: ARG001
    user = current_user()
    return auth.DEFAULT_USER if user is None else auth.User(username=user.name, name=user.name, roles=[user.role])


def _recorder(log: AuditLog) -> Callable[[Mapping[str, User], Mapping[str, User]], None]:
    def changed(before: Mapping[str, User], after: Mapping[str, User]) -> None:
        both = before.keys() & after.keys()
        values: dict[str, Any] = {
            "added": {name: after[name].role for name in sorted(after.keys() - before.keys())},
            "removed": sorted(before.keys() - after.keys()),
            "roles": {name: after[name].role for name in sorted(both) if before[name].role != after[name].role},
            "passwords": sorted(name for name in both if before[name].password != after[name].password),
        }
        named = {*values["roles"], *values["passwords"]}
        changed_back = {name for name in both if before[name].changes != after[name].changes}
        values["changed_back"] = sorted(changed_back - named)
        log.record("users changed", **{key: value for key, value in values.items() if value})

    return changed


def _record_stop(log: AuditLog) -> None:
    """Record the signal that ends the server, then call the web server's handler, which must be installed already."""
    if threading.current_thread() is not threading.main_thread():
        return

    def handler(number: int, frame: FrameType | None) -> None:
        log.record("stop server", process=os.getpid(), signal=signal.Signals(number).name)
        original[signal.Signals(number)](number, frame)

    present = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    original = {number: known for number, known in present.items() if callable(known)}
    for number in original:
        signal.signal(number, handler)


def _encrypted(arguments: list[str]) -> bool:
    return any(argument.partition("=")[0] in ("--ssl_certfile", "--ssl-certfile") for argument in arguments)
