"""Conversion of stored labels after the project's list of labels has changed.

Every label is stored with the names of its values 1..N, and stays as it was drawn. If the project's list differs,
training, Dice, downloads and restoring get a copy with the values of the project's list. It is made when first needed
and kept under ``.deformux/mapped``. Therefore a start with a different list loses nothing, a start with the former list
brings everything back, and two servers with different lists can share a folder.

- A label in both lists gets its new value.
- A label that is no longer in the project's list becomes background (0): such a voxel has none of the remaining labels.
  New labels of the project count as not annotated: ``annotated`` lists the others, and training does not take a 0 for
  the absence of a new label.
- Unlabelled voxels (255) stay 255. Values beyond the stored list become 255, because their meaning is unknown.
- A label that has no name in common with the project's list counts as missing.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deformux.data.atomic_files import replacing
from deformux.data.label_values import UNLABELLED
from deformux_label.lib.store.label_check import segment_values
from deformux_label.lib.store.volume_writer import write_labels

__all__ = ["LabelCopies", "looked_for", "mapped_info", "names_of", "value_table", "write_mapped"]


def names_of(info: Mapping[str, Any], unnamed: Sequence[str]) -> tuple[str, ...]:
    """Return the names of a stored label's values; ``unnamed`` if it was stored without names."""
    names = info.get("labels")
    if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
        return tuple(names)
    return tuple(unnamed)


def looked_for(info: Mapping[str, Any], names: Sequence[str], project: Sequence[str]) -> list[str]:
    """Return the project's labels that were annotated in a label drawn with ``names``."""
    annotated = info.get("annotated")
    known = {str(name) for name in annotated} if isinstance(annotated, list) else set(names)
    return [name for name in project if name in names and name in known]


def mapped_info(info: Mapping[str, Any], names: Sequence[str], project: Sequence[str]) -> dict[str, Any]:
    """Return the metadata of a label, mapped to the project's list."""
    if tuple(names) == tuple(project):
        return dict(info)
    rest = {key: value for key, value in info.items() if key not in ("annotated", "label_info")}
    found = looked_for(info, names, project)
    partly = {} if len(found) == len(project) else {"annotated": found}
    return {**rest, **partly, "labels": list(project), "stored_labels": list(names)}


def value_table(names: Sequence[str], project: Sequence[str]) -> np.ndarray:
    """Return the project's value for each stored value 0..255, ``(256,)``, uint8."""
    table = np.full(256, UNLABELLED, dtype=np.uint8)
    table[0] = 0
    for value, name in enumerate(names, start=1):
        table[value] = project.index(name) + 1 if name in project else 0
    return table


def write_mapped(
    label: Path, image: Path, image_id: str, names: Sequence[str], project: Sequence[str], target: Path
) -> None:
    """Write a stored label with the values of the project's list, in the order of its image's voxels.

    Raises:
        HTTPException: 422 if the label cannot be read or is not on its image's grid.
    """
    values, _, affine = segment_values(label, image, image_id)
    values = value_table(names, project)[np.minimum(values, UNLABELLED)]
    write_labels(target, values, affine, {name: value for value, name in enumerate(project, start=1)})


class LabelCopies:
    """Copies of labels, converted for a purpose, under ``<folder>/<purpose>/<tag>/<image>/<version>``."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def mapped(
        self, label: Path, image: Path, image_id: str, tag: str, names: Sequence[str], project: Sequence[str]
    ) -> Path:
        """Return the copy of a label for the project's list; make it if it is missing or outdated."""
        return self.get(
            label,
            image_id,
            tag,
            purpose=_short(list(project)),
            made_from=list(names),
            write=lambda target: write_mapped(label, image, image_id, names, project, target),
        )

    def get(
        self, label: Path, image_id: str, tag: str, *, purpose: str, made_from: Any, write: Callable[[Path], None]
    ) -> Path:
        """Return the copy of a label for a purpose; make it if it is missing or outdated.

        Args:
            label: the file that is converted.
            image_id, tag: of the label.
            purpose: name of a folder.
            made_from: what the copy depends on besides the file, for JSON.
            write: writes the copy to a path.
        """
        status = label.stat()
        version = _short([made_from, status.st_size, status.st_mtime_ns, status.st_ino])
        place = self._root() / purpose / tag / image_id
        copy = place / version / f"{image_id}.nii.gz"
        if not copy.is_file():
            with replacing(copy) as temporary:
                write(temporary)
            for other in place.iterdir():
                if other.name != version:
                    shutil.rmtree(other, ignore_errors=True)
        return copy

    def forget(self, image_id: str) -> None:
        """Delete the copies of a volume's labels."""
        for place in self._folder.glob("*/*/*") if self._folder else ():
            if place.name == image_id:
                shutil.rmtree(place, ignore_errors=True)

    def _root(self) -> Path:
        # The studies are read-only.
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="mapped-"))
        return self._folder


def _short(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
