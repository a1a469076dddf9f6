"""The login in front of every route: tokens for the Slicer extension, a cookie for browsers."""

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
from deformux_label.web.attempts import Attempts, TooManyAttempts
from deformux_label.web.known_addresses import KnownAddresses, network_of
from deformux_label.web.listening import NO_LOGIN, is_own_address
from deformux_label.web.route_roles import offered
from deformux_label.web.tokens import Tokens
from deformux_label.web.users import InvalidUsers, User, Users, verified

__all__ = ["CHALLENGE", "COOKIE", "LOGIN_PAGE", "UNAVAILABLE", "Gate", "Login", "token_of"]

logger = logging.getLogger(__name__)

COOKIE = "deformux-label"
LOGIN_PAGE = "/auth/login"
CHALLENGE = {"WWW-Authenticate": "Bearer"}
UNAVAILABLE = "login is unavailable: the server's users file is damaged; ask the administrator to repair it"
_WRONG = "the user name or the password is wrong"
# Longer than any valid name, so a truncated name never matches a user.
_MAX_NAME_LENGTH = 200
_MAX_RECORDED_LENGTH = 64
_IMAGE = "/datastore/image"
_SAMPLE = "/activelearning/{strategy}"
# Each password check keeps a core busy for a quarter of a second.
_CHECKS = CapacityLimiter(2)
# Logins from known addresses do not wait behind guesses from others.
_KNOWN_ADDRESS_CHECKS = CapacityLimiter(2)


class Gate:
    """Whether login is on, and which user each token belongs to.

    Login is on once a user exists, and stays on until the server ends: a users file that is emptied, deleted or damaged
    locks everybody out.
    """

    def __init__(self, users: Users, *, insecure: bool = False) -> None:
        self.users = users
        self.insecure = insecure
        self.tokens = Tokens(users)
        self.attempts = Attempts(KnownAddresses(users.path.with_name(f"{users.path.name}.home")))
        self.image_grants = ImageGrants()
        self._was_on = False

    @property
    def on(self) -> bool:
        """Return whether login is required."""
        if not self._was_on:
            try:
                self._was_on = bool(self.users.all())
            except InvalidUsers:
                return True
        return self._was_on

    def user_of(self, headers: Headers) -> User | None:
        """Return the user of the token in these headers, None without a valid one; raise InvalidUsers."""
        token = token_of(headers)
        return self.tokens.user(token) if token else None

    async def log_in(self, name: str, password: str, address: str) -> str:
        """Return a token for a name and its password.

        Raises:
            HTTPException: 401 for a wrong name or password, 429 after too many failed attempts.
            InvalidUsers: the users file is damaged.
        """
        name = unicodedata.normalize("NFC", name)[:_MAX_NAME_LENGTH]
        shown = ascii(name)[:80]
        # A damaged file fails here, before any password is checked.
        self.users.all()
        # Valid names fit in this length.
        note(what="log in", user=name[:_MAX_RECORDED_LENGTH])
        try:
            async with self.attempts.attempt(name, address) as attempt:
                user = self.users.all().get(name)
                checks = _KNOWN_ADDRESS_CHECKS if attempt.from_known_address else _CHECKS
                if not await anyio.to_thread.run_sync(verified, user, password, limiter=checks) or user is None:
                    logger.warning("Failed login of %s from %s", shown, address)
                    raise HTTPException(401, _WRONG, headers=CHALLENGE)
                attempt.succeeded()
        except TooManyAttempts as error:
            if error.should_log:
                logger.warning(
                    "Refusing logins from %s (last name tried: %s): too many failed attempts", address, shown
                )
            else:
                note(what=None)
            raise HTTPException(429, str(error), headers={"Retry-After": str(error.seconds)}) from error
        await anyio.to_thread.run_sync(
            self.attempts.known_addresses.add, name, network_of(address), limiter=_KNOWN_ADDRESS_CHECKS
        )
        note(role=user.role)
        return self.tokens.make(user)


class ImageGrants:
    """Images that an address may fetch without a token, because Next Sample has just returned them.

    Slicer's SampleData module sends no headers. Therefore the address of a logged-in annotator may fetch that image a
    few times within some minutes, while the annotator's token is valid.
    """

    _SECONDS = 300.0
    _MAX_FETCHES = 3
    _MAX_HELD = 1_000

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._held: OrderedDict[tuple[str, str], tuple[str, float, int]] = OrderedDict()

    def add(self, address: str, image: str, token: str) -> None:
        """Let an address fetch an image as if it had sent this token."""
        self._held.pop((address, image), None)
        self._held[address, image] = (token, self._clock() + self._SECONDS, self._MAX_FETCHES)
        if len(self._held) > self._MAX_HELD:
            self._held.popitem(last=False)

    def take(self, address: str, image: str) -> str | None:
        """Return the token under which an address may fetch an image now, or None; count the fetch."""
        token, until, times = self._held.pop((address, image), ("", 0.0, 0))
        if until <= self._clock():
            return None
        if times > 1:
            self._held[address, image] = (token, until, times - 1)
        return token


