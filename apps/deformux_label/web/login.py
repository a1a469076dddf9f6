"""The login in front of every route: with the tokens of the Slicer extension, and with a cookie for browsers."""

from __future__ import annotations

import logging
import time
import unicodedata
from collections import OrderedDict
from collections.abc import Callable
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, quote

import anyio.to_thread
from anyio import CapacityLimiter
from fastapi import HTTPException
from fastapi.responses import JSONResponse, RedirectResponse, Response
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deformux_label.lib.requests.caller import Caller, current_caller, note
from deformux_label.lib.requests.roles import may
from deformux_label.web.at_home import AtHome, place_of
from deformux_label.web.attempts import Attempts, TooManyAttempts
from deformux_label.web.listening import NO_LOGIN, is_own_address
from deformux_label.web.route_roles import offered
from deformux_label.web.tokens import Tokens
from deformux_label.web.users import InvalidUsers, User, Users, verified

__all__ = ["CHALLENGE", "COOKIE", "LOGIN_PAGE", "OUT_OF_ORDER", "Gate", "Login", "token_of"]

logger = logging.getLogger(__name__)

COOKIE = "deformux-label"
LOGIN_PAGE = "/auth/login"
CHALLENGE = {"WWW-Authenticate": "Bearer"}
OUT_OF_ORDER = "nobody can log in now: the server's users file must be mended"
_WRONG = "the user name or the password is wrong"
# Longer than any name, so that no cut text equals one.
_MAX_NAME_LENGTH = 200
_MAX_RECORDED_LENGTH = 64
_IMAGE = "/datastore/image"
_SAMPLE = "/activelearning/{strategy}"
# Each check of a password occupies a processor for a quarter of a second.
_CHECKS = CapacityLimiter(2)
# Users at home do not wait behind the guesses of strangers.
_CHECKS_AT_HOME = CapacityLimiter(2)


class Gate:
    """The state of the login, and the users of tokens.

    The login is on once there is a user. It then stays on until the server ends: a users file that is emptied,
    deleted or damaged locks everybody out.
    """

    def __init__(self, users: Users, *, insecure: bool = False) -> None:
        self.users = users
        self.insecure = insecure
        self.tokens = Tokens(users)
        self.attempts = Attempts(AtHome(users.path.with_name(f"{users.path.name}.home")))
        self.handed_out = HandedOut()
        self._was_on = False

    @property
    def on(self) -> bool:
        """Return whether a login is needed."""
        if not self._was_on:
            try:
                self._was_on = bool(self.users.all())
            except InvalidUsers:
                return True
        return self._was_on

    def user_of(self, headers: Headers) -> User | None:
        """Return the user who sends these headers; raise InvalidUsers."""
        token = token_of(headers)
        return self.tokens.user(token) if token else None

    async def log_in(self, name: str, password: str, address: str) -> str:
        """Return a token for a name and its password.

        Raises:
            HTTPException: 401 for a wrong name or password, 429 after too many of them.
            InvalidUsers: the users file is damaged.
        """
        name = unicodedata.normalize("NFC", name)[:_MAX_NAME_LENGTH]
        shown = ascii(name)[:80]
        # Fail before any password is checked if the file is damaged.
        self.users.all()
        # No user has a longer name.
        note(what="log in", user=name[:_MAX_RECORDED_LENGTH])
        try:
            async with self.attempts.attempt(name, address) as attempt:
                user = self.users.all().get(name)
                checks = _CHECKS_AT_HOME if attempt.at_home else _CHECKS
                if not await anyio.to_thread.run_sync(verified, user, password, limiter=checks) or user is None:
                    logger.warning("A login of %s from %s failed", shown, address)
                    raise HTTPException(401, _WRONG, headers=CHALLENGE)
                attempt.succeeded()
        except TooManyAttempts as error:
            if error.news:
                logger.warning("Logins from %s, now of %s, are refused: too many failed", address, shown)
            else:
                note(what=None)
            raise HTTPException(429, str(error), headers={"Retry-After": str(error.seconds)}) from error
        await anyio.to_thread.run_sync(self.attempts.home.add, name, place_of(address), limiter=_CHECKS_AT_HOME)
        note(role=user.role)
        return self.tokens.make(user)


