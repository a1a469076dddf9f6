"""The append-only audit log: who did what, when, to which image, revision or version."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import anyio.to_thread
from anyio import CapacityLimiter
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deformux_label.lib.requests.caller import Caller, calling
from deformux_label.web.route_roles import offered

__all__ = ["AUDITED", "Act", "AuditLog", "Audited", "Record", "read_log"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Act:
    """Description of how a request is logged.

    Args:
        what: name of the action.
        image: query parameter that names the image; it differs between routes.
        more: query parameters that are logged under their own names.
    """

    what: str
    image: str | None = None
    more: tuple[str, ...] = ()


# Method and route to action. Reads are logged only if images, labels or the server's log leave the server. Only query
# parameters that the endpoint reads are logged. Where the action depends on more than the route, the app names it with
# ``note(what=…)``: ``/infer/`` when it stores a label, a session when its image is fetched, ``/auth/`` at logins,
# logouts and wrong passwords. Other requests without a login are not logged.
AUDITED: Mapping[tuple[str, str], Act] = {
    ("POST", "/activelearning/{strategy}"): Act("lease image"),
    ("DELETE", "/deformux/leases"): Act("release image", "image"),
    ("PUT", "/datastore/"): Act("upload image", "image"),
    ("PUT", "/datastore/image"): Act("upload image", "image"),
    ("DELETE", "/datastore/"): Act("delete image", "id"),
    ("DELETE", "/datastore/image"): Act("delete image", "id"),
    ("PUT", "/datastore/image/info"): Act("change image info", "image"),
    ("PUT", "/datastore/label"): Act("submit label", "image", ("tag",)),
    ("DELETE", "/datastore/label"): Act("delete label", "id", ("tag",)),
    ("PUT", "/datastore/label/info"): Act("change label info", "label", ("tag",)),
    ("PUT", "/datastore/updatelabelinfo"): Act("change label info", "label", ("tag",)),
    ("POST", "/deformux/labels/restore"): Act("restore label", "image", ("tag", "revision")),
    ("GET", "/datastore/image"): Act("download image", "image"),
    ("GET", "/datastore/label"): Act("download label", "label", ("tag",)),
    ("GET", "/deformux/labels/revision"): Act("download label", "image", ("tag", "revision")),
    ("GET", "/datastore/dataset"): Act("download dataset"),
    ("PUT", "/session/"): Act("upload session image"),
    ("DELETE", "/session/{session_id}"): Act("delete session image"),
    ("GET", "/logs/"): Act("read server log"),
    ("POST", "/train/"): Act("start training"),
    ("POST", "/train/{model}"): Act("start training"),
    ("DELETE", "/train/"): Act("stop training"),
    ("POST", "/scoring/"): Act("start scoring"),
    ("POST", "/scoring/{method}"): Act("start scoring"),
    ("DELETE", "/scoring/"): Act("stop scoring"),
    ("POST", "/batch/infer/{model}"): Act("start batch inference"),
    ("DELETE", "/batch/infer"): Act("stop batch inference"),
    ("PUT", "/model/{model}"): Act("upload model"),
    ("DELETE", "/model/{model}"): Act("delete model"),
    ("POST", "/deformux/versions/{name}/publish"): Act("publish version"),
    ("POST", "/deformux/versions/{name}/pin"): Act("pin version"),
    ("POST", "/deformux/versions/rollback"): Act("roll back version"),
    ("POST", "/deformux/versions/unpin"): Act("unpin version"),
}
_FIRST = ("time", "what", "status", "user", "role", "address")
_MAX_VALUE_LENGTH = 200
_MAX_ITEMS = 50
# Separate from the threads of endpoints: a record must not wait for an upload.
_THREADS = CapacityLimiter(4)


@dataclass(frozen=True)
class Record:
    """One valid line of the log."""

    values: Mapping[str, Any]

    @property
    def details(self) -> dict[str, Any]:
        """Return the fields other than the common ones."""
        return {key: value for key, value in self.values.items() if key not in _FIRST}


class AuditLog:
    """JSON lines in a file of mode 600. Each is appended in one write, and synced to disk before ``record`` returns.

    Lines are never removed; to start a new log, move the file while no server runs. After a crash, an incomplete line
    stays, and the next record begins on a new line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.failure: str | None = None
        # Re-entrant: a signal handler may record while a record is being written.
        self._lock = threading.RLock()

    def record(self, what: str, **values: Any) -> None:
        """Append a line; long values are cut, and values that JSON cannot hold become text.

        A full disk must not stop the server; ``failure`` and the server's log report it.
        """
        line = {"time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"), "what": what}
        line |= {key: _bounded(value) for key, value in values.items() if value is not None}
        # ASCII, so that no value can end the line or be invalid Unicode.
        text = json.dumps(line, ensure_ascii=True, allow_nan=False).encode() + b"\n"
        try:
            self._append(text)
            self.failure = None
        except OSError as error:
            self.failure = f"the audit log cannot be written: {error.strerror or error}"
            logger.error("The audit log %s cannot be written (%s); missing record: %s", self.path, error, text.decode())

    def _append(self, text: bytes) -> None:
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                # Another process may be in the middle of a line.
                fcntl.flock(handle, fcntl.LOCK_EX)
                size = os.fstat(handle).st_size
                torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
                line = b"\n" + text if torn else text
                if os.write(handle, line) != len(line):
                    raise OSError(f"only some of {len(line)} bytes were written")
                os.fsync(handle)
            finally:
                os.close(handle)


