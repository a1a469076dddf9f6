"""Deleted volumes and labels, kept under ``.deformux/trash`` until they are restored."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from deformux_label.lib.requests.identifiers import is_image_id, is_tag
from deformux_label.lib.store.json_repair import repaired
from deformux_label.lib.store.transaction import Transaction

__all__ = ["Trash", "Trashed"]

logger = logging.getLogger(__name__)

_KINDS = ("image", "label", "damaged label")


@dataclass(frozen=True)
class Trashed:
    """A deleted volume or label.

    Args:
        name: of its folder in the trash.
        kind: ``image``, ``label``, or ``damaged label`` for an unreadable file.
        image: id of the volume.
        time: of the deletion, seconds since 1970.
        file: path of the volume's file in the studies; empty if only a label was deleted.
        info: metadata of the volume.
        labels: tag to the number of the revision that was the current label; 0 if there was none.
    """

    name: str
    kind: str
    image: str
    time: float
    file: str = ""
    info: Mapping[str, Any] = field(default_factory=dict)
    labels: Mapping[str, int] = field(default_factory=dict)


class Trash:
    """Entries ``<folder>/<time>-<id>`` with the files and ``record.json``; the caller holds the studies' lock.

    Files are moved by renaming; a link itself is moved, never its target.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def stage(
        self,
        transaction: Transaction,
        kind: str,
        image: str,
        *,
        file: str = "",
        info: Mapping[str, Any] | None = None,
        labels: Mapping[str, int],
    ) -> Path:
        """Add a new entry to a transaction, and return the folder to which its files must be moved."""
        place = self._free(f"{time.strftime('%Y%m%d-%H%M%S')}-{image}")
        entry = Trashed(place.name, kind, image, time.time(), file, dict(info or {}), dict(labels))
        transaction.write_text(place / "record.json", json.dumps(asdict(entry), indent=1) + "\n")
        return place

    def entries(self) -> list[Trashed]:
        """Return all entries with files, oldest first; a crash may have left an entry without."""
        if not self.folder.is_dir():
            return []
        names = sorted(os.listdir(self.folder))
        return [entry for entry in map(self.get, names) if entry is not None and self.files(entry)]

    def get(self, name: str) -> Trashed | None:
        """Return one entry, or None if it does not exist or its record is unusable."""
        if not name or name.startswith(".") or "/" in name or "\0" in name:
            return None
        path = self.folder / name / "record.json"
        try:
            entry = Trashed(**repaired(json.loads(path.read_text(encoding="utf-8"))))
            if not (
                entry.name == name and entry.kind in _KINDS and is_image_id(entry.image) and _is_inside(entry.file)
            ):
                raise ValueError("it does not match its folder")
            if not all(is_tag(tag) and isinstance(number, int) for tag, number in entry.labels.items()):
                raise ValueError("its labels are not tags with numbers")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            logger.warning("The record %s of the trash cannot be used: %s", path, error)
            return None
        return entry

    def files(self, entry: Trashed) -> dict[str, Path]:
        """Return the files of an entry: ``image``, and labels by their tags."""
        place = self.folder / entry.name
        found = {}
        for folder in (place / "image", *sorted((place / "labels").glob("*"))):
            for file in folder.glob("[!.]*"):
                found[folder.name] = file
        return found

    def sequences(self, entry: Trashed) -> list[Path]:
        """Return the files of the volume's sequences other than ``image``."""
        return sorted((self.folder / entry.name / "sequences").glob("[!.]*"))

    def forget(self, entry: Trashed) -> None:
        """Delete an entry whose files were restored."""
        shutil.rmtree(self.folder / entry.name, ignore_errors=True)

    def _free(self, name: str) -> Path:
        place, number = self.folder / name, 1
        while place.exists():
            number += 1
            place = self.folder / f"{name}-{number}"
        return place


def _is_inside(file: object) -> bool:
    """Return whether a record's relative path stays inside its folder."""
    return isinstance(file, str) and "\0" not in file and not file.startswith("/") and ".." not in file.split("/")
