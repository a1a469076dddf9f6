"""Routes about the server itself: its log, GPU and scoring, and model files, which are refused."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, HTTPException, Query
from fastapi.responses import PlainTextResponse
from monailabel.config import settings
from monailabel.endpoints.user.auth import RBAC, User
from monailabel.utils.async_tasks.task import AsyncTask
from monailabel.utils.async_tasks.utils import tasks

from deformux_label.lib.requests.options import known, refuse_unknown
from deformux_label.web.worker_threads import in_thread

__all__ = ["about_router", "scoring_router"]

_MAX_LINES = 10_000
_MAX_LINE = 4_000
# Options that a scoring method reads.
_OPTIONS = {"dice": ("y", "y_pred")}
_ADMIN = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ADMIN))
_ANNOTATOR = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ANNOTATOR))


def about_router() -> APIRouter:
    """Return the routes of the log, the GPU, and the model files."""
    router = APIRouter(prefix=settings.MONAI_LABEL_API_STR, tags=["Others"])

    def logs(lines: int = Query(300, ge=1, le=_MAX_LINES), user: User = _ADMIN) -> PlainTextResponse:
        """Return the last lines of the log as plain text."""
        file = Path(settings.MONAI_LABEL_APP_DIR, "logs", "app.log")
        if not file.is_file():
            raise HTTPException(404, "this server writes no log file")
        with file.open(encoding="utf-8", errors="replace") as log:
            last = deque(log, lines)
        return PlainTextResponse("".join(line[:_MAX_LINE] for line in last))

    def gpu(user: User = _ADMIN) -> PlainTextResponse:
        """Return the output of nvidia-smi."""
        if shutil.which("nvidia-smi") is None:
            raise HTTPException(404, "this server has no nvidia-smi, and probably no GPU")
        try:
            done = subprocess.run(["nvidia-smi"], capture_output=True, timeout=30, check=True)
        except (OSError, subprocess.SubprocessError) as error:
            raise HTTPException(404, "nvidia-smi failed on this server") from error
        return PlainTextResponse(done.stdout.decode(errors="replace"))

    def model(model: str, user: User = _ADMIN) -> None:
        # MONAI Label's endpoints overwrite and delete the file in place, while requests use it.
        raise HTTPException(405, "only training writes model versions; they cannot be uploaded or downloaded")

    router.add_api_route("/logs/", in_thread(logs, threads=2), methods=["GET"])
    router.add_api_route("/logs/gpu", in_thread(gpu, threads=1), methods=["GET"])
    for method in ("GET", "PUT", "DELETE"):
        router.add_api_route(
            "/model/{model}", in_thread(model, threads=1), methods=[method], name=f"{method.lower()}_model"
        )
    return router


def scoring_router(methods: Callable[[], Mapping[str, Any]]) -> APIRouter:
    """Return the routes of scoring, which runs once at a time.

    Args:
        methods: returns the scoring methods by name.
    """
    router = APIRouter(prefix=f"{settings.MONAI_LABEL_API_STR}/scoring", tags=["Scoring"])
    # Otherwise two simultaneous requests would both find no scoring running.
    starting = threading.Lock()

    def start(requests: Mapping[str, Mapping[str, Any]], run_sync: bool) -> dict[str, Any]:
        if run_sync:
            raise HTTPException(400, "scoring runs only in the background; leave out run_sync and ask for its status")
        for name, options in requests.items():
            if not isinstance(options, dict):
                raise HTTPException(400, "the options of a scoring method must be an object")
            refuse_unknown(options, _OPTIONS.get(name, ()), f"the scoring method {name}")
        with starting:
            if any(task["status"] in ("SUBMITTED", "RUNNING") for task in tasks("scoring")):
                raise HTTPException(429, "scoring is already running; ask for its status, or stop it first")
            return {
                name: AsyncTask.run("scoring", request={"method": name}, params=dict(options), enqueue=True)[0]
                for name, options in requests.items()
            }

    def run_all(params: dict | None = None, run_sync: bool = False, user: User = _ANNOTATOR) -> Any:
        given = params or {}
        refuse_unknown(given, methods(), "scoring")
        started = start({name: given.get(name) or {} for name in methods()}, run_sync)
        return {name: {"result": task, "detail": None} for name, task in started.items()}

    def run_one(method: str, params: dict | None = None, run_sync: bool = False, user: User = _ANNOTATOR) -> Any:
        known("scoring method", method, methods())
        return start({method: params or {}}, run_sync)[method]

    def stop(user: User = _ANNOTATOR) -> Any:
        return AsyncTask.stop("scoring")

    router.add_api_route("/", in_thread(run_all, threads=2), methods=["POST"], include_in_schema=False)
    router.add_api_route("/{method}", in_thread(run_one, threads=2), methods=["POST"])
    router.add_api_route("/", in_thread(stop, threads=2), methods=["DELETE"])
    return router
