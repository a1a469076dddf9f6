"""Routes for volumes, labels and sessions, and for information about them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

from fastapi import APIRouter, Depends, File, Form, HTTPException, Query, Request, UploadFile
from fastapi.responses import FileResponse
from monailabel.config import settings
from monailabel.endpoints.user.auth import RBAC, User
from monailabel.interfaces.datastore import Datastore
from monailabel.utils.others.generic import file_checksum

from deformux_label.lib.requests.caller import note, with_login
from deformux_label.lib.requests.identifiers import checked_sequence
from deformux_label.lib.requests.json_text import json_object
from deformux_label.lib.requests.request_folder import request_folder
from deformux_label.lib.requests.submission import MAX_INFO_BYTES
from deformux_label.lib.requests.uploads import stored_upload
from deformux_label.lib.store.datastore import CheckedDatastore
from deformux_label.lib.store.label_fields import client_fields
from deformux_label.lib.store.volume_sessions import VolumeSessions
from deformux_label.web.opened_file import OpenedFile
from deformux_label.web.worker_threads import in_thread

__all__ = ["datastore_router", "session_router"]

_HASHES = {"MD5": 32, "SHA256": 64, "SHA512": 128}
_MAX_CASES = 1_000_000
_ANNOTATOR = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ANNOTATOR))
_USER = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_USER))
# One for each parameter, because FastAPI writes the parameter's name into it.
_FILE = File(...)
_FILES = File(...)
_PARAMS = Form("{}")
_INFO = Form("{}")


class _App(Protocol):
    def datastore(self) -> Datastore: ...

    def sessions(self) -> VolumeSessions | None: ...


def datastore_router(app: _App) -> APIRouter:
    """Return the routes of images, labels, information about them, checksums, and an archive of the dataset."""
    router = APIRouter(prefix=f"{settings.MONAI_LABEL_API_STR}/datastore", tags=["Datastore"])

    def add_image(image: str = "", params: str = _PARAMS, file: UploadFile = _FILE, user: User = _ANNOTATOR) -> Any:
        if not image:
            raise HTTPException(400, "the request names no image; give the id of the new one as ?image=")
        info = with_login(client_fields(json_object(params, most=MAX_INFO_BYTES)))
        return {"image": app.datastore().add_image(image, str(stored_upload(file, "upload")), info)}

    def image_info(image: str, info: str = _INFO, user: User = _ANNOTATOR) -> Any:
        more = client_fields(json_object(info, name="info", most=MAX_INFO_BYTES))
        return app.datastore().update_image_info(image, more)

    def label_info(label: str, tag: str, info: str = _INFO, user: User = _ANNOTATOR) -> Any:
        return app.datastore().update_label_info(label, tag, json_object(info, name="info", most=MAX_INFO_BYTES))

    def label_params(label: str, tag: str, params: str = _PARAMS, user: User = _ANNOTATOR) -> Any:
        return app.datastore().update_label_info(label, tag, json_object(params, most=MAX_INFO_BYTES))

    def check_image(image: str, check_sum: str | None = None, user: User = _USER) -> Any:
        path = app.datastore().get_image_uri(image)
        if not path or not os.path.isfile(path):
            raise HTTPException(404, f"there is no image with the id {image!r}")
        if check_sum is not None:
            kind, digest = _checked_sum(check_sum)
            if file_checksum(path, algo=kind) != f"{kind}:{digest}":
                raise HTTPException(404, f"image {image!r} has a different {kind}")
        return {}

    def image_file(image: str, sequence: str | None = None, user: User = _USER) -> OpenedFile:
        missing = f"there is no image with the id {image!r}"
        if sequence is not None:
            return OpenedFile(_sequence(app.datastore(), image, checked_sequence(sequence)), missing=missing)
        return OpenedFile(app.datastore().get_image_uri(image) or "", missing=missing)

    def label_file(label: str, tag: str, user: User = _USER) -> OpenedFile:
        missing = f"image {label!r} has no label with the tag {tag!r}"
        return OpenedFile(app.datastore().get_label_uri(label, tag) or "", missing=missing)

    def dataset(limit_cases: int | None = Query(None, ge=1, le=_MAX_CASES), user: User = _ANNOTATOR) -> Any:
        made = Path(app.datastore().get_dataset_archive(limit_cases))
        folder = request_folder()
        assert folder is not None, "runs only within a request"
        return FileResponse(made.rename(folder / "dataset.zip"), media_type="application/zip", filename="dataset.zip")

    router.add_api_route("/image", in_thread(add_image, threads=8), methods=["PUT"])
    router.add_api_route("/", in_thread(add_image, threads=8), methods=["PUT"], include_in_schema=False)
    router.add_api_route("/image", in_thread(check_image, threads=4), methods=["HEAD"])
    router.add_api_route("/image", in_thread(image_file, threads=8), methods=["GET"], response_model=None)
    router.add_api_route("/label", in_thread(label_file, threads=8), methods=["GET"], response_model=None)
    router.add_api_route("/image/info", in_thread(image_info, threads=4), methods=["PUT"])
    router.add_api_route("/label/info", in_thread(label_info, threads=4), methods=["PUT"])
    router.add_api_route("/updatelabelinfo", in_thread(label_params, threads=4), methods=["PUT"], deprecated=True)
    router.add_api_route("/dataset", in_thread(dataset, threads=2), methods=["GET"])
    return router


def session_router(app: _App) -> APIRouter:
    """Return the routes of sessions: volumes outside the studies."""
    router = APIRouter(prefix=f"{settings.MONAI_LABEL_API_STR}/session", tags=["Session"])

    def sessions() -> VolumeSessions:
        kept = app.sessions()
        if kept is None:
            raise HTTPException(404, "this server keeps no sessions; add the volume to its studies")
        return kept

    def create(
        request: Request,
        uncompress: bool = False,
        expiry: int = Query(0, ge=0, le=10**9),
        files: list[UploadFile] = _FILES,
        user: User = _USER,
    ) -> Any:
        if uncompress:
            raise HTTPException(400, "archives are not unpacked; send the volume itself, without uncompress")
        client = request.client.host if request.client else ""
        session = sessions().add(files, client=client, expiry_s=expiry)
        note(session=session.id)
        return {"session_id": session.id, "session_info": session.to_dict()}

    def show(session_id: str, update_ts: bool = False, image: bool = False, user: User = _USER) -> Any:
        session = sessions().find(session_id, touch=update_ts)
        if not image:
            return session.to_dict()
        note(what="download session image", session=session.id)
        return OpenedFile(session.image, missing="there is no such session, or it has expired; send the volume again")

    def remove(session_id: str, user: User = _USER) -> Any:
        removed = sessions().remove(session_id).to_dict()
        note(session=session_id)
        return removed

    router.add_api_route("/", in_thread(create, threads=4), methods=["PUT"])
    router.add_api_route("/{session_id}", in_thread(show, threads=4), methods=["GET"])
    router.add_api_route("/{session_id}", in_thread(remove, threads=4), methods=["DELETE"])
    return router


def _sequence(datastore: Datastore, image: str, sequence: str) -> str:
    if not isinstance(datastore, CheckedDatastore):
        raise HTTPException(404, "sequences are known only of a studies folder, not of a remote server")
    return datastore.sequence_uri(image, sequence)


def _checked_sum(text: str) -> tuple[str, str]:
    kind, _, digest = text.rpartition(":")
    kind, digest = (kind or "SHA256").upper(), digest.lower()
    if kind not in _HASHES or len(digest) != _HASHES[kind] or not set(digest) <= set("0123456789abcdef"):
        raise HTTPException(
            400, "check_sum must be SHA256:, SHA512: or MD5: followed by the checksum in hexadecimal digits"
        )
    return kind, digest