class HandedOut:
    """Images that Next Sample handed out, whose files Slicer then requests without a token.

    Slicer's SampleData module downloads with no headers at all. So the address of a logged-in annotator may
    fetch that one image a few times within some minutes, while the annotator's token is valid.
    """

    _SECONDS = 300.0
    _TIMES = 3
    _MAX_HELD = 1_000

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._held: OrderedDict[tuple[str, str], tuple[str, float, int]] = OrderedDict()

    def add(self, address: str, image: str, token: str) -> None:
        """Let an address fetch an image as if it sent this token."""
        self._held.pop((address, image), None)
        self._held[address, image] = (token, self._clock() + self._SECONDS, self._TIMES)
        if len(self._held) > self._MAX_HELD:
            self._held.popitem(last=False)

    def take(self, address: str, image: str) -> str | None:
        """Return the token with which an address may fetch an image now, or None."""
        token, until, times = self._held.pop((address, image), ("", 0.0, 0))
        if until <= self._clock():
            return None
        if times > 1:
            self._held[address, image] = (token, until, times - 1)
        return token


class Login:
    """ASGI middleware that passes a request on if its caller may make it, and sets the user.

    Pure ASGI, so that uploads and downloads are streamed. It must be inside ``Audited`` and outside all routes.
    """

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self.app = app
        self.gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            caller = current_caller()
            refusal = self._refusal(scope, caller)
            if refusal is not None:
                if caller.user is None:
                    # Requests without a login are not recorded.
                    caller.done["what"] = None
                await refusal(scope, receive, send)
                return
            await self.app(scope, receive, self._handing_out(scope, caller, send))
        elif scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        else:
            # This server has no web sockets.
            await send({"type": "websocket.close", "code": 1008})

    def _refusal(self, scope: Scope, caller: Caller) -> Response | None:
        """Return the answer to a request that is refused; else set ``caller.user`` and return None."""
        if not self.gate.on:
            if self.gate.insecure or _is_local(scope):
                return None
            return JSONResponse({"detail": NO_LOGIN}, 403)
        route = offered(scope["method"], scope["path"])
        if route is None:
            return JSONResponse({"detail": "this server does not offer that"}, 404)
        if route.role is None:
            return None
        headers = Headers(scope=scope)
        try:
            caller.user = self.gate.user_of(headers) or self._without_token(scope, headers, caller)
        except InvalidUsers as error:
            logger.error("Nobody can log in: %s", error)
            return JSONResponse({"detail": OUT_OF_ORDER}, 503)
        if caller.user is None:
            return _log_in_first(scope, headers)
        if not may(caller.user.role, route.role):
            detail = f"this needs the role {route.role} or more; {caller.user.name!r} has the role {caller.user.role}"
            return JSONResponse({"detail": detail}, 403)
        return None

    def _handing_out(self, scope: Scope, caller: Caller, send: Send) -> Send:
        """Return ``send``; for Next Sample, one that first lets the caller fetch the image that the answer names."""
        route = offered(scope["method"], scope["path"])
        token = token_of(Headers(scope=scope))
        if route is None or route.path != _SAMPLE or caller.user is None:
            return send

        async def sending(message: Message) -> None:
            # The endpoint has noted the image. Before the answer leaves: the next request may follow at once.
            image = caller.done.get("image")
            if message["type"] == "http.response.start" and message["status"] == 200 and isinstance(image, str):
                self.gate.handed_out.add(caller.address, image, token)
            await send(message)

        return sending

    def _without_token(self, scope: Scope, headers: Headers, caller: Caller) -> User | None:
        if scope["method"] != "GET" or scope["path"] != _IMAGE or token_of(headers):
            return None
        images = parse_qs(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True).get("image", [])
        token = self.gate.handed_out.take(caller.address, images[0]) if len(images) == 1 else None
        user = self.gate.tokens.user(token) if token is not None else None
        if user is not None:
            # Anybody at the address may have sent it, not only that user.
            caller.done["without_token"] = True
        return user


def token_of(headers: Headers) -> str:
    """Return the token of a request, from the header, else from the cookie; empty without one."""
    if (authorization := headers.get("authorization")) is not None:
        scheme, _, token = authorization.partition(" ")
        # Anything else counts as a wrong token.
        return token.strip() if scheme.lower() == "bearer" and token.strip() else "-"
    try:
        cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return ""
    return cookie.value if cookie is not None else ""


def _is_local(scope: Scope) -> bool:
    """Return whether a request came from this machine, and not through a proxy from another one."""
    server, client = scope.get("server"), scope.get("client")
    # Unix sockets have no port.
    here = server is None or server[1] is None or is_own_address(str(server[0]))
    return here and (client is None or is_own_address(str(client[0])))


def _log_in_first(scope: Scope, headers: Headers) -> Response:
    """Send a browser that requests a page to the login page, and answer 401 to programs."""
    if scope["method"] == "GET" and "text/html" in headers.get("accept", ""):
        return RedirectResponse(f"{LOGIN_PAGE}?next={quote(scope['path'])}", 303, {"Cache-Control": "no-store"})
    return JSONResponse({"detail": "log in first, at /auth/token"}, 401, CHALLENGE)
