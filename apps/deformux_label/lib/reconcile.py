"""What the studies' index must say, given the files that are there."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from monailabel.datastore.local import DataModel, ImageLabelModel, LocalDatastoreModel

from deformux.files import replacing

from .index import volumes_in
from .revisions import Revision, Revisions, checksum

__all__ = ["reconciled"]

logger = logging.getLogger(__name__)


def reconciled(
    model: LocalDatastoreModel, known: Mapping[str, ImageLabelModel], revisions: Revisions
) -> dict[str, ImageLabelModel]:
    """The index entries of the volumes that are there, with the labels that are.

    Files that were copied in or deleted by hand are noticed, a save that a crash interrupted after its revision was
    written is finished, and an index that was lost comes back with what the revisions know. Unchanged entries are the
    same objects. The caller holds the studies' lock.
    """
    images = volumes_in(model.image_path())
    labels = {tag: volumes_in(model.label_path(tag)) for tag in _tags(Path(model.label_path(None)))}
    objects = {image: _image(image, suffix, known.get(image)) for image, suffix in images.items()}
    with_revisions = revisions.known()
    for image, entry in objects.items():
        there = {tag: found[image] for tag, found in labels.items() if image in found}
        tags = with_revisions.get(image, [])
        if there.keys() == entry.labels.keys() and not tags:
            continue
        updated = {}
        for tag in sorted({*there, *entry.labels, *tags}):
            held = entry.labels.get(tag)
            label = _label(model, image, tag, there.get(tag), held, revisions if tag in tags else None)
            if label is not None:
                updated[tag] = label
        if updated.keys() != entry.labels.keys() or any(updated[tag] is not entry.labels[tag] for tag in updated):
            objects[image] = entry.model_copy(update={"labels": updated})
    for image in known.keys() - objects.keys():
        logger.info("The volume of image %s is gone", image)
    return objects


def _tags(folder: Path) -> list[str]:
    try:
        return sorted(item.name for item in os.scandir(folder) if item.is_dir() and not item.name.startswith("."))
    except FileNotFoundError:
        return []


def _image(image: str, suffix: str, known: ImageLabelModel | None) -> ImageLabelModel:
    if known is not None:
        return known
    return ImageLabelModel(image=DataModel(info={"ts": int(time.time()), "name": image + suffix}, ext=suffix))


def _label(
    model: LocalDatastoreModel,
    image: str,
    tag: str,
    suffix: str | None,
    held: DataModel | None,
    revisions: Revisions | None,
) -> DataModel | None:
    """The entry of one label: ``suffix`` is that of its file, None where there is no file; ``held`` is the index's."""
    folder = Path(model.label_path(tag))
    if held is not None and (folder / (image + held.ext)).is_file():
        suffix = held.ext
    else:
        held = None if suffix is not None else held
    number = held.info.get("revision") if held is not None else None
    is_newest = revisions is not None and number is not None and number == revisions.last_number(image, tag)
    if is_newest and suffix is not None:
        return held
    newest = revisions.newest(image, tag) if revisions is not None else None
    if revisions is None or newest is None:
        return None if suffix is None else held or _entry(image, suffix, {})
    if held is None and suffix is None and newest.deleted:
        return None
    if is_newest:
        logger.info("The file of label %s of image %s was deleted by hand", tag, image)
        revisions.add(image, tag, None, annotator="", info={})
        return None
    if suffix is not None:
        found = folder / (image + suffix)
        content = checksum(found)
        if content == newest.sha256:
            return _of(newest, suffix)
        earlier = next((r for r in reversed(revisions.history(image, tag)) if r.sha256 == content), None)
        if earlier is None:
            # Drawn or copied in without this server: newer than anything that it knows.
            info = held.info if held else {}
            return _of(revisions.add(image, tag, found, suffix=suffix, annotator="", info=info), suffix)
    return _finished(folder, image, suffix, newest, revisions)


def _finished(folder: Path, image: str, suffix: str | None, newest: Revision, revisions: Revisions) -> DataModel | None:
    """Do what a crash left undone after ``newest`` was written."""
    logger.warning("A crash interrupted the saving of revision %d of image %s; finished now", newest.number, image)
    if not newest.deleted:
        with replacing(folder / (image + newest.suffix)) as temporary:
            shutil.copyfile(revisions.file(newest), temporary)
    if suffix is not None and suffix != newest.suffix:
        (folder / (image + suffix)).unlink(missing_ok=True)
    return None if newest.deleted else _of(newest, newest.suffix)


def _of(revision: Revision, suffix: str) -> DataModel:
    return _entry(revision.image, suffix, {**revision.info, "revision": revision.number}, ts=revision.time)


def _entry(image: str, suffix: str, info: Mapping[str, object], ts: float | None = None) -> DataModel:
    return DataModel(info={**info, "ts": int(ts or time.time()), "name": image + suffix}, ext=suffix)
