"""The label file of an inference request, which MONAI Label loses when the request also names a label."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Coroutine, Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException
from fastapi.routing import APIRoute
from monailabel.config import settings
from monailabel.endpoints import infer

from deformux_label.offloop import with_endpoint, with_signature

__all__ = ["keep_label_file", "label_file_of"]


def keep_label_file(server: FastAPI) -> None:
    """Make requests to infer carry both the label file and the active label's name.

    MONAI Label puts the path of an uploaded label file under ``label``, and then everything of ``params`` beside it:
    SmartEdit's ``label``, the name of the active one, would replace the path. Where both come, the name moves to
    ``active_label``.
    """
    for route in infer.router.routes:
        if isinstance(route, APIRoute) and route.path.endswith("/{model}"):
            # In front of the route that it calls, which the server does not hold itself but through its router.
            both = with_endpoint(route, _with_both(route.endpoint), prefix=settings.MONAI_LABEL_API_STR)
            server.router.routes.insert(0, both)


def label_file_of(
    request: Mapping[str, Any], names: Collection[str], uploads: Path | None
) -> tuple[Path | None, str | None]:
    """The uploaded label file and the active label's name of a request to infer, as far as there are any.

    Raises:
        HTTPException: 400 where ``label`` is no name, 403 where it names a file that was not uploaded.
    """
    label, active = request.get("label"), request.get("active_label")
    for value in (label, active):
        if value is not None and not isinstance(value, str):
            raise HTTPException(400, f"label must be the name of one label; got {value!r}")
    if not label or label in names or ("/" not in label and "\\" not in label):
        return None, active or label or None
    path = None if "\0" in label else Path(label).resolve()
    if path is None or uploads is None or not path.is_relative_to(uploads.resolve()) or not path.is_file():
        raise HTTPException(403, "label must be the name of a label; send a label file as a part of the request")
    return path, active or None


def _with_both(endpoint: Callable[..., Any]) -> Callable[..., Coroutine[Any, Any, Any]]:
    async def run(**arguments: Any) -> Any:
        if arguments.get("label") is not None:
            arguments["params"] = _moved(arguments.get("params"))
        return await endpoint(**arguments)

    return with_signature(run, endpoint)


def _moved(params: Any) -> Any:
    try:
        values = json.loads(params or "{}")
    except ValueError:
        return params  # MONAI Label's own reading says what is wrong
    if not isinstance(values, dict) or "label" not in values:
        return params
    values["active_label"] = values.pop("label")
    return json.dumps(values)
