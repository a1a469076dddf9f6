"""Revisions of labels: every submitted label, with its annotator, time and the model that it corrects."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from fastapi import HTTPException

from deformux_label.lib.requests.identifiers import checked_image_id, checked_revision, checked_tag, is_image_id
from deformux_label.lib.store.json_repair import repaired
from deformux_label.lib.store.transaction import WRITING, Transaction
from deformux_label.lib.store.volumes import LABEL_SUFFIXES

__all__ = ["Revision", "Revisions", "checksum", "inside"]

logger = logging.getLogger(__name__)

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Revision:
    """One state of a label: a submitted file, or its deletion.

    Args:
        image, tag: the label.
        number: 1, 2, … for each label.
        time: seconds since 1970.
        annotator: the user who submitted, restored or deleted it.
        suffix: of the file; empty for a deletion.
        sha256: of the file; empty for a deletion.
        model_version: the model that made the corrected proposal, if known.
        restored_from: number of the revision that was restored.
        info: the client's metadata of the label.
        labels: names of the values 1..N; None if the record is older than this field.
        image_file: path of the volume in the studies; None if the record is older than this field.
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
    labels: list[str] | None = None
    image_file: str | None = None

    @property
    def deleted(self) -> bool:
        """Return whether this revision records a deletion."""
        return not self.sha256

    def summary(self) -> dict[str, Any]:
        """Return the fields as plain values, without the client's metadata."""
        return {**asdict(self), "deleted": self.deleted} | {"info": None}


class Revisions:
    """Revisions in ``<folder>/<image>/<tag>/0001.nii.gz`` and ``0001.json``, both written by rename, the JSON last.

    A file without its JSON was never acknowledged. Revisions are never deleted. The caller holds the studies' lock.
    Invalid ids, tags and numbers are refused with HTTPException, whatever their source.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Unusable records and the reasons: logged once, and listed while they exist.
        self.damaged: dict[str, str] = {}

    def stage(
        self,
        transaction: Transaction,
        image: str,
        tag: str,
        number: int,
        file: Path | None,
        *,
        suffix: str = "",
        annotator: str,
        info: Mapping[str, Any],
        **more: Any,
    ) -> Revision:
        """Add a revision to a transaction: a copy of ``file``, or a deletion if it is None.

        ``number`` is the last revision's plus one; ``more`` are other fields of the revision.
        """
        stem = self._stem(image, tag, number)
        sha256 = ""
        if file is not None:
            sha256 = checksum(transaction.copy(file, stem.with_name(stem.name + suffix)))
        revision = Revision(
            image=image,
            tag=tag,
            number=number,
            time=time.time(),
            annotator=annotator,
            suffix=suffix if file is not None else "",
            sha256=sha256,
            info=dict(info),
            **more,
        )
        transaction.write_text(stem.with_name(stem.name + ".json"), json.dumps(asdict(revision), indent=1) + "\n")
        return revision

    def history(self, image: str, tag: str) -> list[Revision]:
        """Return the revisions of a label, oldest first, without those with damaged records."""
        found = (self._read(image, tag, number) for number in sorted(self._numbers(image, tag)))
        return [revision for revision in found if revision is not None]

    def get(self, image: str, tag: str, number: int) -> Revision | None:
        """Return one revision, or None."""
        checked_revision(number)
        return self._read(image, tag, number) if number in self._numbers(image, tag) else None

    def newest(self, image: str, tag: str) -> Revision | None:
        """Return the last revision, or None."""
        return next(self._backwards(image, tag), None)

    def newest_intact(self, image: str, tag: str) -> Revision | None:
        """Return the last revision with an intact file; None if a deletion is newer."""
        for revision in self._backwards(image, tag):
            if revision.deleted:
                return None
            if self.is_intact(revision):
                return revision
        return None

    def is_intact(self, revision: Revision) -> bool:
        """Return whether the file of a revision exists and is unchanged."""
        try:
            return not revision.deleted and checksum(self.file(revision)) == revision.sha256
        except OSError:
            return False

    def last_number(self, image: str, tag: str) -> int:
        """Return the number of the newest revision, 0 without one; damaged ones count, because their files stay."""
        return max(self._numbers(image, tag), default=0)

    def file(self, revision: Revision) -> Path:
        """Return the kept file of a revision that is not a deletion."""
        stem = self._stem(revision.image, revision.tag, revision.number)
        return stem.with_name(stem.name + revision.suffix)

    def known(self) -> dict[str, list[str]]:
        """Return the tags with revisions, by image, including removed images."""
        if not self.folder.is_dir():
            return {}
        return {
            image.name: sorted(tag.name for tag in image.iterdir() if tag.is_dir() and not tag.name.startswith("."))
            for image in sorted(self.folder.iterdir())
            if is_image_id(image.name) and image.is_dir()
        }

    def clean(self) -> None:
        """Delete files that a crash left half-written; the caller holds the studies' lock."""
        for leftover in self.folder.glob(f"*/*/{WRITING}*"):
            leftover.unlink(missing_ok=True)

    def _folder_of(self, image: str, tag: str) -> Path:
        return inside(self.folder, self.folder / checked_image_id(image, status=404) / checked_tag(tag))

    def _stem(self, image: str, tag: str, number: int) -> Path:
        return self._folder_of(image, tag) / f"{checked_revision(number):04d}"

    def _numbers(self, image: str, tag: str) -> list[int]:
        folder = self._folder_of(image, tag)
        if not folder.is_dir():
            return []
        return [int(path.stem) for path in folder.glob("*.json") if path.stem.isascii() and path.stem.isdigit()]

    def _backwards(self, image: str, tag: str) -> Iterator[Revision]:
        for number in sorted(self._numbers(image, tag), reverse=True):
            if (revision := self._read(image, tag, number)) is not None:
                yield revision

    def _read(self, image: str, tag: str, number: int) -> Revision | None:
        path = self._stem(image, tag, number).with_suffix(".json")
        try:
            return _revision(json.loads(path.read_text(encoding="utf-8")), image, tag, number)
        except (OSError, ValueError, TypeError, RecursionError) as error:
            where = f"{image}/{tag}/{path.name}"
            if where not in self.damaged:
                logger.error("Ignoring the unusable record %s of a label's revision: %s", path, error)
            self.damaged[where] = f"the record of revision {number} cannot be used: {error}"
            return None


