"""MONAI Label's web server with blocking endpoints in threads: ``--uvicorn_app deformux_label.server:app``.

MONAI Label's endpoints are coroutines over blocking code, so an inference blocks every other request, even
``GET /info/``. Here each endpoint runs in a thread; inference waits for its turn on its device, and a client that
disconnects loses its place. Nothing else changes: under MONAI Label's own ``start_server`` the responses are the same.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import FileResponse
from fastapi.routing import APIRoute
from monailabel.config import settings
from monailabel.endpoints import (
    activelearning,
    batch_infer,
    datastore,
    infer,
    info,
    logs,
    model,
    ohif,
    scoring,
    session,
    train,
    wsi_infer,
)
from monailabel.utils.others.generic import name_to_device

from deformux_label.lib.requests.caller import current_user
from deformux_label.web.inference_queue import Turn, Turns
from deformux_label.web.worker_threads import in_thread, watched, with_endpoint

__all__ = ["app"]

# Threads of each group of endpoints; separate, so that no group waits for another: uploads and archives take seconds,
# stopping a training may take longer.
_THREADS = {
    info: 8,
    activelearning: 8,
    datastore: 16,
    session: 8,
    train: 4,
    scoring: 4,
    batch_infer: 4,
    model: 4,
    logs: 4,
    ohif: 8,
    wsi_infer: 4,
}
# Bytes of a file that are read and sent at a time. Each read is handed to a thread: with Starlette's 64 KiB that took
# half a second for the mask of a CT of 512 × 512 × 300 voxels.
_FILE_CHUNK = 2**20


def _off_the_loop() -> FastAPI:
    """Return MONAI Label's app with endpoints that do not block its event loop."""
    turns = Turns()
    FileResponse.chunk_size = _FILE_CHUNK

    async def turn(arguments: Mapping[str, Any], request: Request) -> Turn:
        return await turns.take(*_device_and_client(arguments, request))

    for module, threads in _THREADS.items():
        _replace(module.router, partial(in_thread, threads=threads))
    _replace(infer.router, partial(watched, turn=turn))
    # The import adds the routers and prints allowed origins, which do not apply here: the perimeter replaces them.
    with contextlib.redirect_stdout(io.StringIO()):
        from monailabel.app import app as server

    async def inferences() -> dict[str, dict[str, Any]]:
        """Return, for each device, the client whose inference runs, its windows, and those waiting, in order."""
        return turns.state()

    server.add_api_route(f"{settings.MONAI_LABEL_API_STR}/deformux/inferences", inferences, methods=["GET"])
    return server


def _replace(router: APIRouter, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    for number, route in enumerate(router.routes):
        if isinstance(route, APIRoute):
            router.routes[number] = with_endpoint(route, make(route.endpoint))


def _device_and_client(arguments: Mapping[str, Any], request: Request) -> tuple[str, str]:
    """Return (device, client) for queueing; the endpoint itself refuses invalid parameters."""
    try:
        params = json.loads(arguments.get("params") or "{}")
    except ValueError:
        params = None
    if not isinstance(params, dict):
        params = {}
    device = params.get("device")
    device = device[0] if isinstance(device, list) and device else device
    user = current_user()
    client = user.name if user else params.get("client_id") or (request.client.host if request.client else "")
    return name_to_device(device if isinstance(device, str) else None), str(client)


app = _off_the_loop()
