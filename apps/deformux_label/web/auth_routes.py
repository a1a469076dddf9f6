"""Routes of the login: three for the Slicer extension, and a page and a cookie for browsers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Form, HTTPException, Query, Request
from fastapi.responses import RedirectResponse, Response

from deformux_label.lib.requests.caller import note
from deformux_label.web.login import CHALLENGE, COOKIE, LOGIN_PAGE, UNAVAILABLE, Gate, token_of
from deformux_label.web.login_page import login_page
from deformux_label.web.route_roles import offered
from deformux_label.web.tokens import SECONDS
from deformux_label.web.users import InvalidUsers, User

__all__ = ["auth_router"]

logger = logging.getLogger(__name__)

_MAX_FIELD_LENGTH = 4_096


def auth_router(gate: Gate) -> APIRouter:
    """Return the routes of the login."""
    router = APIRouter(prefix="/auth", tags=["Auth"])
    _add_token_routes(router, gate)
    _add_browser_routes(router, gate)
    return router


def _add_token_routes(router: APIRouter, gate: Gate) -> None:
    @router.get("/", summary="Check whether login is required")
    async def enabled() -> Mapping[str, Any]:
        return {"enabled": gate.on, "client_id": COOKIE, "realm": ""}

    @router.post("/token", summary="Log in for a token")
    async def token(request: Request, username: str = _field(), password: str = _field()) -> Mapping[str, Any]:
        if not gate.on:
            return {"access_token": None, "token_type": None}
        made = await _log_in(gate, request, username, password)
        return {"access_token": made, "token_type": "bearer", "expires_in": SECONDS}

    @router.get("/token/valid", summary="Check whether a token is valid")
    async def valid(request: Request) -> Mapping[str, Any]:
        if not gate.on:
            raise HTTPException(404, "this server has no login")
        user = _user_of(gate, request)
        if user is None:
            raise HTTPException(401, "the token is invalid or has expired; log in again", headers=CHALLENGE)
        return {"username": user.name, "email": None, "name": user.name, "roles": [user.role]}


def _add_browser_routes(router: APIRouter, gate: Gate) -> None:
    @router.get("/login", include_in_schema=False)
    async def page(request: Request, after: str = Query("/", alias="next")) -> Response:
        if not gate.on or _user_of(gate, request) is not None:
            return _redirect(_local(after))
        return login_page(LOGIN_PAGE, _local(after))

    @router.post("/login", include_in_schema=False)
    async def submit(
        request: Request, username: str = _field(), password: str = _field(), after: str = Form("/", alias="next")
    ) -> Response:
        if not gate.on:
            return _redirect(_local(after))
        try:
            made = await _log_in(gate, request, username, password)
        except HTTPException as error:
            sentence = f"{str(error.detail)[0].upper()}{str(error.detail)[1:]}."
            headers = dict(error.headers or {})
            return login_page(
                LOGIN_PAGE,
                _local(after),
                name=username,
                error=sentence,
                status=error.status_code,
                more=headers,
            )
        answer = _redirect(_local(after))
        _set_cookie(answer, request, made, SECONDS)
        return answer

    @router.post("/logout", include_in_schema=False)
    async def log_out(request: Request) -> Response:
        if gate.on and (token := token_of(request.headers)):
            user = _user_of(gate, request)
            if user is not None:
                note(what="log out", user=user.name, role=user.role)
            gate.tokens.end(token)
        answer = _redirect(LOGIN_PAGE)
        _set_cookie(answer, request, "", 0)
        return answer


def _field() -> Any:
    return Form(..., max_length=_MAX_FIELD_LENGTH)


async def _log_in(gate: Gate, request: Request, username: str, password: str) -> str:
    address = request.client.host if request.client else ""
    try:
        return await gate.log_in(username, password, address)
    except InvalidUsers as error:
        raise _unavailable(error) from error


def _user_of(gate: Gate, request: Request) -> User | None:
    try:
        return gate.user_of(request.headers)
    except InvalidUsers as error:
        raise _unavailable(error) from error


def _unavailable(error: InvalidUsers) -> HTTPException:
    logger.error("Login is unavailable: %s", error)
    return HTTPException(503, UNAVAILABLE)


def _redirect(path: str) -> RedirectResponse:
    return RedirectResponse(path, 303, {"Cache-Control": "no-store"})


def _local(path: str) -> str:
    """Return the path to open after a login: always a route of this server, so that a link cannot lead elsewhere."""
    return path if offered("GET", path) is not None and "//" not in path and "\\" not in path else "/"


def _set_cookie(answer: Response, request: Request, token: str, seconds: int) -> None:
    secure = request.url.scheme == "https"
    answer.set_cookie(COOKIE, token, max_age=seconds, path="/", httponly=True, samesite="strict", secure=secure)
