"""Sessions: volumes that clients upload temporarily, to segment them outside the studies."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from fastapi import HTTPException, UploadFile

from deformux.data.loading import LoadVolumed
from deformux.data.sequences import SequenceNaming, split_stem
from deformux.data.volume_reader import InvalidVolume
from deformux_label.lib.requests.dicom_series import write_series
from deformux_label.lib.requests.uploads import StoredUpload, stored_upload

__all__ = ["VolumeSession", "VolumeSessions"]

_MAX_PER_CLIENT = 16
_MAX_SESSIONS = 128


@dataclass
class VolumeSession:
    """One uploaded volume.

    Args:
        id: a UUID, which only the client knows.
        image: the volume, perhaps made from a DICOM series, in this session's own folder.
        client: address of the sender.
        created: seconds since 1970.
        used: seconds since 1970 of the last request for it.
        expiry: seconds from its last use to its removal.
    """

    id: str
    image: Path
    client: str
    created: float
    used: float
    expiry: float

    def to_dict(self) -> dict[str, Any]:
        """Return the session in MONAI Label's format for clients."""
        return {
            "name": self.id,
            "image": self.image.name,
            "meta": {},
            "create_ts": int(self.created),
            "last_access_ts": int(self.used),
            "expiry": int(self.expiry),
        }


class VolumeSessions:
    """The sessions of this server, which end with it.

    They are listed only in this process's memory: files are not trusted. MONAI Label's own sessions unpack archives and
    read the path of an image from a file next to it.

    Args:
        folder: a folder that only this process uses.
        expiry_s: seconds from a session's last use to its removal; clients may ask for less.
        naming: how the files of a case's sequences are named.
    """

    def __init__(self, folder: Path, expiry_s: float, naming: SequenceNaming | None = None) -> None:
        self.store_path = folder
        self._naming = naming or SequenceNaming()
        self._expiry_s = expiry_s
        self._sessions: dict[str, VolumeSession] = {}
        self._lock = threading.Lock()

    def add(self, uploads: Sequence[UploadFile], *, client: str, expiry_s: int = 0) -> VolumeSession:
        """Keep one uploaded volume, its sequences, or the files of one DICOM series, and return its session.

        Raises:
            HTTPException: 422 if the files are not one volume.
        """
        name = str(uuid4())
        folder = self.store_path / name
        folder.mkdir(mode=0o700)
        try:
            image = _kept(uploads, folder, self._naming)
            for sequence in filter(Path.is_file, self._naming.files_of(image)):
                LoadVolumed("image")({"image": sequence})
        except InvalidVolume as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise HTTPException(422, str(error)) from error
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        now = time.time()
        expiry = min(expiry_s, self._expiry_s) if expiry_s > 0 else self._expiry_s
        session = VolumeSession(name, image, client, now, now, expiry)
        with self._lock:
            self._sessions[name] = session
            self._make_room(client)
        return session

    def find(self, name: str, *, touch: bool = True) -> VolumeSession:
        """Return a session; raise HTTPException 404 if it is unknown or has expired."""
        self.remove_expired()
        with self._lock:
            session = self._sessions.get(name.lower())
            if session is None:
                raise HTTPException(404, "there is no such session, or it has expired; send the volume again")
            if touch:
                session.used = time.time()
            return session

    def remove(self, name: str) -> VolumeSession:
        """Remove a session and delete its volume; raise HTTPException 404 if it is unknown."""
        session = self.find(name)
        with self._lock:
            self._drop(session.id)
        return session

    def remove_expired(self) -> int:
        """Remove the expired sessions, and return their number."""
        now = time.time()
        with self._lock:
            gone = [name for name, session in self._sessions.items() if session.used + session.expiry < now]
            for name in gone:
                self._drop(name)
        return len(gone)

    def _make_room(self, client: str) -> None:
        """Drop the least recently used sessions of this client, then of all clients, down to the limits."""
        own = [session for session in self._sessions.values() if session.client == client]
        for sessions, most in ((own, _MAX_PER_CLIENT), (list(self._sessions.values()), _MAX_SESSIONS)):
            for session in sorted(sessions, key=lambda session: session.used)[: max(0, len(sessions) - most)]:
                self._drop(session.id)

    def _drop(self, name: str) -> None:
        self._sessions.pop(name, None)
        shutil.rmtree(self.store_path / name, ignore_errors=True)


def _kept(uploads: Sequence[UploadFile], folder: Path, naming: SequenceNaming) -> Path:
    names = [naming.split(split_stem(Path(upload.filename or "").name)[0]) for upload in uploads]
    numbers = [number for _, number in names if number is not None]
    if len({name for name, _ in names}) == 1 and len(set(numbers)) == len(uploads) and not any(map(_is_dicom, uploads)):
        # Also a single one: its name says which.
        for number, upload in zip(numbers, uploads, strict=True):
            received = stored_upload(upload, f"volume{naming.suffixes[number]}")
            shutil.move(received, folder / received.name)
        return min(folder.iterdir(), key=lambda path: naming.split(split_stem(path.name)[0])[1] or 0)
    if len(uploads) == 1 and not _is_dicom(uploads[0]):
        received = stored_upload(uploads[0], "volume")
        return Path(shutil.move(received, folder / received.name))
    if not uploads or not all(_is_dicom(upload) for upload in uploads):
        raise HTTPException(
            422, f"a session takes one volume, or the DICOM files of one series; got {len(uploads)} files"
        )
    series = folder / "series"
    series.mkdir()
    for number, upload in enumerate(uploads):
        assert isinstance(upload, StoredUpload)
        shutil.move(upload.path, series / f"{number:04d}.dcm")
    # Afterwards it is an ordinary volume in one file.
    volume = folder / "series.nii.gz"
    write_series(series, volume)
    shutil.rmtree(series)
    return volume


def _is_dicom(upload: UploadFile) -> bool:
    assert isinstance(upload, StoredUpload), "every form is read by web.multipart"
    with upload.path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"
