"""The studies folder: MONAI Label's local datastore, which believes everything, made to check and keep what it gets."""

from __future__ import annotations

import filecmp
import json
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastapi import HTTPException
from filelock import FileLock
from monailabel.config import settings
from monailabel.datastore.local import DataModel, ImageLabelModel, LocalDatastore, LocalDatastoreModel
from monailabel.interfaces.datastore import DefaultLabelTag

from deformux.files import replacing
from deformux.transforms import InvalidVolume, LoadVolumed
from deformux_label.web.caller import note, with_login

from .index import VOLUME_SUFFIXES, IndexFile
from .labels import checked_labels
from .leases import annotator_of
from .reconcile import reconciled
from .revisions import Revision, Revisions, checksum

__all__ = ["UNCERTAINTY_TAG", "VOLUME_SUFFIXES", "CheckedDatastore"]

logger = logging.getLogger(__name__)

# Where the model was unsure, 0 to 100: it lies beside the labels, but nobody drew it and nothing learns from it.
UNCERTAINTY_TAG = "uncertainty"
# What a model proposed is no work of an annotator's, and can be computed again.
_WITHOUT_REVISIONS = (DefaultLabelTag.ORIGINAL.value, UNCERTAINTY_TAG)


class CheckedDatastore(LocalDatastore):
    """Volumes in a folder and their labels under ``labels/<tag>``, indexed by ``datastore_v2.json``.

    What cannot be used is refused with a 4xx and changes nothing; every submitted label stays, as a revision, under
    ``.deformux/revisions``; files and the index are written by rename; every change of the index starts from what is
    on disk, since training and scoring run in processes of their own, and readers in other threads see the index
    before or after a change, never within one.
    """

    _datastore: LocalDatastoreModel
    _WATCH_PAUSE_S = 0.3

    def __init__(self, folder: str, *, labels: Sequence[str]) -> None:
        self.labels = tuple(labels)
        os.makedirs(folder, exist_ok=True)
        # One re-entrant lock: MONAI Label opens a new one for each step of a change.
        self._lock = FileLock(os.path.join(folder, ".lock"))
        self._index = IndexFile(Path(folder) / "datastore_v2.json")
        self.revisions = Revisions(Path(folder) / ".deformux" / "revisions")
        with self._lock:
            # Whoever writes holds the lock, so these are what a crash left.
            for leftover in (*Path(folder).glob(".writing-*"), *Path(folder).glob("labels/*/.writing-*")):
                leftover.unlink(missing_ok=True)
        self._refreshing: threading.Timer | None = None
        self._refreshing_lock = threading.Lock()
        super().__init__(
            folder,
            extensions=[f"*{suffix}" for suffix in VOLUME_SUFFIXES],
            auto_reload=settings.MONAI_LABEL_DATASTORE_AUTO_RELOAD,
            read_only=settings.MONAI_LABEL_DATASTORE_READ_ONLY,
        )
        if hasattr(self, "_handler"):
            # Another process replaces the index by rename, which MONAI Label's watcher does not listen to.
            self._handler.on_moved = self._on_moved

    def save_label(self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any]) -> str:
        """Store a label that lies on its image's grid and holds the project's values; returns the label's id."""
        self._image(image_id)
        tag = _checked_tag(label_tag)
        if tag == UNCERTAINTY_TAG:
            raise HTTPException(400, f"the tag {tag!r} is kept for the model's own maps; save the label under another")
        info = _checked_info(label_info)
        _checked_suffix(label_filename)
        image = Path(self.get_image_uri(image_id))
        with checked_labels(Path(label_filename), image, image_id, self.labels, info) as checked:
            self._store_label(image_id, tag, checked, info)
        return image_id

    def save_uncertainty(self, image_id: str, file: Path, info: dict[str, Any]) -> None:
        """Store where a model is unsure of a volume, in the place of what was stored before."""
        self._store_label(image_id, UNCERTAINTY_TAG, file, _checked_info(info))

    def restore_label(self, image_id: str, number: int, annotator: str, tag: str = "final") -> Revision:
        """Make an earlier revision of a label the current one again, as a new revision."""
        self._image(image_id)
        revision = self.revisions.get(image_id, tag, number)
        if revision is None or revision.deleted:
            there = [str(r.number) for r in self.revisions.history(image_id, tag) if not r.deleted]
            known = f"there are {', '.join(there)}" if there else "there is none"
            raise HTTPException(404, f"no revision {number} of the label {tag!r} of {image_id!r}; {known}")
        info = {**revision.info, "user": annotator, "model_version": revision.model_version}
        image = Path(self.get_image_uri(image_id))
        # Kept labels hold the project's values, whatever the segments were numbered when they were sent.
        with checked_labels(self.revisions.file(revision), image, image_id, self.labels, {}) as checked:
            kept = self._store_label(image_id, tag, checked, info, restored_from=number)
        assert kept is not None
        return kept

    def _store_label(
        self, image_id: str, tag: str, file: Path, info: dict[str, Any], restored_from: int | None = None
    ) -> Revision | None:
        suffix = _checked_suffix(file.name)
        revision = None
        with self._changing() as objects:
            entry = self._entry(objects, image_id)
            previous = entry.labels.get(tag)
            if tag not in _WITHOUT_REVISIONS:
                self._keep_if_unknown(image_id, tag, previous)
                revision = self.revisions.add(
                    image_id,
                    tag,
                    file,
                    suffix=suffix,
                    annotator=annotator_of(info),
                    model_version=_text(info.get("model_version")),
                    restored_from=restored_from,
                    info=info,
                )
                info = {**info, "revision": revision.number}
                note(revision=revision.number, annotator=revision.annotator)
            with replacing(self._label_file(image_id, tag, suffix)) as temporary:
                shutil.copyfile(file, temporary)
            info = {**info, "ts": int(time.time()), "name": self._filename(image_id, suffix)}
            objects[image_id] = _with_label(entry, tag, DataModel(info=info, ext=suffix))
        if previous is not None and previous.ext != suffix:
            self._label_file(image_id, tag, previous.ext).unlink(missing_ok=True)
        return revision

    def add_image(self, image_id: str, image_filename: str, image_info: dict[str, Any]) -> str:
        """Store a volume; one whose id is taken replaces the volume of that id only while it has no label."""
        suffix = _checked_suffix(image_filename)
        name = (image_id or Path(image_filename).name).removesuffix(suffix)
        if not re.fullmatch(r"[^/\\\x00-\x1f.][^/\\\x00-\x1f]*", name):
            raise HTTPException(400, f"{name!r} cannot be an image id; use a name without path separators")
        info = _checked_info(image_info)
        try:
            LoadVolumed("image")({"image": image_filename})
        except InvalidVolume as error:
            raise HTTPException(422, str(error).replace(Path(image_filename).name, name)) from error
        with self._changing() as objects:
            present = objects.get(name)
            if present is not None and present.labels.keys() - {UNCERTAINTY_TAG}:
                if filecmp.cmp(image_filename, self.get_image_uri(name), shallow=False):
                    return name
                raise HTTPException(409, f"image {name!r} already exists and has a label; upload under another id")
            if present is not None and UNCERTAINTY_TAG in present.labels:
                # It shows where the model was unsure of the volume that goes.
                self._delete_label(name, UNCERTAINTY_TAG, present.labels[UNCERTAINTY_TAG])
            target = Path(self._datastore.image_path()) / self._filename(name, suffix)
            with replacing(target) as temporary:
                shutil.copyfile(image_filename, temporary)
            info |= {"ts": int(time.time()), "name": target.name}
            objects[name] = ImageLabelModel(image=DataModel(info=info, ext=suffix))
        if present is not None and present.image.ext != suffix:
            (target.parent / self._filename(name, present.image.ext)).unlink(missing_ok=True)
        return name

    def remove_image(self, image_id: str) -> None:
        """Delete a volume and its labels; the labels' revisions stay."""
        with self._changing() as objects:
            entry = self._entry(objects, image_id)
            for tag, label in entry.labels.items():
                self._delete_label(image_id, tag, label)
            Path(self.get_image_uri(image_id)).unlink(missing_ok=True)
            del objects[image_id]

    def remove_label(self, label_id: str, label_tag: str) -> None:
        """Delete a label; its revisions stay, and each can be restored."""
        with self._changing() as objects:
            entry = self._entry(objects, label_id)
            self._delete_label(label_id, label_tag, self._label(label_id, label_tag))
            objects[label_id] = _with_label(entry, label_tag, None)

    def _delete_label(self, image_id: str, tag: str, label: DataModel) -> None:
        if tag not in _WITHOUT_REVISIONS:
            self._keep_if_unknown(image_id, tag, label)
            author = with_login({})
            gone = self.revisions.add(image_id, tag, None, annotator=author.get("user", ""), info=author)
            note(revision=gone.number)
        self._label_file(image_id, tag, label.ext).unlink(missing_ok=True)

    def _keep_if_unknown(self, image_id: str, tag: str, label: DataModel | None) -> None:
        """Make a revision of a label that came another way, such as copied into the folder, before it goes."""
        file = self._label_file(image_id, tag, label.ext) if label else None
        if label is None or file is None or not file.is_file():
            return
        newest = self.revisions.newest(image_id, tag)
        if newest is None or newest.sha256 != checksum(file):
            annotator = annotator_of(label.info) if label.info else ""
            self.revisions.add(image_id, tag, file, suffix=label.ext, annotator=annotator, info=label.info)

    def get_image_info(self, image_id: str) -> dict[str, Any]:
        """What is known about a volume, with its ``path``."""
        self._image(image_id)
        return super().get_image_info(image_id)

    def get_label_info(self, label_id: str, label_tag: str) -> dict[str, Any]:
        """What is known about a label."""
        return self._label(label_id, label_tag).info

    def update_image_info(self, image_id: str, info: dict[str, Any]) -> None:
        """Merge ``info`` into what is known about a volume."""
        more = _checked_info(info)
        with self._changing() as objects:
            entry = self._entry(objects, image_id)
            image = entry.image.model_copy(update={"info": {**entry.image.info, **more}})
            objects[image_id] = entry.model_copy(update={"image": image})

    def update_label_info(self, label_id: str, label_tag: str, info: dict[str, Any]) -> None:
        """Merge ``info`` into what is known about a label."""
        # Whose work a label is does not change with what others say about it.
        more = {key: value for key, value in _checked_info(info).items() if key not in ("client_id", "user")}
        with self._changing() as objects:
            entry = self._entry(objects, label_id)
            label = self._label(label_id, label_tag)
            label = label.model_copy(update={"info": {**label.info, **more}})
            objects[label_id] = _with_label(entry, label_tag, label)

    def status(self) -> dict[str, Any]:
        """How many volumes there are, how many have a submitted label, and how many labels each tag has."""
        status = super().status()
        status["label_tags"].pop(UNCERTAINTY_TAG, None)
        return status

    def get_dataset_archive(self, limit_cases: int | None) -> str:
        """Path of a zip file with all labelled volumes."""
        if not self.datalist():
            raise HTTPException(404, "there is no submitted label yet, so there is nothing to download")
        return super().get_dataset_archive(limit_cases)

    def _image(self, image_id: str) -> ImageLabelModel:
        return self._entry(self._datastore.objects, image_id)

    def _entry(self, objects: Mapping[str, ImageLabelModel], image_id: str) -> ImageLabelModel:
        entry = objects.get(image_id)
        if entry is None:
            raise HTTPException(404, f"there is no image with the id {image_id!r}")
        return entry

    def _label(self, label_id: str, tag: str) -> DataModel:
        label = self._image(label_id).labels.get(tag)
        if label is None:
            raise HTTPException(404, f"image {label_id!r} has no label with the tag {tag!r}")
        return label

    def _label_file(self, image_id: str, tag: str, suffix: str) -> Path:
        return Path(self._datastore.label_path(tag)) / self._filename(image_id, suffix)

    @contextmanager
    def _changing(self) -> Iterator[dict[str, ImageLabelModel]]:
        """Hold the lock, start from the index on disk, and write it at the end, unless nothing changed.

        Entries are replaced, never changed in place.
        """
        with self._lock:
            self._init_from_datastore_file()
            before = self._datastore.objects
            objects = dict(before)
            yield objects
            if objects.keys() != before.keys() or any(objects[key] is not before[key] for key in objects):
                changed = self._datastore.model_copy(update={"objects": objects})
                self._index.write(changed)
                self._datastore = changed

    # What follows replaces parts of MONAI Label's implementation.

    def _to_id(self, file: str) -> tuple[str, str]:
        suffix = next((s for s in VOLUME_SUFFIXES if file.endswith(s)), os.path.splitext(file)[1])
        return file.removesuffix(suffix), suffix

    def _init_from_datastore_file(self, throw_exception: bool = False) -> None:  # noqa: ARG002 - as it is called
        with self._lock:
            try:
                model = self._index.changed()
            except ValueError as error:
                aside = self._index.put_aside()
                reason = str(error).splitlines()[0]
                logger.error("The index was damaged, is kept as %s, and is made anew of the files: %s", aside, reason)
                return
            if model is not None:
                model.base_path = self._datastore_path
                self._datastore = model

    def _update_datastore_file(self, lock: bool = True) -> None:  # noqa: ARG002 - as it is called
        with self._lock:
            self._index.write(self._datastore)

    def _reconcile_datastore(self) -> None:
        with self._changing() as objects:
            found = reconciled(self._datastore, objects, self.revisions)
            objects.clear()
            objects.update(found)
            if not self._index.path.exists():
                self._index.write(self._datastore)

    def _on_any_event(self, event: Any) -> None:
        if self._is_news(event.event_type, event.src_path):
            self._refresh_soon()

    def _on_modify_event(self, event: Any) -> None:
        if event.src_path == self._datastore_config_path:
            self._init_from_datastore_file()

    def _on_moved(self, event: Any) -> None:
        if event.dest_path == self._datastore_config_path:
            self._init_from_datastore_file()
        elif self._is_news("created", event.dest_path) or self._is_news("deleted", event.src_path):
            self._refresh_soon()

    def _is_news(self, kind: str, path: str) -> bool:
        """Whether the index does not know yet that a file came or went; its own writes are no news."""
        if path == self._datastore_config_path:
            return kind == "deleted"
        folder, name = os.path.split(path)
        if name.startswith("."):
            return False
        image_id, _ = self._to_id(name)
        entry = self._datastore.objects.get(image_id)
        is_label = os.path.realpath(folder) != os.path.realpath(self._datastore.image_path())
        known = entry is not None and (not is_label or os.path.basename(folder) in entry.labels)
        return known == (kind == "deleted")

    def _refresh_soon(self) -> None:
        """Once for all files that are copied in the same moment: each time the whole folder is listed."""
        with self._refreshing_lock:
            if self._refreshing is None:
                self._refreshing = threading.Timer(self._WATCH_PAUSE_S, self._refresh_now)
                self._refreshing.daemon = True
                self._refreshing.start()

    def _refresh_now(self) -> None:
        with self._refreshing_lock:
            self._refreshing = None
        self.refresh()


