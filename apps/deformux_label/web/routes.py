"""Routes of this app, including those that replace MONAI Label's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, Protocol

from fastapi import APIRouter, Depends, File, Form, HTTPException, Request, UploadFile
from monailabel.config import settings
from monailabel.endpoints.user.auth import RBAC, User
from monailabel.interfaces.datastore import Datastore

from deformux.publishing.model_versions import ModelVersions
from deformux_label.lib.activelearning.strategies import ADDRESS
from deformux_label.lib.configs.server import ServerOptions
from deformux_label.lib.infers.batch_inference import BatchInferences
from deformux_label.lib.infers.click_cache import ClickCache
from deformux_label.lib.requests.caller import current_user, note, require, with_login
from deformux_label.lib.requests.identifiers import checked_revision, checked_version
from deformux_label.lib.requests.options import refuse_unknown, with_checked_client
from deformux_label.lib.requests.submission import FINAL_TAG, Submission
from deformux_label.lib.requests.uploads import stored_upload
from deformux_label.lib.store.annotated_slices import FIELD
from deformux_label.lib.store.annotator import annotator_of
from deformux_label.lib.store.datastore import CheckedDatastore
from deformux_label.lib.store.label_fields import client_fields
from deformux_label.lib.store.leases import Lease, Leases
from deformux_label.lib.store.volume_sessions import VolumeSessions
from deformux_label.lib.trainers.queue import AlreadyTraining, TrainingQueue
from deformux_label.web.api_pages import pages_router
from deformux_label.web.batch_routes import batch_router
from deformux_label.web.inference_routes import inference_router
from deformux_label.web.opened_file import OpenedFile
from deformux_label.web.server_routes import about_router, scoring_router
from deformux_label.web.upload_routes import datastore_router, session_router
from deformux_label.web.worker_threads import in_thread

__all__ = ["App", "routers"]

_ADMIN = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ADMIN))
_ANNOTATOR = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ANNOTATOR))
_USER = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_USER))
_LABEL_FILE = File(...)


class App(Protocol):
    """The part of the app that the routes need."""

    queue: TrainingQueue
    leases: Leases
    batches: BatchInferences
    click_cache: ClickCache
    server_options: ServerOptions

    def sessions(self) -> VolumeSessions | None:
        """Return the volumes that clients uploaded temporarily; None if the server keeps none."""

    def datastore(self) -> Datastore:
        """Return the studies."""

    def versions(self) -> ModelVersions:
        """Return the project's model versions."""

    def options_of(self, kind: str, name: str) -> set[str]:
        """Return the options of a trainer or strategy; raise HTTPException 404 for an unknown one."""

    def scoring_methods(self) -> Mapping[str, Any]:
        """Return the scoring methods by name."""

    def check_training(self, model: str | None, options: dict[str, Any]) -> None:
        """Raise HTTPException for a training that cannot work."""

    def check_batch_inference(self, model: str) -> None:
        """Raise HTTPException for a batch inference that cannot work."""

    def next_sample(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the choice of an active-learning strategy."""

    def started_from(self, annotator: str, image_id: str) -> str | None:
        """Return the version of the model that made the proposal shown to an annotator."""

    def on_save_label(self, image_id: str, label_id: str) -> dict[str, Any] | None:
        """React to a stored label."""

    def submitted(self, image_id: str, tag: str) -> None:
        """Release the volume of a saved label."""

    def model_changed(self) -> None:
        """Serve the version that was just published."""


def routers(app: App) -> list[APIRouter]:
    """Return the routers to put in front of MONAI Label's."""
    return [
        _training(app),
        _samples(app),
        _labels(app),
        _leases(app),
        _sessions(app),
        _versions(app),
        inference_router(app.sessions()),
        datastore_router(app),
        session_router(app),
        scoring_router(app.scoring_methods),
        about_router(),
        batch_router(app),
        pages_router(settings.MONAI_LABEL_PROJECT_NAME),
    ]


def _training(app: App) -> APIRouter:
    router = APIRouter(prefix=f"{settings.MONAI_LABEL_API_STR}/train", tags=["Train"])

    def ask(model: str, options: dict[str, Any], run_sync: bool, enqueue: bool) -> dict[str, Any]:
        refuse_unknown(options, app.options_of("trainers", model), "training")
        app.check_training(model, options)
        try:
            task = app.queue.add({**options, "model": model}, enqueue=enqueue)
        except AlreadyTraining as error:
            raise HTTPException(429, str(error)) from error
        return app.queue.wait(task["id"]) if run_sync else task

    def run_all(params: dict | None = None, run_sync: bool = False, user: User = _ADMIN) -> Any:
        refuse_unknown(params or {}, ["segmentation"], "training all models")
        options = (params or {}).get("segmentation") or {}
        if not isinstance(options, dict):
            raise HTTPException(400, "the options of a model to train must be an object")
        return {"segmentation": {"result": ask("segmentation", options, run_sync, enqueue=True), "detail": None}}

    def run_model(
        model: str, params: dict | None = None, run_sync: bool = False, enqueue: bool = False, user: User = _ADMIN
    ) -> Any:
        return ask(model, params or {}, run_sync, enqueue)

    def status(all: bool = False, check_if_running: bool = False, user: User = _USER) -> Any:
        if all and not check_if_running:
            found: Any = app.queue.tasks()
        else:
            found = app.queue.unfinished() if check_if_running else app.queue.latest()
        if not found:
            raise HTTPException(404, "no training is running" if check_if_running else "no training has run yet")
        return found

    def stop(user: User = _ADMIN) -> Any:
        return app.queue.stop()

    router.add_api_route("/", in_thread(run_all, threads=4), methods=["POST"], include_in_schema=False)
    router.add_api_route("/{model}", in_thread(run_model, threads=4), methods=["POST"])
    router.add_api_route("/", in_thread(status, threads=4), methods=["GET"])
    router.add_api_route("/", in_thread(stop, threads=4), methods=["DELETE"])
    return router


def _samples(app: App) -> APIRouter:
    router = APIRouter(prefix=f"{settings.MONAI_LABEL_API_STR}/activelearning", tags=["ActiveLearning"])

    def sample(http_request: Request, strategy: str, params: dict | None = None, user: User = _USER) -> Any:
        # MONAI Label would record each sample in the index, and rewrite it each time; here the lease records it.
        refuse_unknown(params or {}, app.options_of("strategies", strategy), "active learning")
        client = with_checked_client(params)
        request = {**with_login(client), "strategy": strategy, ADDRESS: _address(http_request)}
        chosen = app.next_sample(request)
        note(image=chosen.get("id"))
        return {**chosen, **app.datastore().get_image_info(chosen["id"])} if "id" in chosen else chosen

    router.add_api_route("/{strategy}", in_thread(sample, threads=8), methods=["POST"])
    return router


def _labels(app: App) -> APIRouter:
    router = APIRouter(prefix=settings.MONAI_LABEL_API_STR, tags=["Datastore"])

    def save(
        image: str,
        params: str = Form("{}"),
        tag: str = FINAL_TAG,
        label: UploadFile = _LABEL_FILE,
        user: User = _ANNOTATOR,
    ) -> Any:
        submission = Submission.of(image, tag, params)
        info = with_login(client_fields(submission.info))
        info["model_version"] = app.started_from(annotator_of(info), image)
        saved = app.datastore().save_label(image, str(stored_upload(label, "label")), submission.tag, info)
        answer = app.on_save_label(image, saved)
        app.submitted(image, submission.tag)
        slices = app.datastore().get_label_info(image, submission.tag).get(FIELD)
        return {**(answer or {}), "image": image, "label": saved, **({FIELD: slices} if slices else {})}

    def revisions(image: str, tag: str = FINAL_TAG, user: User = _USER) -> Any:
        history = _checked(app.datastore()).revisions.history(image, tag)
        if not history:
            raise HTTPException(404, f"image {image!r} has no revisions of a label {tag!r}")
        return {"image": image, "tag": tag, "revisions": [revision.summary() for revision in history]}

    def revision_file(image: str, revision: int, tag: str = FINAL_TAG, user: User = _USER) -> Any:
        kept = _checked(app.datastore()).revisions
        found = kept.get(image, tag, checked_revision(revision))
        missing = f"image {image!r} has no file for revision {revision} of its label {tag!r}"
        if found is None or found.deleted:
            raise HTTPException(404, missing)
        return OpenedFile(kept.file(found), missing=missing, filename=f"{image}{found.suffix}")

    def restore(image: str, revision: int, tag: str = FINAL_TAG, client_id: str = "", user: User = _ANNOTATOR) -> Any:
        annotator = annotator_of(with_login(with_checked_client({"client_id": client_id})))
        restored = _checked(app.datastore()).restore_label(image, checked_revision(revision), annotator, tag)
        app.submitted(image, tag)
        return restored.summary()

    router.add_api_route("/datastore/label", in_thread(save, threads=8), methods=["PUT"])
    router.add_api_route("/deformux/labels/revisions", in_thread(revisions, threads=8), methods=["GET"])
    router.add_api_route("/deformux/labels/revision", in_thread(revision_file, threads=8), methods=["GET"])
    router.add_api_route("/deformux/labels/restore", in_thread(restore, threads=8), methods=["POST"])
    return router


def _leases(app: App) -> APIRouter:
    router = APIRouter(prefix=f"{settings.MONAI_LABEL_API_STR}/deformux/leases", tags=["ActiveLearning"])

    def active(user: User = _USER) -> Any:
        return {"leases": [asdict(lease) for lease in app.leases.active().values()]}

    def release(image: str, user: User = _ANNOTATOR) -> Any:
        def may_end(lease: Lease) -> None:
            caller = current_user()
            if caller is not None and lease.annotator != caller.name:
                require("reviewer", "ending a different annotator's lease")

        lease = app.leases.release(image, check=may_end)
        if lease is None:
            raise HTTPException(404, f"image {image!r} is not leased")
        note(annotator=lease.annotator)
        return asdict(lease)

    router.add_api_route("", in_thread(active, threads=2), methods=["GET"])
    router.add_api_route("", in_thread(release, threads=2), methods=["DELETE"])
    return router


def _sessions(app: App) -> APIRouter:
    router = APIRouter(prefix=f"{settings.MONAI_LABEL_API_STR}/deformux/sessions", tags=["Infer"])

    def kept(user: User = _USER) -> Any:
        return app.click_cache.state()

    router.add_api_route("", in_thread(kept, threads=2), methods=["GET"])
    return router


def _versions(app: App) -> APIRouter:
    router = APIRouter(prefix=f"{settings.MONAI_LABEL_API_STR}/deformux/versions", tags=["Model"])

    def listed(user: User = _USER) -> Any:
        versions = app.versions()
        return {
            "published": versions.published(),
            "pinned": versions.pinned(),
            "versions": [info.to_dict() for info in versions.infos()],
            "history": [publication.to_dict() for publication in versions.history()],
            "damaged": versions.damaged(),
            "warnings": versions.warnings(),
        }

    def show(name: str, user: User = _USER) -> Any:
        known(name)
        try:
            return app.versions().info(name).to_dict()
        except ValueError as error:
            raise HTTPException(409, str(error)) from error

    def known(name: str) -> str:
        try:
            app.versions().path(checked_version(name))
        except ValueError as error:
            raise HTTPException(404, str(error)) from error
        return name

    def change(do: Callable[[], Any]) -> Any:
        try:
            do()
        except ValueError as error:
            raise HTTPException(409, str(error)) from error
        app.model_changed()
        note(version=app.versions().published())
        return {"published": app.versions().published(), "pinned": app.versions().pinned()}

    def publish(name: str, user: User = _ADMIN) -> Any:
        known(name)
        return change(lambda: app.versions().publish(name, by=user.username))

    def pin(name: str, user: User = _ADMIN) -> Any:
        known(name)
        return change(lambda: app.versions().pin(name, by=user.username))

    def rollback(user: User = _ADMIN) -> Any:
        return change(lambda: app.versions().rollback(by=user.username))

    def unpin(user: User = _ADMIN) -> Any:
        return change(lambda: app.versions().unpin())

    router.add_api_route("", in_thread(listed, threads=2), methods=["GET"])
    router.add_api_route("/rollback", in_thread(rollback, threads=2), methods=["POST"])
    router.add_api_route("/unpin", in_thread(unpin, threads=2), methods=["POST"])
    router.add_api_route("/{name}", in_thread(show, threads=2), methods=["GET"])
    router.add_api_route("/{name}/publish", in_thread(publish, threads=2), methods=["POST"])
    router.add_api_route("/{name}/pin", in_thread(pin, threads=2), methods=["POST"])
    return router


def _address(request: Request) -> str:
    """Return the address by which leases are counted; empty with a login, because a ward may share an address."""
    return "" if current_user() is not None or request.client is None else request.client.host


def _checked(datastore: Datastore) -> CheckedDatastore:
    if not isinstance(datastore, CheckedDatastore):
        raise HTTPException(404, "revisions of labels are kept only for a studies folder, not for a remote server")
    return datastore
