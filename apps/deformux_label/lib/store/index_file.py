"""The studies' index ``datastore_v2.json``: written by rename, and rebuilt from the files if it is damaged."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

from monailabel.datastore.local import ImageLabelModel, LocalDatastoreModel

from deformux_label.lib.store.json_repair import repaired

__all__ = ["IndexFile"]

logger = logging.getLogger(__name__)


class IndexFile:
    """The index on disk, and its last state that this process knows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[int, int, int] | None = None
        # Whether the index in memory differs from the file because it was repaired.
        self.repaired = False

    def changed(self) -> LocalDatastoreModel | None:
        """Return the index if a different process has replaced it since this one read or wrote it, else None.

        Unusable entries are left out, and a copy of the whole file is kept.

        Raises:
            ValueError: the file as a whole is damaged.
        """
        if (state := self._state()) is None or state == self._seen:
            return None
        content = self.path.read_bytes()
        try:
            model = LocalDatastoreModel.model_validate_json(content)
            # Half a surrogate pair can be read but not written.
            model.model_dump_json()
        except (ValueError, RecursionError) as error:
            model = self._usable_part(content, error)
        self._seen = state
        return model

    def write(self, model: LocalDatastoreModel, temporary: Path) -> None:
        """Write the index to a temporary file, which will replace it."""
        # Pydantic writes ten thousand entries twenty times faster than the json module.
        text = model.model_dump_json(exclude={"base_path"}, indent=2, fallback=str)
        temporary.write_text(text, encoding="utf-8")

    def mark_written(self) -> None:
        """Record that this process has written the file."""
        self._seen = self._state()
        self.repaired = False

    def put_aside(self) -> Path:
        """Rename a damaged index, and return its new path."""
        aside = self._aside()
        os.replace(self.path, aside)
        return aside

    def _usable_part(self, content: bytes, reason: Exception) -> LocalDatastoreModel:
        try:
            found: Any = repaired({**json.loads(content), "objects": {}})
            objects = json.loads(content)["objects"].items()
            model = LocalDatastoreModel.model_validate(found)
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
            raise ValueError(str(reason).splitlines()[0]) from reason
        bad = []
        for image, entry in objects:
            try:
                model.objects[str(repaired(image))] = ImageLabelModel.model_validate(repaired(entry))
            except (ValueError, RecursionError):
                bad.append(image)
        self.repaired = True
        aside = self._aside()
        shutil.copyfile(self.path, aside)
        logger.error(
            "The index has unusable entries (%s); it is kept as %s, and %s",
            str(reason).splitlines()[0],
            aside,
            f"those of {', '.join(map(ascii, bad[:20]))} are rebuilt from the files"
            if bad
            else "their text is repaired",
        )
        return model

    def _aside(self) -> Path:
        return self.path.with_name(f"{self.path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")

    def _state(self) -> tuple[int, int, int] | None:
        try:
            status = self.path.stat()
        except FileNotFoundError:
            return None
        # Two writes within one tick of the clock have different inodes.
        return status.st_mtime_ns, status.st_ino, status.st_size
