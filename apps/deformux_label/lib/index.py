"""The studies' index ``datastore_v2.json``: read, written by rename, and rebuilt from the files when it is damaged."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path

from monailabel.datastore.local import LocalDatastoreModel

from deformux.files import replacing

__all__ = ["VOLUME_SUFFIXES", "IndexFile", "volumes_in"]

logger = logging.getLogger(__name__)

VOLUME_SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".mha")


class IndexFile:
    """Which state of the index this process knows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[int, int, int] | None = None

    def changed(self) -> LocalDatastoreModel | None:
        """The index, if another process has replaced it since this one read or wrote it.

        Raises:
            ValueError: it is damaged.
        """
        if (state := self._state()) is None or state == self._seen:
            return None
        model = LocalDatastoreModel.model_validate_json(self.path.read_bytes())
        self._seen = state
        return model

    def write(self, model: LocalDatastoreModel) -> None:
        """Replace the index."""
        # Pydantic writes ten thousand entries twenty times faster than the json module.
        text = model.model_dump_json(exclude={"base_path"}, indent=2, fallback=str)
        with replacing(self.path) as temporary:
            temporary.write_text(text, encoding="utf-8")
        self._seen = self._state()

    def put_aside(self) -> Path:
        """Keep a damaged index under another name, and return that."""
        aside = self.path.with_name(f"{self.path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")
        os.replace(self.path, aside)
        return aside

    def _state(self) -> tuple[int, int, int] | None:
        try:
            status = self.path.stat()
        except FileNotFoundError:
            return None
        # Two writes within the clock's step differ in their file's number.
        return status.st_mtime_ns, status.st_ino, status.st_size


def volumes_in(folder: str | Path, suffixes: Sequence[str] = VOLUME_SUFFIXES) -> dict[str, str]:
    """Id to suffix of each volume in a folder; hidden files are writes under way, or a Mac's companions."""
    found: dict[str, str] = {}
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))
    except FileNotFoundError:
        return {}
    for name in names:
        for suffix in suffixes:
            if name.endswith(suffix):
                found.setdefault(name.removesuffix(suffix), suffix)
                break
    return found
