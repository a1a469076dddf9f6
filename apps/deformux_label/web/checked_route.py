"""Base class of all routes: checks a whole request once, before its endpoint sees it."""

from __future__ import annotations

import errno
from collections.abc import Callable, Coroutine
from typing import Any
from uuid import UUID

import anyio.to_thread
from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute
from starlette.datastructures import FormData

from deformux_label.lib.requests.identifiers import checked_image_id, checked_tag, checked_text, checked_version
from deformux_label.lib.requests.json_text import read_json
from deformux_label.web.multipart import read_multipart

__all__ = ["DISK_FULL", "CheckedRoute"]

DISK_FULL = "the server's disk is full, so nothing was changed; free some space and send it again"
# Most slices of a DICOM series.
_MAX_SERIES_FILES = 1_000
# Larger bodies are parsed in a thread, because parsing blocks the event loop.
_MAX_BYTES_ON_LOOP = 20_000
_MAX_PATH_BYTES = 8_000


class CheckedRoute(APIRoute):
    """A route that checks names, JSON and forms before its endpoint sees them."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        files = _MAX_SERIES_FILES if self.path.endswith("/session/") else 2
        upload = self.path.endswith(("/datastore/image", "/datastore/")) and "PUT" in (self.methods or ())

        async def run(request: Request) -> Response:
            for name, value in (*request.path_params.items(), *request.query_params.multi_items()):
                _check_name(name, value, request.scope["path"], upload)
            checked = _CheckedRequest(request.scope, request.receive)
            checked.most_files = files
            return await handle(checked)

        return run


class _CheckedRequest(Request):
    most_files = 2

    async def json(self) -> Any:
        if not hasattr(self, "_checked_json"):
            body = await self.body()
            if len(body) > _MAX_BYTES_ON_LOOP:
                self._checked_json = await anyio.to_thread.run_sync(read_json, body)
            else:
                self._checked_json = read_json(body)
        return self._checked_json

    async def _get_form(self, **limits: Any) -> FormData:  # noqa: ARG002
        """Read a form with the limits of ``read_multipart`` in place of Starlette's."""
        if self._form is None:
            kind = self.headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind == "multipart/form-data":
                self._form = await self._multipart()
            else:
                self._form = await super()._get_form(max_files=0, max_fields=100)
            for name, value in self._form.multi_items():
                if not isinstance(value, str):
                    continue
                if name in ("params", "info") and len(value) > _MAX_BYTES_ON_LOOP:
                    await anyio.to_thread.run_sync(_check_field, name, value)
                else:
                    _check_field(name, value)
        return self._form

    async def _multipart(self) -> FormData:
        try:
            return await read_multipart(self.headers, self.stream(), most_files=self.most_files)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise HTTPException(507, DISK_FULL) from error
            raise


def _check_field(name: str, value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise HTTPException(400, f"the form's field {ascii(name)[:60]} must be valid Unicode") from error
    if name in ("params", "info") and value:
        read_json(value, name=name)


def _check_name(name: str, value: Any, path: str, upload: bool) -> None:
    """Refuse an invalid name; the endpoint checks whether it exists."""
    if name in ("image", "id", "label") and "/infer/" not in path:
        checked_image_id(value, status=400 if upload else 404)
    elif name == "image":
        # A client may also send a path inside the studies folder.
        checked_text(name, value, _MAX_PATH_BYTES)
    elif name == "tag" and value:
        checked_tag(value)
    elif name == "session_id" and value:
        _check_session(str(value))
    elif name == "name" and "/versions/" in path:
        checked_version(value)
    else:
        checked_text(f"the parameter {ascii(name)[:60]}", str(value), _MAX_PATH_BYTES)


def _check_session(value: str) -> None:
    try:
        known = str(UUID(value)) == value.lower()
    except ValueError:
        known = False
    if not known:
        raise HTTPException(404, f"{value[:60]!a} is not a session; PUT /session/ returns the id of a new one")
