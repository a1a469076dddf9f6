"""The first check of every request: its host, origin, route and size."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import socket
import sys
import threading
import time
from collections.abc import Collection
from urllib.parse import parse_qsl, unquote_to_bytes, urlsplit

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deformux_label.lib.requests.identifiers import is_text
from deformux_label.lib.requests.request_folder import requests_folder
from deformux_label.web.listening import host_of
from deformux_label.web.route_roles import OFFERED, offered

__all__ = ["Perimeter", "host_names"]

# Largest body in bytes without a volume: JSON, or a form of fields.
_MAX_BODY = 1_000_000
# Added for the fields of a form with a volume.
_MAX_FORM = 2_000_000
_MAX_QUERY = 16_000
_UPLOADS = (
    ("PUT", "/session/"),
    ("PUT", "/datastore/"),
    ("PUT", "/datastore/image"),
    ("PUT", "/datastore/label"),
    ("POST", "/infer/{model}"),
    ("POST", "/infer/segmentation"),
)
# Clients are dropped if they pause longer than this, or afterwards send fewer bytes per second on average.
_MAX_PAUSE_S = 20.0
_MIN_BYTES_PER_S = 2_000
# Clients read a refusal only after sending everything; up to this much of the rest is read and discarded.
_MAX_DISCARDED_BYTES = 64_000_000
_MAX_DISCARDING_S = 5.0
_SECURITY_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"content-security-policy", b"frame-ancestors 'none'"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
]
_CLOSE = {"connection": "close"}


class Perimeter:
    """ASGI middleware that checks every request first.

    Args:
        app: the application behind it.
        hosts: accepted host names; addresses are accepted too. See ``host_names``.
        origins: other origins whose pages may call this server.
        max_upload_gb: size limit of an uploaded volume.
        prefix: path prefix of MONAI Label's routes.
    """

    def __init__(
        self, app: ASGIApp, *, hosts: Collection[str], origins: Collection[str], max_upload_gb: float, prefix: str = ""
    ) -> None:
        self.app = app
        self.hosts = hosts
        self.origins = tuple(origin.lower() for origin in origins)
        self.most_upload = int(max_upload_gb * 1e9)
        self.prefix = prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = {name: value.decode("latin-1") for name, value in reversed(scope["headers"])}
        origin = headers.get(b"origin")
        cross = origin is not None and origin.lower() in self.origins

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = list(message.get("headers", ()))
                # Some pages set policies of their own: the login form must send its origin.
                present = {name.lower() for name, _ in own}
                message["headers"] = own + [header for header in _SECURITY_HEADERS if header[0] not in present]
                if cross:
                    assert origin is not None
                    message["headers"] += _cors(origin)
            await send(message)

        body = _Body(receive, _declared(headers), self._most_body(scope), b"expect" in headers)
        try:
            self._check_host(headers)
            self._check_origin(scope, headers, origin, cross)
            if scope["method"] == "OPTIONS" and cross and b"access-control-request-method" in headers:
                await _preflight(answer)
                return
            self._check_route(scope)
            _check_query(scope["query_string"])
            await body.check_declared()
        except HTTPException as error:
            await _refuse(error, answer)
            return
        with requests_folder():
            await self.app(scope, body.receive, answer)

    def _check_host(self, headers: dict[bytes, str]) -> None:
        name = _host_name(headers.get(b"host", ""))
        if name is None:
            raise HTTPException(400, "the Host header must be the server's name and port")
        if not _is_address(name) and name not in self.hosts:
            raise HTTPException(
                421,
                f"this server is not called {ascii(name)[:80]}; use its address, or start it with "
                "--allow-origin and an origin of this name",
            )

    def _check_origin(self, scope: Scope, headers: dict[bytes, str], origin: str | None, cross: bool) -> None:
        """Refuse requests from pages of other origins; browsers send the origin of the page."""
        if origin is not None:
            if not cross and origin.lower() != f"{scope['scheme']}://{headers[b'host']}".lower():
                raise HTTPException(
                    403, f"pages of {ascii(origin)[:80]} may not call this server; --allow-origin names those that may"
                )
            return
        site = headers.get(b"sec-fetch-site", "none").lower()
        visit = headers.get(b"sec-fetch-mode") == "navigate" and scope["method"] == "GET"
        if site not in ("none", "same-origin") and not visit:
            raise HTTPException(403, "pages of other origins may not call this server; --allow-origin names those")

    def _check_route(self, scope: Scope) -> None:
        path = self._path(scope)
        if path is None or not is_text(path, _MAX_QUERY):
            raise HTTPException(404, "this server has no such path; GET /openapi.json lists the paths that exist")
        if offered(scope["method"], path) is None:
            methods = sorted({name for route in OFFERED for name in route.methods if offered(name, path)})
            if methods:
                raise HTTPException(
                    405, f"this path allows only {', '.join(methods)}", headers={"allow": ", ".join(methods)}
                )
            raise HTTPException(404, "this server has no such path; GET /openapi.json lists the paths that exist")

    def _path(self, scope: Scope) -> str | None:
        """Return the path of a request below the server's prefix, or None if it is outside or not normalized."""
        try:
            path = unquote_to_bytes(scope.get("raw_path") or scope["path"].encode()).decode()
        except UnicodeError:
            return None
        prefix = scope.get("root_path", "").rstrip("/") + self.prefix
        if not path.startswith(prefix + "/"):
            return None
        path = path[len(prefix) :]
        inner = path.split("/")[1:-1]
        return None if "" in inner or {".", ".."} & set(path.split("/")) or "\\" in path else path

    def _most_body(self, scope: Scope) -> int:
        path = self._path(scope)
        route = offered(scope["method"], path) if path is not None else None
        upload = route is not None and (scope["method"], route.path) in _UPLOADS
        return self.most_upload + _MAX_FORM if upload else _MAX_BODY


