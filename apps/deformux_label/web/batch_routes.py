"""Routes of batch inference, which replace MONAI Label's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from fastapi import APIRouter, Depends, HTTPException
from monailabel.config import settings
from monailabel.endpoints.user.auth import RBAC

from deformux_label.lib.infers.batch_inference import BatchInferences, batch_options
from deformux_label.lib.requests.caller import with_login
from deformux_label.web.worker_threads import in_thread

__all__ = ["batch_router"]

_ADMIN = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ADMIN))
_USER = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_USER))


class _App(Protocol):
    batches: BatchInferences

    def check_batch_inference(self, model: str) -> None:
        """Raise HTTPException for a model that cannot segment a volume by itself."""


def batch_router(app: _App) -> APIRouter:
    """Return ``POST /batch/infer/{model}``, ``GET /batch/infer`` and ``DELETE /batch/infer``."""
    router = APIRouter(prefix=f"{settings.MONAI_LABEL_API_STR}/batch", tags=["Infer"])

    def run(model: str, images: str = "all", params: dict | None = None, run_sync: bool = False) -> Any:
        options = batch_options(images, params or {})
        app.check_batch_inference(model)
        # The batch process has no login; the audit log takes the user from the request.
        task = app.batches.start(with_login({**options, "model": model}))
        return app.batches.wait(task["id"]) if run_sync else task

    def status(all: bool = False, check_if_running: bool = False) -> Any:
        if all and not check_if_running:
            found: Any = app.batches.tasks()
        else:
            found = app.batches.unfinished() if check_if_running else app.batches.latest()
        if not found:
            raise HTTPException(
                404, "no batch inference is running" if check_if_running else "no batch inference has run yet"
            )
        return found

    def stop() -> Any:
        return app.batches.stop()

    def add(path: str, method: str, endpoint: Callable[..., Any], role: Any) -> None:
        router.add_api_route(
            path, in_thread(endpoint, threads=4), methods=[method], dependencies=[role], include_in_schema=False
        )

    add("/infer", "GET", status, _USER)
    add("/infer", "DELETE", stop, _ADMIN)
    add("/infer/{model}", "POST", run, _ADMIN)
    return router
