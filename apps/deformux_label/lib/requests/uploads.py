"""Uploaded files: their folder during the request, and the clean-up after a killed server."""

from __future__ import annotations

import atexit
import fcntl
import io
import logging
import os
import shutil
import stat
import subprocess
import tempfile
import time
from pathlib import Path

from fastapi import HTTPException
from starlette.datastructures import UploadFile

__all__ = ["StoredUpload", "own_folder", "private_uploads", "stored_upload"]

logger = logging.getLogger(__name__)

# Suffixes of volumes and labels, longest first.
_SUFFIXES = (".seg.nrrd", ".nii.gz", ".nrrd", ".nii", ".mha")
_PREFIX = "deformux-label-"
_LOCK = ".in-use"
# A folder without a lock belongs to a server that is about to lock it, or that ended long ago.
_SECONDS_TO_LOCK = 3600
# Locks of this process; they end with it, even if it is killed.
_held: list[int] = []


class StoredUpload(UploadFile):
    """A complete file of a form at ``path``; ``file`` stays empty."""

    def __init__(self, path: Path, filename: str) -> None:
        super().__init__(io.BytesIO(), filename=filename)
        self.path = path


def stored_upload(upload: UploadFile, name: str) -> Path:
    """Return the path of an uploaded volume; only the suffix of the client's name for it is kept.

    Args:
        upload: a file of the request's form.
        name: the file's name in the folder of the request and in messages.

    Raises:
        HTTPException: 422 for a suffix that no volume has.
    """
    assert isinstance(upload, StoredUpload), "every form is read by web.multipart"
    name_sent = (upload.filename or "").lower()
    suffix = next((suffix for suffix in _SUFFIXES if name_sent.endswith(suffix)), None)
    if suffix is None:
        raise HTTPException(
            422,
            f"the file {ascii(upload.filename or '')[:80]} cannot be a volume; send one of {', '.join(_SUFFIXES)}",
        )
    return upload.path.rename(upload.path.with_name(f"{name}{suffix}"))


def private_uploads() -> Path:
    """Give this process its own temporary folder for uploads, and return it.

    MONAI Label passes an upload to the app as a path, like a path that a request names; a separate folder distinguishes
    the two. It also reopens deleted temporary files by name, which is safe only in a folder that no other user can
    write to.
    """
    folder = own_folder(Path(tempfile.gettempdir()))
    tempfile.tempdir = str(folder)
    return folder


def own_folder(parent: Path) -> Path:
    """Make a folder in ``parent`` that only this user can read, and that is removed when this process ends.

    Also remove folders that remain from a power failure or a killed container.
    """
    parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(parent)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    lock = os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    _held.append(lock)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    _remove_afterwards(folder)
    return folder


def _remove_afterwards(folder: Path) -> None:
    """Start a shell that outlives this process and removes the folder: uvicorn's signals bypass ``atexit``."""
    try:
        subprocess.Popen(
            ["/bin/sh", "-c", 'read -r _; rm -rf -- "$0"', str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
        )
    except OSError as error:
        logger.warning("%s will remain after a kill until the next start: %s", folder, error)


def _remove_leftovers(parent: Path) -> None:
    for folder in parent.glob(f"{_PREFIX}*"):
        try:
            status = folder.lstat()
            # Links, and files of other users in the shared temporary folder, do not belong to this app.
            if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and _is_left(folder, status.st_mtime):
                shutil.rmtree(folder, ignore_errors=True)
                logger.warning("Removed %s, left by a killed server", folder)
        except OSError as error:
            logger.warning("%s of an earlier server cannot be removed: %s", folder, error)


def _is_left(folder: Path, changed: float) -> bool:
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        return time.time() - changed > _SECONDS_TO_LOCK
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True