class _Body:
    """A request's body, read with limits on its speed and size."""

    def __init__(self, receive: Receive, declared: int, most: int, expects: bool) -> None:
        self._receive = receive
        self._declared = declared
        self._most = most
        self._expects = expects
        self._read = 0
        self._waited = 0.0
        self._ended = False

    async def check_declared(self) -> None:
        if self._declared > self._most:
            await self._discard_rest()
            raise self._too_large()

    async def receive(self) -> Message:
        if self._ended:
            # Only the end of the connection is still awaited, without a time limit.
            return await self._receive()
        started = time.monotonic()
        try:
            message = await asyncio.wait_for(self._receive(), _MAX_PAUSE_S)
        except (asyncio.TimeoutError, TimeoutError) as error:
            raise self._too_slow() from error
        self._waited += time.monotonic() - started
        if message["type"] != "http.request":
            return message
        self._read += len(message.get("body", b""))
        self._ended = not message.get("more_body", False)
        if self._read > self._most:
            await self._discard_rest()
            raise self._too_large()
        if not self._ended and self._waited > _MAX_PAUSE_S + self._read / _MIN_BYTES_PER_S:
            raise self._too_slow()
        return message

    async def _discard_rest(self) -> None:
        """Read the rest for a moment: clients that are cut off while sending never see the response."""
        left, end = _MAX_DISCARDED_BYTES, time.monotonic() + _MAX_DISCARDING_S
        while not self._expects and not self._ended and left > 0 and time.monotonic() < end:
            try:
                message = await asyncio.wait_for(self._receive(), end - time.monotonic())
            except (asyncio.TimeoutError, TimeoutError):
                return
            left -= len(message.get("body", b""))
            self._ended = message["type"] != "http.request" or not message.get("more_body", False)

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"the body must be at most {self._most} bytes; send less", headers=_CLOSE)

    def _too_slow(self) -> HTTPException:
        return HTTPException(408, "the body arrived too slowly; send it again over a faster connection", headers=_CLOSE)


def host_names(origins: Collection[str]) -> set[str]:
    """Return the accepted host names: this machine's, the one that the server listens on, and those of the origins.

    The machine's full name is added later, because looking it up may take time.
    """
    names = {"localhost", socket.gethostname().lower()}
    names |= {(urlsplit(origin).hostname or "").lower() for origin in origins}
    names.add(host_of(sys.argv).lower())
    names.discard("")
    threading.Thread(target=lambda: names.add(socket.getfqdn().lower()), name="host-name", daemon=True).start()
    return names


def _host_name(host: str) -> str | None:
    """Return the name in a Host header without its port, or None for an invalid one."""
    try:
        parts = urlsplit(f"//{host}")
        name, _ = parts.hostname, parts.port
    except ValueError:
        return None
    if not name or parts.path or parts.query or parts.fragment or "@" in parts.netloc:
        return None
    return name.removesuffix(".")


def _is_address(name: str) -> bool:
    """Return whether a host is an IP address, which DNS cannot redirect."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _declared(headers: dict[bytes, str]) -> int:
    length = headers.get(b"content-length", "0")
    return int(length) if length.isascii() and length.isdigit() and len(length) < 20 else 10**20


def _check_query(query: bytes) -> None:
    if len(query) > _MAX_QUERY:
        raise HTTPException(414, f"the query must be at most {_MAX_QUERY} bytes")
    try:
        text = unquote_to_bytes(query.replace(b"+", b" ")).decode()
    except UnicodeDecodeError as error:
        raise HTTPException(400, "the query must be percent-encoded UTF-8") from error
    if not is_text(text, _MAX_QUERY):
        raise HTTPException(400, "the query must not contain null bytes or other control characters")
    names = [name for name, _ in parse_qsl(query.decode("latin-1"), keep_blank_values=True)]
    if len(set(names)) < len(names):
        # The endpoint and other code that reads the query might disagree on which value counts.
        repeated = next(name for name in names if names.count(name) > 1)
        raise HTTPException(400, f"the query has the parameter {ascii(repeated)[:60]} more than once; give it once")


def _cors(origin: str) -> list[tuple[bytes, bytes]]:
    return [
        (b"access-control-allow-origin", origin.encode("latin-1")),
        (b"access-control-allow-credentials", b"true"),
        (b"access-control-expose-headers", b"content-disposition"),
        (b"vary", b"Origin"),
    ]


async def _preflight(send: Send) -> None:
    headers = [
        (b"access-control-allow-methods", b"GET, HEAD, POST, PUT, DELETE"),
        (b"access-control-allow-headers", b"authorization, content-type"),
        (b"access-control-max-age", b"600"),
    ]
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


async def _refuse(error: HTTPException, send: Send) -> None:
    body = json.dumps({"detail": error.detail}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.encode(), value.encode()) for name, value in (error.headers or {}).items()]
    await send({"type": "http.response.start", "status": error.status_code, "headers": headers})
    await send({"type": "http.response.body", "body": body})
