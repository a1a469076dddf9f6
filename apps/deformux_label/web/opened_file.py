"""A response with a file that may be deleted or replaced while it is sent."""

from __future__ import annotations

import os
from pathlib import Path

from fastapi import HTTPException
from fastapi.responses import FileResponse
from monailabel.utils.others.generic import get_mime_type
from starlette.types import Receive, Scope, Send

__all__ = ["OpenedFile"]


class OpenedFile(FileResponse):
    """A response with a file that is opened before the response begins, and read through that handle.

    Starlette's own response opens the file by name after it has sent its size.

    Args:
        path: path of the file.
        missing: detail of the 404 if the file does not exist.
        filename: name for the client; the file's own by default.
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