def read_log(path: Path) -> tuple[list[Record], int]:
    """Return the records of a log, oldest first, and the number of unreadable lines."""
    records, damaged = [], 0
    for line in path.read_bytes().splitlines():
        try:
            values = json.loads(line)
            if not isinstance(values, dict) or not {"time", "what"} <= values.keys():
                raise ValueError
        except ValueError:
            damaged += bool(line.strip())
        else:
            records.append(Record(values))
    return records, damaged


class Audited:
    """ASGI middleware that sets the caller, and records the action before the response is sent.

    Args:
        app: the application behind it.
        log: receives the records.
    """

    def __init__(self, app: ASGIApp, log: AuditLog) -> None:
        self.app = app
        self.log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        client = scope.get("client")
        caller = Caller(address=str(client[0]) if client else "")
        recorded = False

        async def record(status: int) -> None:
            nonlocal recorded
            recorded = True
            values = _of_request(scope, caller, status)
            if values is not None:
                await anyio.to_thread.run_sync(lambda: self.log.record(**values), limiter=_THREADS)

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start" and not recorded:
                await record(message["status"])
            await send(message)

        with calling(caller):
            try:
                await self.app(scope, receive, sending)
            except Exception:
                if not recorded:
                    await record(500)
                raise


def _of_request(scope: Scope, caller: Caller, status: int) -> dict[str, Any] | None:
    route = offered(scope["method"], scope["path"])
    act = AUDITED.get((scope["method"], route.path)) if route is not None else None
    what = caller.done.get("what", act.what if act is not None else None)
    if what is None:
        return None
    found = _logged_parameters(scope, act) if act is not None else {}
    if route is not None and route.path.startswith("/deformux/versions/{name}"):
        found["version"] = scope["path"].split("/")[3]
    user = caller.user
    who = {"user": user.name, "role": user.role} if user is not None else {}
    return {"status": status, **who, "address": caller.address, **found, **caller.done, "what": what}


def _logged_parameters(scope: Scope, act: Act) -> dict[str, Any]:
    """Return the logged query parameters, parsed as FastAPI does; the perimeter refuses repeated names."""
    query = dict(parse_qsl(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True))
    fields = {"image": act.image, **{name: name for name in act.more}}
    return {field: query[name] for field, name in fields.items() if name is not None and query.get(name)}


def _bounded(value: Any) -> Any:
    """Return a value that is short, finite and valid Unicode."""
    if isinstance(value, bool | int) or (isinstance(value, float) and value == value and abs(value) < 1e300):
        return value
    if isinstance(value, Mapping):
        return {_short(str(key)): _bounded(item) for key, item in list(value.items())[:_MAX_ITEMS]}
    if isinstance(value, list | tuple):
        return [_bounded(item) for item in value[:_MAX_ITEMS]]
    return _short(str(value))


def _short(text: str) -> str:
    valid = text.encode("utf-8", "backslashreplace").decode()
    return valid if len(valid) <= _MAX_VALUE_LENGTH else f"{valid[:_MAX_VALUE_LENGTH]}…"
