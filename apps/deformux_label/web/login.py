"""The login in front of every route: as the stock Slicer extension speaks it, and with a cookie for browsers."""

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

from deformux_label.lib.requests.caller import Caller, calling_now, note
from deformux_label.lib.requests.roles import may
from deformux_label.web.at_home import AtHome, place_of
from deformux_label.web.attempts import Attempts, TooManyAttempts
from deformux_label.web.listening import NO_LOGIN, is_own_address
from deformux_label.web.offered import offered
from deformux_label.web.tokens import Tokens
from deformux_label.web.users import InvalidUsers, User, Users, verified

__all__ = ["CHALLENGE", "COOKIE", "LOGIN_PAGE", "OUT_OF_ORDER", "Gate", "Login", "token_of"]

logger = logging.getLogger(__name__)

COOKIE = "deformux-label"
LOGIN_PAGE = "/auth/login"
CHALLENGE = {"WWW-Authenticate": "Bearer"}
OUT_OF_ORDER = "nobody can log in now: the server's users file must be mended"
_WRONG = "the user name or the password is wrong"
# More than any name has, so that none is met by cutting.
_LONGEST_NAME = 200
_LONGEST_RECORDED = 64
_IMAGE = "/datastore/image"
_SAMPLE = "/activelearning/{strategy}"
# Each check of a password takes a processor for a quarter of a second.
_CHECKS = CapacityLimiter(2)
# Nobody who is at home waits behind the guesses of strangers.
_CHECKS_AT_HOME = CapacityLimiter(2)


class Gate:
    """Whether the login is on, and who comes with which token.

    The login is on from the first user on. It then stays on until the server ends: a users file that is emptied,
    deleted or damaged locks everybody out and lets nobody in.
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
        """Whether a login is needed."""
        if not self._was_on:
            try:
                self._was_on = bool(self.users.all())
            except InvalidUsers:
                return True
        return self._was_on

    def user_of(self, headers: Headers) -> User | None:
        """Return who sends these headers; raises InvalidUsers."""
        token = token_of(headers)
        return self.tokens.user(token) if token else None

    async def log_in(self, name: str, password: str, address: str) -> str:
        """Return a token for a name and its password.

        Raises:
            HTTPException: 401 where they are wrong, 429 after too many that were.
            InvalidUsers: the users file is damaged.
        """
        name = unicodedata.normalize("NFC", name)[:_LONGEST_NAME]
        shown = ascii(name)[:80]
        # With a damaged file nobody's password is tried.
        self.users.all()
        # No name of a user is longer.
        note(what="log in", user=name[:_LONGEST_RECORDED])
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
    """Images that Next Sample gave to somebody who then asks for the file without a token, as Slicer does.

    Slicer's SampleData module downloads with no headers at all. So the address that a logged-in annotator called from
    may fetch that one image, a few times, for some minutes, and no longer than that annotator's own token is good.
    """

    _SECONDS = 300.0
    _TIMES = 3
    _MOST = 1_000

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._held: OrderedDict[tuple[str, str], tuple[str, float, int]] = OrderedDict()

    def add(self, address: str, image: str, token: str) -> None:
        """Let an address fetch an image as if it sent a token."""
        self._held.pop((address, image), None)
        self._held[address, image] = (token, self._clock() + self._SECONDS, self._TIMES)
        if len(self._held) > self._MOST:
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
    """ASGI middleware that lets a request through if its caller may make it, and says who that is.

    Pure ASGI: neither uploads nor downloads are held back. It must be inside of ``Audited``, and outside of all routes.
    """

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self.app = app
        self.gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            caller = calling_now()
            refusal = self._refusal(scope, caller)
            if refusal is not None:
                if caller.user is None:
                    # Whoever has not logged in did nothing that is worth a record.
                    caller.done["what"] = None
                await refusal(scope, receive, send)
                return
            await self.app(scope, receive, self._handing_out(scope, caller, send))
        elif scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        else:
            # No route of this server is a web socket.
            await send({"type": "websocket.close", "code": 1008})

    def _refusal(self, scope: Scope, caller: Caller) -> Response | None:
        """Return the answer to a request that must go no further, or None, with ``caller.user`` set."""
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
        """Return ``send``, or for Next Sample one that lets the caller fetch the image that the answer names."""
        route = offered(scope["method"], scope["path"])
        token = token_of(Headers(scope=scope))
        if route is None or route.path != _SAMPLE or caller.user is None:
            return send

        async def sending(message: Message) -> None:
            # The endpoint has noted it; before the answer leaves, for the next request may come at once.
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
            # Whoever is at the address may have sent it, not only that user.
            caller.done["without_token"] = True
        return user


def token_of(headers: Headers) -> str:
    """Return the token of a request: from the header, else from the cookie; empty where there is none."""
    if (authorization := headers.get("authorization")) is not None:
        scheme, _, token = authorization.partition(" ")
        # What is no token is one that is wrong.
        return token.strip() if scheme.lower() == "bearer" and token.strip() else "-"
    try:
        cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return ""
    return cookie.value if cookie is not None else ""


def _is_local(scope: Scope) -> bool:
    """Whether a request came over this machine's own address, and not through a proxy from another machine."""
    server, client = scope.get("server"), scope.get("client")
    # A socket file has no port.
    here = server is None or server[1] is None or is_own_address(str(server[0]))
    return here and (client is None or is_own_address(str(client[0])))


def _log_in_first(scope: Scope, headers: Headers) -> Response:
    """A browser that looks at a page is shown where to log in; every program gets 401."""
    if scope["method"] == "GET" and "text/html" in headers.get("accept", ""):
        return RedirectResponse(f"{LOGIN_PAGE}?next={quote(scope['path'])}", 303, {"Cache-Control": "no-store"})
    return JSONResponse({"detail": "log in first, at /auth/token"}, 401, CHALLENGE)
