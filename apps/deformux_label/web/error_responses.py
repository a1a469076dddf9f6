"""Responses to failed requests: a status and one sentence."""

from __future__ import annotations

import errno
import json
import logging
import traceback
from pathlib import Path

import psutil
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from monailabel.interfaces.exception import ImageNotFoundException, LabelNotFoundException, MONAILabelException
from starlette.exceptions import HTTPException as StarletteHTTPException

from deformux_label.web.checked_route import DISK_FULL

__all__ = ["install_error_responses"]

logger = logging.getLogger(__name__)

# MONAI Label answers these with 500.
_CLIENT_FAULTS = {
    "Neither Image nor File not Session ID input is provided": "the request names no image; give an id, or upload it",
    "DICOM SEG format is not supported in a non-DICOM datastore": "DICOM SEG needs a DICOM web store",
}


def install_error_responses(server: FastAPI) -> None:
    """Make a server answer every exception with one sentence."""
    server.add_exception_handler(StarletteHTTPException, _http_exception)
    server.add_exception_handler(RequestValidationError, _validation_error)
    server.add_exception_handler(MONAILabelException, _monailabel_exception)
    for kind in (json.JSONDecodeError, TypeError, ValueError, AttributeError):
        server.add_exception_handler(kind, _endpoint_error)
    server.add_exception_handler(OSError, _os_error)
    server.add_exception_handler(psutil.NoSuchProcess, _ended_meanwhile)
    server.add_exception_handler(Exception, _unexpected)


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
        return _answer(507, DISK_FULL)
    return _failed(error)


async def _endpoint_error(request: Request, error: Exception) -> JSONResponse:
    """Return 400 if MONAI Label failed to read the request, else 500."""
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    own = [file for file in files if not file.startswith(str(Path(json.__file__).parent))]
    if own and str(Path("monailabel", "endpoints")) in own[-1]:
        where = f"; {error}" if isinstance(error, json.JSONDecodeError) else ""
        return _answer(400, f"the request's parameters must be one JSON object{where}")
    return _failed(error)


async def _ended_meanwhile(request: Request, error: Exception) -> JSONResponse:
    return _answer(409, "the task has just ended by itself; ask for its status")


async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    return _failed(error)


def _failed(error: Exception) -> JSONResponse:
    """Return 500 without any path or value; the log gets the details."""
    logger.error("A request failed", exc_info=error)
    return _answer(500, "the server failed to answer this request; its log says why")