def _revision(record: Any, image: str, tag: str, number: int) -> Revision:
    """Return the revision of a record.

    Raises:
        ValueError: the record is damaged, or is not of this label.
    """
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, got {type(record).__name__}")
    known = {item.name for item in fields(Revision)}
    revision = Revision(**{name: value for name, value in repaired(record).items() if name in known})
    if (revision.image, revision.tag, revision.number) != (image, tag, number):
        raise ValueError(f"it describes revision {revision.number!r} of {revision.image!r}, {revision.tag!r}")
    texts = {"annotator": revision.annotator, "suffix": revision.suffix, "sha256": revision.sha256}
    for name, value in texts.items():
        if not isinstance(value, str):
            raise ValueError(f"{name} must be text, got {value!r}")
    if revision.sha256 and not _SHA256.fullmatch(revision.sha256):
        raise ValueError("sha256 is not a checksum")
    if revision.sha256 and revision.suffix.lower() not in LABEL_SUFFIXES:
        raise ValueError(f"{revision.suffix!r} is not the suffix of a label")
    if isinstance(revision.time, bool) or not isinstance(revision.time, int | float) or not 0 <= revision.time < 1e11:
        raise ValueError(f"time must be seconds since 1970, got {revision.time!r}")
    if not isinstance(revision.info, dict) or not isinstance(revision.labels, list | None):
        raise ValueError("info must be an object and labels a list")
    for optional in (revision.model_version, revision.image_file):
        if not isinstance(optional, str | None):
            raise ValueError(f"{optional!r} must be text")
    return revision


def inside(folder: Path, place: Path) -> Path:
    """Return the folder ``place`` if, with all links followed, it lies in ``folder``.

    Raises:
        HTTPException: 409 if it does not, so that nothing is read or written elsewhere.
    """
    if not place.resolve().is_relative_to(folder.resolve()):
        raise HTTPException(409, f"{place.name!r} is a link out of the studies folder, which is not followed")
    return place


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
