"""Update of the studies' index to match the files, after a crash or changes by hand."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from monailabel.datastore.local import DataModel, ImageLabelModel, LocalDatastoreModel

from deformux.data.sequences import SequenceNaming
from deformux_label.lib.requests.identifiers import is_tag
from deformux_label.lib.store.label_fields import PLAIN_TAGS, file_state, unchecked_fields, why_unusable
from deformux_label.lib.store.label_revisions import Revision, Revisions
from deformux_label.lib.store.transaction import Transaction
from deformux_label.lib.store.volumes import Found, find_volumes, labels_in, one_of_each_case, split_suffix, with_ids

__all__ = ["Reconciled", "file_of", "label_entry", "reconcile", "restore_revision", "revision_entry"]

logger = logging.getLogger(__name__)


@dataclass
class Reconciled:
    """The index entries of the volumes and labels that exist.

    Args:
        objects: entries by id; unchanged ones are the same objects as before.
        found: the volumes, and the files that are not served.
        to_check: (id, tag) of labels whose files may not match the index.
        stray: ``tag/name`` to the reason, for label files without a volume.
    """

    objects: dict[str, ImageLabelModel]
    found: Found
    to_check: list[tuple[str, str]] = field(default_factory=list)
    stray: dict[str, str] = field(default_factory=dict)


def reconcile(
    model: LocalDatastoreModel,
    known: Mapping[str, ImageLabelModel],
    revisions: Revisions,
    transaction: Transaction | None,
    project: Sequence[str],
    naming: SequenceNaming,
) -> Reconciled:
    """Compare the index with the files; the caller holds the studies' lock.

    Finds files that were copied in or deleted by hand, and restores a lost index from the revisions. Reads no labels;
    ``to_check`` lists those that must be read.

    Args:
        transaction: receives the file changes; None if nothing can be written.
        project: the project's labels.
        naming: how the files of a case's sequences are named.
    """
    served = {file_of(image, entry): image for image, entry in known.items()}
    found = find_volumes(Path(model.image_path()), served)
    with_revisions = revisions.known()
    # A file that was labelled as a case of its own stays one, so that its labels are not lost.
    labelled = {file for file, image in served.items() if known[image].labels or image in with_revisions}
    found.volumes = one_of_each_case(found.volumes, naming, labelled)

    def belongs(image: str, file: str) -> bool:
        """Return whether the labels kept under an id, if any, belong to the volume in ``file``."""
        # A deletion also records its label's volume.
        kept = [revisions.newest(image, tag) for tag in with_revisions.get(image, []) if is_tag(tag)]
        return all(revision is None or revision.image_file in (None, file) for revision in kept)

    volumes = with_ids(found, served, belongs, naming)
    result = Reconciled({image: _image(*at, known.get(image)) for image, at in volumes.items()}, found)
    labels = {tag: labels_in(Path(model.label_path(tag))) for tag in _tags(Path(model.label_path(None)))}
    for tag, (files, refused) in labels.items():
        stray = {name: "there is no volume with this id" for name in files if name not in volumes}
        result.stray |= {f"{tag}/{name}": reason for name, reason in {**refused, **stray}.items()}
    for image, entry in result.objects.items():
        there = {tag: files[image] for tag, (files, _) in labels.items() if image in files}
        tags = [tag for tag in with_revisions.get(image, []) if is_tag(tag)]
        if not there and not entry.labels and not tags:
            continue
        one = _Labels(model, image, entry, revisions, transaction, list(project), result)
        updated = {}
        for tag in sorted({*there, *filter(is_tag, entry.labels), *tags}):
            label = one.label(tag, there.get(tag, {}), has_revisions=tag in tags)
            if label is not None:
                updated[tag] = label
        if updated.keys() != entry.labels.keys() or any(updated[tag] is not entry.labels[tag] for tag in updated):
            result.objects[image] = entry.model_copy(update={"labels": updated})
    for image in known.keys() - result.objects.keys():
        logger.info("The volume of image %s is gone", image)
    return result


def file_of(image: str, entry: ImageLabelModel) -> str:
    """Return the path of a volume in the studies; earlier versions' indexes hold only id and suffix."""
    file = entry.image.info.get("file")
    return file if isinstance(file, str) else image + entry.image.ext


def _tags(folder: Path) -> list[str]:
    try:
        return sorted(item.name for item in os.scandir(folder) if item.is_dir() and is_tag(item.name))
    except FileNotFoundError:
        return []