def _with_label(entry: ImageLabelModel, tag: str, label: DataModel | None) -> ImageLabelModel:
    labels = {name: known for name, known in entry.labels.items() if name != tag}
    if label is not None:
        labels[tag] = label
    return entry.model_copy(update={"labels": labels})


def _checked_tag(tag: str) -> str:
    value = tag.value if isinstance(tag, DefaultLabelTag) else str(tag)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", value):
        raise HTTPException(400, f"{value!r} cannot be a label tag; use letters, digits, - and _")
    return value


def _checked_suffix(path: str) -> str:
    for suffix in VOLUME_SUFFIXES:
        if path.endswith(suffix):
            return suffix
    kind = os.path.splitext(path)[1] or "without a suffix"
    raise HTTPException(422, f"a file {kind} cannot be stored as a volume; send one of {', '.join(VOLUME_SUFFIXES)}")


def _checked_info(info: Any) -> dict[str, Any]:
    if info is not None and not isinstance(info, dict):
        raise HTTPException(400, f"params must be a JSON object; got {type(info).__name__}")
    try:
        json.dumps(info, allow_nan=False)
    except ValueError as error:
        # It would be stored, and every later listing of the datastore would fail.
        raise HTTPException(400, "params must be JSON without NaN or Infinity") from error
    return dict(info or {})


def _text(value: Any) -> str | None:
    return str(value) if value else None
