"""Every label that was ever submitted, with who drew it, when, and over which model's proposal."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from deformux.files import replacing, write_text

__all__ = ["Revision", "Revisions", "checksum"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Revision:
    """One state of a label: a submitted file, or that there is none any more.

    Args:
        image, tag: which label.
        number: 1, 2, … for each label.
        time: seconds since 1970.
        annotator: who submitted, restored or deleted.
        suffix: of the file; empty for a deletion.
        sha256: of the file; empty for a deletion.
        model_version: the model whose proposal was corrected, where that is known.
        restored_from: number of the revision that was restored.
        info: what the client said about the label.
    """

    image: str
    tag: str
    number: int
    time: float
    annotator: str
    suffix: str = ""
    sha256: str = ""
    model_version: str | None = None
    restored_from: int | None = None
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def deleted(self) -> bool:
        """Whether this revision records a deletion."""
        return not self.sha256

    def summary(self) -> dict[str, Any]:
        """Plain values to list, without what the client said."""
        return {**asdict(self), "deleted": self.deleted} | {"info": None}


class Revisions:
    """Revisions in ``<folder>/<image>/<tag>/0001.nii.gz`` and ``0001.json``, both by rename, the second last.

    A file without its JSON was never acknowledged. Nothing is ever deleted here. The caller holds the studies' lock.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(
        self,
        image: str,
        tag: str,
        file: Path | None,
        *,
        suffix: str = "",
        annotator: str,
        info: Mapping[str, Any],
        model_version: str | None = None,
        restored_from: int | None = None,
    ) -> Revision:
        """Keep a copy of ``file``, or record a deletion where it is None."""
        number = self.last_number(image, tag) + 1
        sha256 = ""
        if file is not None:
            with replacing(self._stem(image, tag, number).with_name(f"{number:04d}{suffix}")) as temporary:
                shutil.copyfile(file, temporary)
                sha256 = checksum(temporary)
        revision = Revision(
            image=image,
            tag=tag,
            number=number,
            time=time.time(),
            annotator=annotator,
            suffix=suffix if file is not None else "",
            sha256=sha256,
            model_version=model_version,
            restored_from=restored_from,
            info=dict(info),
        )
        write_text(self._stem(image, tag, number).with_suffix(".json"), json.dumps(asdict(revision), indent=1) + "\n")
        return revision

    def history(self, image: str, tag: str) -> list[Revision]:
        """Oldest first; one whose record is damaged is left out."""
        found = (self._read(image, tag, number) for number in sorted(self._numbers(image, tag)))
        return [revision for revision in found if revision is not None]

    def get(self, image: str, tag: str, number: int) -> Revision | None:
        """One revision, or None."""
        return self._read(image, tag, number) if number in self._numbers(image, tag) else None

    def newest(self, image: str, tag: str) -> Revision | None:
        """The last one, or None."""
        for number in sorted(self._numbers(image, tag), reverse=True):
            if (revision := self._read(image, tag, number)) is not None:
                return revision
        return None

    def last_number(self, image: str, tag: str) -> int:
        """Number of the newest revision, 0 where there is none."""
        return max(self._numbers(image, tag), default=0)

    def file(self, revision: Revision) -> Path:
        """The kept file of a revision that is no deletion."""
        stem = self._stem(revision.image, revision.tag, revision.number)
        return stem.with_name(f"{revision.number:04d}{revision.suffix}")

    def known(self) -> dict[str, list[str]]:
        """Tags with revisions, by image; images that are gone included."""
        if not self.folder.is_dir():
            return {}
        return {
            image.name: sorted(tag.name for tag in image.iterdir() if tag.is_dir())
            for image in sorted(self.folder.iterdir())
            if image.is_dir()
        }

    def _stem(self, image: str, tag: str, number: int) -> Path:
        return self.folder / image / tag / f"{number:04d}"

    def _numbers(self, image: str, tag: str) -> list[int]:
        folder = self.folder / image / tag
        if not folder.is_dir():
            return []
        return [int(path.stem) for path in folder.glob("*.json") if path.stem.isdigit()]

    def _read(self, image: str, tag: str, number: int) -> Revision | None:
        path = self._stem(image, tag, number).with_suffix(".json")
        try:
            return Revision(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            logger.error("The record %s of a label's revision cannot be read: %s", path, error)
            return None


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
