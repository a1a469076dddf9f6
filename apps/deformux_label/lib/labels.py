"""Is a submitted label one that this project can learn from?"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from fastapi import HTTPException
from monai.data import MetaTensor
from monai.transforms import LoadImage
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation, ornt_transform

from deformux.transforms import UNLABELLED, InvalidVolume, LoadLabeld, LoadVolumed, geometry_difference

from .infers.writer import write_labels

__all__ = ["checked_labels", "label_array", "segment_values"]

# Segments that the Slicer extension never saves, and therefore never numbers.
_NOT_SAVED = ("background", "foreground_scribbles", "background_scribbles")
# In a file of segments that are not the project's labels.
_MOST_SEGMENTS = 65_535


@contextmanager
def checked_labels(
    label: Path, image: Path, image_id: str, names: Sequence[str], info: dict[str, Any]
) -> Iterator[Path]:
    """Path of a file with the label in this project's values 1..N: the given one, or a rewritten one.

    The Slicer extension numbers the segments it saves by their position and lists their names in ``label_info``. A
    radiologist who deletes or reorders segments therefore sends other numbers, which are brought back by name.

    Voxels of 255 are unlabelled; ``annotated`` in ``info`` lists the labels that were looked for, if not all were.

    Raises:
        HTTPException: 422 where the label is unreadable, on another grid than its image, or has foreign values, or
            where what was annotated is no label of the project.
    """
    _check_annotated(info, names)
    with tempfile.TemporaryDirectory() as folder:
        yield _checked(label, image, image_id, names, _segment_names(info), Path(folder))


def label_array(label: Path, image: Path, image_id: str, names: Sequence[str], info: dict[str, Any]) -> np.ndarray:
    """The values ``(X, Y, Z)``, uint8, of a label in the order of its image's voxels; as ``checked_labels``."""
    with checked_labels(label, image, image_id, names, info) as checked:
        values = LoadImage(image_only=True, dtype=np.uint8)(checked).numpy()
    return values.reshape(*values.shape[:3], *[1] * (3 - values.ndim))


def segment_values(
    label: Path, image: Path, image_id: str
) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The values ``(X, Y, Z)`` of a label file in the order of its image's voxels, whatever they stand for.

    Returns:
        the values; the matrix ``(4, 4)`` from voxels of the file to those of the image, whose order may differ; and
        the one from the latter to RAS millimetres.

    Raises:
        HTTPException: 422 where the file is unreadable, on another grid than its image, or has other values than
            whole numbers.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            found, ordered = _on_the_scan(label, image, image_id, _MOST_SEGMENTS, Path(folder), unlabelled=False)
    except InvalidVolume as error:
        raise HTTPException(422, str(error)) from error
    affine = np.asarray(found.affine, dtype=float)
    to_scan = np.eye(4)
    if ordered is not None:
        of_file = np.asarray(LoadImage(image_only=True)(label).affine, dtype=float)
        to_scan = np.linalg.inv(affine) @ of_file
    return found[0].numpy().astype(np.uint16), to_scan, affine


def _checked(label: Path, image: Path, image_id: str, names: Sequence[str], sent: Sequence[str], folder: Path) -> Path:
    n_values = len(sent) if sent else len(names)
    try:
        found, ordered = _on_the_scan(label, image, image_id, n_values, folder, unlabelled=True)
    except InvalidVolume as error:
        valid = ", ".join(f"{value} {name}" for value, name in enumerate(sent or names, start=1))
        message = str(error)
        raise HTTPException(422, f"{message} ({valid})" if "whole numbers" in message else message) from error
    values = found[0].numpy().astype(np.uint8)
    to_project = np.zeros(256, dtype=np.uint8)
    to_project[UNLABELLED] = UNLABELLED
    for value, name in enumerate(sent or names, start=1):
        if name in names:
            to_project[value] = names.index(name) + 1
        elif (values == value).any():
            raise HTTPException(422, f"segment {name!r} is not a label of this project, which has {', '.join(names)}")
    if ordered is None and (to_project[: n_values + 1] == np.arange(n_values + 1)).all():
        return label
    rewritten = folder / "label.nii.gz"
    affine = np.asarray(found.affine, dtype=float)
    write_labels(rewritten, to_project[values], affine, {name: v for v, name in enumerate(names, start=1)})
    return rewritten


def _on_the_scan(
    label: Path, image: Path, image_id: str, n_values: int, folder: Path, *, unlabelled: bool
) -> tuple[MetaTensor, Path | None]:
    """The label ``(1, X, Y, Z)`` on its image's grid, and the reordered copy in ``folder`` if there had to be one."""
    ordered = None
    try:
        scan = LoadVolumed("image")({"image": image})
        ordered = _in_voxel_order_of(scan["image"], label, folder)
        load = LoadLabeld("label", n_labels=n_values, unlabelled=unlabelled)
        return load({**scan, "label": ordered or label})["label"], ordered
    except InvalidVolume as error:
        file = (ordered or label).name
        message = str(error).replace(f"label {file}", file)
        message = message.replace(file, f"the label for {image_id}").replace(image.name, f"image {image_id}")
        raise InvalidVolume(message) from error


def _check_annotated(info: dict[str, Any], names: Sequence[str]) -> None:
    annotated = info.get("annotated")
    if annotated is None or (isinstance(annotated, list) and annotated and set(map(str, annotated)) <= set(names)):
        return
    raise HTTPException(422, f"annotated must be a list of labels of {', '.join(names)}; got {annotated!r}")


def _in_voxel_order_of(scan: MetaTensor, label: Path, folder: Path) -> Path | None:
    """A copy of a label whose voxels lie where the scan's do but in another order; None where the order is the same.

    Slicer mirrors the third axis of every left-handed scan that it loads, and saves labels in that order.
    """
    try:
        volume = LoadImage(image_only=True, dtype=np.float32)(label)
    except Exception:  # the check that follows says so in a sentence
        return None
    if volume.ndim != 3:
        return None
    affine = np.asarray(volume.affine, dtype=float)
    reorder = ornt_transform(io_orientation(affine), io_orientation(np.asarray(scan.affine, dtype=float)))
    values = apply_orientation(volume.numpy(), reorder)
    affine = affine @ inv_ornt_aff(reorder, volume.shape)
    same_order = (reorder == [[0, 1], [1, 1], [2, 1]]).all()
    if same_order or geometry_difference(scan.shape[1:], scan.affine, values.shape, affine):
        return None
    path = folder / f"{label.name.split('.')[0]}.reordered.nii.gz"
    nib.save(nib.Nifti1Image(values, affine), path)
    return path


def _segment_names(info: dict[str, Any]) -> list[str]:
    """Names by position of the saved segments, or nothing where the client did not list any."""
    listed = info.get("label_info")
    if not isinstance(listed, list) or not all(isinstance(item, dict) and item.get("name") for item in listed):
        return []
    return [str(item["name"]) for item in listed if item["name"] not in _NOT_SAVED]