def _image(file: str, suffix: str, known: ImageLabelModel | None) -> ImageLabelModel:
    if known is None:
        info = {"ts": int(time.time()), "name": file.rsplit("/", 1)[-1], "file": file}
        return ImageLabelModel(image=DataModel(info=info, ext=suffix))
    if known.image.info.get("file") == file and known.image.ext == suffix:
        return known
    info = {**known.image.info, "file": file}
    return known.model_copy(update={"image": DataModel(info=info, ext=suffix)})


@dataclass(frozen=True)
class _Labels:
    """The labels of one volume."""

    model: LocalDatastoreModel
    image: str
    entry: ImageLabelModel
    revisions: Revisions
    transaction: Transaction | None
    project: list[str]
    result: Reconciled

    def label(self, tag: str, files: Mapping[str, os.stat_result], *, has_revisions: bool) -> DataModel | None:
        """Return the entry of one label; ``files`` maps the suffix of each existing file to its status."""
        held = self.entry.labels.get(tag)
        if held is not None and split_suffix("x" + held.ext, (held.ext.lower(),)) is None:
            held = None
        number = held.info.get("revision") if held is not None else None
        last = self.revisions.last_number(self.image, tag) if has_revisions else 0
        if not files:
            return self._without_file(tag, held, last)
        suffix = held.ext if held is not None and held.ext in files else next(iter(files))
        for other in files.keys() - {suffix}:
            self.result.stray[f"{tag}/{self.image}{other}"] = f"the label of this id is {self.image}{suffix}"
        if tag in PLAIN_TAGS:
            return held if held is not None and held.ext == suffix else label_entry(self.image, suffix, {})
        if held is not None and held.ext == suffix and self._is_known(held, file_state(files[suffix]), last):
            return held
        newest = self.revisions.newest(self.image, tag) if last else None
        if newest is not None and newest.deleted and number is not None and number < last:
            logger.warning("A crash interrupted the deletion of a label of image %s; finished now", self.image)
            if self.transaction is not None:
                self.transaction.remove(Path(self.model.label_path(tag)) / (self.image + suffix))
            return None
        self.result.to_check.append((self.image, tag))
        if held is not None and number is not None and number == last:
            return held if held.ext == suffix else held.model_copy(update={"ext": suffix})
        if newest is not None and not newest.deleted:
            return revision_entry(newest, suffix)
        return label_entry(self.image, suffix, unchecked_fields(held.info if held is not None else {}))

    def _is_known(self, held: DataModel, state: str, last: int) -> bool:
        """Return whether the file is the one that the index describes."""
        if held.info.get("checked") != state or held.info.get("revision", last) != last:
            return False
        # A label that was unusable for a different list of labels may be usable for this one.
        return why_unusable(held.info) is None or held.info.get("labels") == self.project

    def _without_file(self, tag: str, held: DataModel | None, last: int) -> DataModel | None:
        newest = self.revisions.newest(self.image, tag) if last else None
        if newest is None or newest.deleted or self.transaction is None:
            return None
        if held is not None and held.info.get("revision") == last:
            logger.info("The file of label %s of image %s was deleted by hand", tag, self.image)
            file = file_of(self.image, self.entry)
            self.revisions.stage(
                self.transaction, self.image, tag, last + 1, None, annotator="", info={}, image_file=file
            )
            return None
        logger.warning("The file of revision %d of the label of image %s is missing; restored", last, self.image)
        return restore_revision(self.model, self.revisions, self.transaction, newest)


def restore_revision(
    model: LocalDatastoreModel, revisions: Revisions, transaction: Transaction, revision: Revision
) -> DataModel:
    """Make the kept file of a revision the current label, and return its entry."""
    target = Path(model.label_path(revision.tag)) / (revision.image + revision.suffix)
    temporary = transaction.copy(revisions.file(revision), target)
    return revision_entry(revision, revision.suffix, checked=file_state(temporary.stat()))


def revision_entry(revision: Revision, suffix: str, checked: str | None = None) -> DataModel:
    """Return the entry of a revision's label; ``checked`` is the state of its file, if that was verified."""
    names: dict[str, Any] = {} if revision.labels is None else {"labels": list(revision.labels)}
    state = {} if checked is None else {"checked": checked}
    info = {**revision.info, **names, **state, "revision": revision.number}
    return label_entry(revision.image, suffix, info, time_s=revision.time)


def label_entry(image: str, suffix: str, info: Mapping[str, object], time_s: float | None = None) -> DataModel:
    """Return an index entry for a label file."""
    return DataModel(info={**info, "ts": int(time_s or time.time()), "name": image + suffix}, ext=suffix)
