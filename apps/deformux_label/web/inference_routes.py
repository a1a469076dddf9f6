"""Routes of inference, and the files of their requests: a volume, a session's volume, a label."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import APIRouter, HTTPException
from fastapi.routing import APIRoute
from monailabel.config import settings
from monailabel.endpoints import infer

from deformux_label.lib.requests.json_text import json_object
from deformux_label.lib.requests.uploads import stored_upload
from deformux_label.lib.store.volume_sessions import VolumeSessions
from deformux_label.web.worker_threads import with_endpoint, with_signature

__all__ = ["inference_router"]


def inference_router(sessions: VolumeSessions | None) -> APIRouter:
    """Return MONAI Label's routes of inference, with this app's handling of files.

    MONAI Label would copy each upload again, leave the copy behind when the request fails, trust a session's image path
    and let ``params`` choose a different model than the path. It also puts the path of an uploaded label file under
    ``label`` and then merges ``params``: SmartEdit's ``label``, the name of the active label, would replace the
    path. If both are sent, the name moves to ``active_label``.
    """
    router = APIRouter()
    for route in infer.router.routes:
        if isinstance(route, APIRoute):
            endpoint = _with_files(route.endpoint, sessions)
            router.routes.append(with_endpoint(route, endpoint, prefix=settings.MONAI_LABEL_API_STR))
    return router


def _with_files(
    endpoint: Callable[..., Any], sessions: VolumeSessions | None
) -> Callable[..., Coroutine[Any, Any, Any]]:
    async def run(**arguments: Any) -> Any:
        if arguments.get("output") == "dicom_seg":
            raise HTTPException(400, "DICOM SEG needs a DICOM web store; ask for output=image or output=all")
        params = json_object(arguments.get("params"))
        # The path names the model; it has already decided which role may call the route.
        params.pop("model", None)
        if arguments.get("session_id"):
            if sessions is None:
                raise HTTPException(404, "this server keeps no sessions; send the volume with the request")
            arguments["image"] = str(sessions.find(arguments["session_id"]).image)
        elif arguments.get("file") is not None:
            arguments["image"] = str(stored_upload(arguments["file"], "upload"))
        elif not arguments.get("image"):
            raise HTTPException(400, "the request names no image; give an id, or upload it")
        if arguments.get("session_id") or arguments.get("file") is not None:
            params.pop("image", None)
        if arguments.get("label") is not None:
            if "label" in params:
                params["active_label"] = params.pop("label")
            params["label"] = str(stored_upload(arguments["label"], "label"))
        return await endpoint(
            **{**arguments, "params": json.dumps(params), "file": None, "label": None, "session_id": ""}
        )

    return with_signature(run, endpoint)