class Login:
    """ASGI middleware that identifies the user of a request, and refuses requests that their role does not allow.

    Plain ASGI, so that uploads and downloads are streamed. It must be inside ``Audited`` and outside all routes.
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
                    # Requests without a user are not recorded.
                    caller.done["what"] = None
                await refusal(scope, receive, send)
                return
            await self.app(scope, receive, self._granting_image(scope, caller, send))
        elif scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        else:
            # This server has no web sockets.
            await send({"type": "websocket.close", "code": 1008})

    def _refusal(self, scope: Scope, caller: Caller) -> Response | None:
        """Return the response to a request that is refused; else set ``caller.user`` and return None."""
        if not self.gate.on:
            if self.gate.insecure or _is_local(scope):
                return None
            return JSONResponse({"detail": NO_LOGIN}, 403)
        route = offered(scope["method"], scope["path"])
        if route is None:
            return JSONResponse({"detail": "this server has no such route"}, 404)
        if route.role is None:
            return None
        headers = Headers(scope=scope)
        try:
            caller.user = self.gate.user_of(headers) or self._without_token(scope, headers, caller)
        except InvalidUsers as error:
            logger.error("Login is unavailable: %s", error)
            return JSONResponse({"detail": UNAVAILABLE}, 503)
        if caller.user is None:
            return _log_in_first(scope, headers)
        if not may(caller.user.role, route.role):
            detail = f"this needs the role {route.role} or higher; {caller.user.name!r} has the role {caller.user.role}"
            return JSONResponse({"detail": detail}, 403)
        return None

    def _granting_image(self, scope: Scope, caller: Caller, send: Send) -> Send:
        """Return ``send``; for Next Sample, one that also lets the caller fetch the image in the response."""
        route = offered(scope["method"], scope["path"])
        token = token_of(Headers(scope=scope))
        if route is None or route.path != _SAMPLE or caller.user is None:
            return send

        async def sending(message: Message) -> None:
            # The endpoint has recorded the image. Register it before replying: the client may request the file at once.
            image = caller.done.get("image")
            if message["type"] == "http.response.start" and message["status"] == 200 and isinstance(image, str):
                self.gate.image_grants.add(caller.address, image, token)
            await send(message)

        return sending

    def _without_token(self, scope: Scope, headers: Headers, caller: Caller) -> User | None:
        if scope["method"] != "GET" or scope["path"] != _IMAGE or token_of(headers):
            return None
        images = parse_qs(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True).get("image", [])
        token = self.gate.image_grants.take(caller.address, images[0]) if len(images) == 1 else None
        user = self.gate.tokens.user(token) if token is not None else None
        if user is not None:
            # Anyone at the address may have sent it, not only that user.
            caller.done["without_token"] = True
        return user


def token_of(headers: Headers) -> str:
    """Return the token of a request, from the header, else from the cookie; empty without one."""
    if (authorization := headers.get("authorization")) is not None:
        scheme, _, token = authorization.partition(" ")
        # Any other header counts as a wrong token.
        return token.strip() if scheme.lower() == "bearer" and token.strip() else "-"
    try:
        cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return ""
    return cookie.value if cookie is not None else ""


def _is_local(scope: Scope) -> bool:
    """Return whether a request came from this machine, and not through a proxy from a different one."""
    server, client = scope.get("server"), scope.get("client")
    # Unix sockets have no port.
    here = server is None or server[1] is None or is_own_address(str(server[0]))
    return here and (client is None or is_own_address(str(client[0])))


def _log_in_first(scope: Scope, headers: Headers) -> Response:
    """Redirect a browser that requests a page to the login page; return 401 to programs."""
    if scope["method"] == "GET" and "text/html" in headers.get("accept", ""):
        return RedirectResponse(f"{LOGIN_PAGE}?next={quote(scope['path'])}", 303, {"Cache-Control": "no-store"})
    return JSONResponse({"detail": "log in first, at /auth/token"}, 401, CHALLENGE)
