"""What the app adds to MONAI Label's web server: a sentence for each bad request, and checks before training starts."""

from __future__ import annotations

import atexit
import errno
import json
import shutil
import tempfile
import traceback
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from monailabel.interfaces.exception import ImageNotFoundException, LabelNotFoundException, MONAILabelException
from starlette.exceptions import HTTPException as StarletteHTTPException

from .label_file import keep_label_file
from .routes import App, routers

__all__ = ["install", "private_uploads"]

# MONAI Label blames itself for these.
_CLIENT_FAULTS = {
    "Neither Image nor File not Session ID input is provided": "the request names no image; give an id, or upload it",
    "DICOM SEG format is not supported in a non-DICOM datastore": "DICOM SEG needs a DICOM web store",
}


def install(server: FastAPI, app: App) -> None:
    """Add the app's answers to a running MONAI Label server."""
    server.add_exception_handler(StarletteHTTPException, _http_exception)
    server.add_exception_handler(RequestValidationError, _validation_error)
    server.add_exception_handler(MONAILabelException, _monailabel_exception)
    for kind in (json.JSONDecodeError, TypeError, ValueError, AttributeError):
        server.add_exception_handler(kind, _endpoint_error)
    server.add_exception_handler(OSError, _os_error)
    keep_label_file(server)
    # In front of MONAI Label's routes of the same path.
    server.router.routes[:0] = [route for router in routers(app) for route in router.routes]
    # The handlers were collected when the server began to start; collect them again at the next request.
    server.middleware_stack = None


def private_uploads() -> Path:
    """Give this process a temporary folder of its own, where uploads land, and return it.

    MONAI Label hands an upload to the app as a path, like any path that a request may name; only in a folder of its
    own can the two be told apart. It also opens the names of deleted temporary files again, which is safe only where
    nobody else can write.
    """
    folder = tempfile.mkdtemp(prefix="deformux-label-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    tempfile.tempdir = folder
    return Path(folder)


def _answer(status: int, detail: str) -> JSONResponse:
    return JSONResponse({"detail": detail}, status_code=status)


async def _http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, StarletteHTTPException)
    if error.status_code == 500 and error.detail in _CLIENT_FAULTS:
        return _answer(400, _CLIENT_FAULTS[error.detail])
    return JSONResponse({"detail": error.detail}, status_code=error.status_code, headers=error.headers)


async def _validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return _answer(422, f"{where}: {first['msg']}")


async def _monailabel_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, MONAILabelException)
    missing = isinstance(error, ImageNotFoundException | LabelNotFoundException)
    return _answer(404 if missing else 400, error.msg)


async def _os_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, OSError)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return _answer(507, "the server's disk is full, so nothing was changed; make room and send it again")
    raise error


async def _endpoint_error(request: Request, error: Exception) -> JSONResponse:
    """A fault in MONAI Label's own reading of the request is the client's; any other goes on as a server error."""
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    own = [file for file in files if not file.startswith(str(Path(json.__file__).parent))]
    if own and str(Path("monailabel", "endpoints")) in own[-1]:
        where = f"; {error}" if isinstance(error, json.JSONDecodeError) else ""
        return _answer(400, f"the request's parameters must be one JSON object{where}")
    raise error
