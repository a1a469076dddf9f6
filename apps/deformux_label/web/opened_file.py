"""Sending a file that somebody may delete or replace meanwhile."""

from __future__ import annotations

import os
from pathlib import Path

from fastapi import HTTPException
from fastapi.responses import FileResponse
from monailabel.utils.others.generic import get_mime_type
from starlette.types import Receive, Scope, Send

__all__ = ["OpenedFile"]


class OpenedFile(FileResponse):
    """A file as it is now: it is opened before the reply begins, and read through what was opened.

    Starlette's own opens the file by name after it has promised its size.

    Args:
        path: of the file.
        missing: the sentence of the 404 where there is none.
        filename: what the client is to call it; its own name without.
    """

    def __init__(self, path: str | Path, *, missing: str, filename: str | None = None) -> None:
        name = filename or os.path.basename(path)
        try:
            self._file = open(path, "rb")  # noqa: SIM115
            status = os.fstat(self._file.fileno())
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise HTTPException(404, missing) from error
        super().__init__(
            f"/dev/fd/{self._file.fileno()}", media_type=get_mime_type(name), filename=name, stat_result=status
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._file.close()
