"""The studies folder: MONAI Label's local datastore, which believes everything, made to check what it is given."""

from __future__ import annotations

import filecmp
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastapi import HTTPException
from filelock import FileLock
from monailabel.config import settings
from monailabel.datastore.local import DataModel, ImageLabelModel, LocalDatastore, LocalDatastoreModel
from monailabel.interfaces.datastore import DefaultLabelTag

from deformux.files import replacing, write_text
from deformux.transforms import InvalidVolume, LoadVolumed

from .labels import checked_labels

__all__ = ["VOLUME_SUFFIXES", "CheckedDatastore"]

logger = logging.getLogger(__name__)

VOLUME_SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".mha")


class CheckedDatastore(LocalDatastore):
    """Volumes in a folder and their labels under ``labels/<tag>``, indexed by ``datastore_v2.json``.

    What cannot be used is refused with a 4xx and changes nothing; files and the index are written by rename; every
    change of the index starts from what is on disk, since training and scoring run in processes of their own.
    """

    _datastore: LocalDatastoreModel
    _config_ts: float

    def __init__(self, folder: str, *, labels: Sequence[str]) -> None:
        self.labels = tuple(labels)
        os.makedirs(folder, exist_ok=True)
        # One re-entrant lock: MONAI Label opens a new one for each step of a change.
        self._lock = FileLock(os.path.join(folder, ".lock"))
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
        info = _checked_info(label_info)
        _checked_suffix(label_filename)
        image = Path(self.get_image_uri(image_id))
        with checked_labels(Path(label_filename), image, image_id, self.labels, info) as checked:
            suffix = _checked_suffix(checked.name)
            with self._changing():
                entry = self._image(image_id)
                previous = entry.labels.get(tag)
                name = self._filename(image_id, suffix)
                with replacing(self._label_file(image_id, tag, suffix)) as temporary:
                    shutil.copyfile(checked, temporary)
                info |= {"ts": int(time.time()), "name": name}
                entry.labels[tag] = DataModel(info=info, ext=suffix)
            if previous is not None and previous.ext != suffix:
                self._label_file(image_id, tag, previous.ext).unlink(missing_ok=True)
        return image_id

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
        present = self._datastore.objects.get(name)
        if present is not None and present.labels:
            if filecmp.cmp(image_filename, self.get_image_uri(name), shallow=False):
                return name
            raise HTTPException(409, f"image {name!r} already exists and has a label; upload under another id")
        with self._changing():
            target = Path(self._datastore.image_path()) / self._filename(name, suffix)
            with replacing(target) as temporary:
                shutil.copyfile(image_filename, temporary)
            info |= {"ts": int(time.time()), "name": target.name}
            self._datastore.objects[name] = ImageLabelModel(image=DataModel(info=info, ext=suffix))
        if present is not None and present.image.ext != suffix:
            (target.parent / self._filename(name, present.image.ext)).unlink(missing_ok=True)
        return name

    def remove_image(self, image_id: str) -> None:
        """Delete a volume and its labels."""
        with self._changing():
            entry = self._image(image_id)
            for tag, label in entry.labels.items():
                self._label_file(image_id, tag, label.ext).unlink(missing_ok=True)
            Path(self.get_image_uri(image_id)).unlink(missing_ok=True)
            del self._datastore.objects[image_id]

    def remove_label(self, label_id: str, label_tag: str) -> None:
        """Delete a label."""
        with self._changing():
            label = self._label(label_id, label_tag)
            self._label_file(label_id, label_tag, label.ext).unlink(missing_ok=True)
            del self._image(label_id).labels[label_tag]

    def get_image_info(self, image_id: str) -> dict[str, Any]:
        """What is known about a volume, with its ``path``."""
        self._image(image_id)
        return super().get_image_info(image_id)

    def get_label_info(self, label_id: str, label_tag: str) -> dict[str, Any]:
        """What is known about a label."""
        return self._label(label_id, label_tag).info

    def update_image_info(self, image_id: str, info: dict[str, Any]) -> None:
        """Merge ``info`` into what is known about a volume."""
        with self._changing():
            self._image(image_id).image.info.update(_checked_info(info))

    def update_label_info(self, label_id: str, label_tag: str, info: dict[str, Any]) -> None:
        """Merge ``info`` into what is known about a label."""
        with self._changing():
            self._label(label_id, label_tag).info.update(_checked_info(info))

    def get_dataset_archive(self, limit_cases: int | None) -> str:
        """Path of a zip file with all labelled volumes."""
        if not self.datalist():
            raise HTTPException(404, "there is no submitted label yet, so there is nothing to download")
        return super().get_dataset_archive(limit_cases)

    def _image(self, image_id: str) -> ImageLabelModel:
        entry = self._datastore.objects.get(image_id)
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
    def _changing(self) -> Iterator[None]:
        """Hold the lock, start from the index on disk, and write it at the end."""
        with self._lock:
            self._init_from_datastore_file()
            yield
            self._update_datastore_file(lock=False)

    # What follows replaces parts of MONAI Label's implementation.

    def _to_id(self, file: str) -> tuple[str, str]:
        suffix = next((s for s in VOLUME_SUFFIXES if file.endswith(s)), os.path.splitext(file)[1])
        return file.removesuffix(suffix), suffix

    def _list_files(self, path: str, patterns: Sequence[str]) -> dict[str, str]:
        # Hidden files are writes under way, and the companions that a Mac leaves in archives.
        return {name: file for name, file in super()._list_files(path, patterns).items() if not name.startswith(".")}

    def _init_from_datastore_file(self, throw_exception: bool = False) -> None:
        with self._lock:
            path = Path(self._datastore_config_path)
            if not path.exists() or path.stat().st_mtime == self._config_ts:
                return
            try:
                self._datastore = type(self._datastore).model_validate_json(path.read_text())
            except ValueError as error:
                logger.error("The index %s cannot be read: %s", path, error)
                if throw_exception:
                    raise
                return
            self._datastore.base_path = self._datastore_path
            self._config_ts = path.stat().st_mtime

    def _update_datastore_file(self, lock: bool = True) -> None:
        with self._lock:
            path = Path(self._datastore_config_path)
            write_text(path, json.dumps(self._datastore.model_dump(exclude={"base_path"}), indent=2, default=str))
            self._config_ts = path.stat().st_mtime

    def _reconcile_datastore(self) -> None:
        with self._lock:
            super()._reconcile_datastore()

    def _remove_non_existing(self) -> int:
        # MONAI Label empties the index and fills it again; a request in between would find no image.
        self._init_from_datastore_file()
        gone = 0
        for image_id, entry in list(self._datastore.objects.items()):
            if not os.path.exists(self.get_image_uri(image_id)):
                del self._datastore.objects[image_id]
                gone += 1
                continue
            for tag, label in list(entry.labels.items()):
                if not self._label_file(image_id, tag, label.ext).exists():
                    del entry.labels[tag]
                    gone += 1
        return gone

    def _on_moved(self, event: Any) -> None:
        if event.dest_path == self._datastore_config_path:
            self._init_from_datastore_file()


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
