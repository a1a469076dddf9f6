"""Checks of a submitted label: grid, values, segments."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from fastapi import HTTPException

from deformux.data.header import GEOMETRY_TOLERANCE_MM, VolumeHeader, geometry_difference, shown_shape
from deformux.data.label_values import UNLABELLED, check_label_values
from deformux.data.nrrd import is_segmentation
from deformux.data.seg_nrrd import labels_of_segments, segments_of
from deformux.data.volume_reader import InvalidVolume, OpenVolume, open_volume, read_volume
from deformux_label.lib.store.volume_writer import write_labels

__all__ = ["checked_labels", "label_array", "segment_values"]

# The Slicer extension never saves, and therefore never numbers, these segments.
_NOT_SAVED = ("background", "foreground_scribbles", "background_scribbles")
# Largest value in a file of arbitrary segments.
_MAX_SEGMENTS = 65_535
# Each layer of segments takes as much memory as the scan.
_MAX_LAYERS = 256
# Limits of a segmentation's size in memory: per voxel of its scan, and a minimum for small scans.
_MAX_LABEL_BYTES = 16
_SMALL_LABEL_BYTES = 2**28


@contextmanager
def checked_labels(
    label: Path, image: Path, image_id: str, names: Sequence[str], info: dict[str, Any]
) -> Iterator[Path]:
    """Yield the path of a file with the label in this project's values 1..N: the given one, or a rewritten one.

    The Slicer extension numbers the segments it saves by position and lists their names in ``label_info``. If a
    radiologist deletes or reorders segments, the numbers change; they are mapped back by name. A file that names its
    segments itself, such as ``.seg.nrrd``, is read by these names: they belong to the values in the file, while
    ``label_info`` counts positions.

    Voxels of 255 are unlabelled; ``annotated`` in ``info`` lists the labels that were looked for, if not all were.

    Raises:
        HTTPException: 422 if the label is unreadable, not on its image's grid, or has unexpected values, or if
            ``annotated`` names anything but labels of the project.
    """
    _check_annotated(info, names)
    with tempfile.TemporaryDirectory() as folder:
        yield _checked(label, image, image_id, names, _segment_names(info), Path(folder))


def label_array(label: Path, image: Path, image_id: str, names: Sequence[str], info: dict[str, Any]) -> np.ndarray:
    """Return the values ``(X, Y, Z)``, uint8, of a label in its image's voxel order; check as ``checked_labels``."""
    with checked_labels(label, image, image_id, names, info) as checked:
        return read_volume(checked, np.uint8).values


def segment_values(
    label: Path, image: Path, image_id: str
) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the values ``(X, Y, Z)`` of a label file in its image's voxel order, whatever they mean.

    Returns:
        the values; the matrix ``(4, 4)`` from voxels of the file to voxels of the image, whose order may differ; and
        the matrix from voxels of the image to RAS millimetres.

    Raises:
        HTTPException: 422 if the file is unreadable, not on its image's grid, or has values that are not whole numbers.
    """
    with _refused(label, image, image_id):
        scan = _header(image)
        with open_volume(label) as opened:
            found = _values_on(scan, opened, _MAX_SEGMENTS, unlabelled=False)
        return found.values.astype(np.uint16), found.placement.matrix, scan.affine


def _checked(label: Path, image: Path, image_id: str, names: Sequence[str], sent: Sequence[str], folder: Path) -> Path:
    numbers = {name: value for value, name in enumerate(names, start=1)}
    with _refused(label, image, image_id):
        scan = _header(image)
        with open_volume(label) as opened:
            if is_segmentation(opened.header):
                unchanged, values = _of_segments(scan, opened, numbers)
            else:
                unchanged, values = _of_values(scan, opened, names, sent)
    if unchanged:
        return label
    rewritten = folder / "label.nii.gz"
    write_labels(rewritten, values, scan.affine, numbers)
    return rewritten


def _of_values(
    scan: VolumeHeader, opened: OpenVolume, names: Sequence[str], sent: Sequence[str]
) -> tuple[bool, npt.NDArray[np.uint8]]:
    """Return whether a file without segment names already holds the project's values, and these values."""
    listed = sent or names
    try:
        found = _values_on(scan, opened, len(listed), unlabelled=True)
    except InvalidVolume as error:
        valid = ", ".join(f"{value} {name}" for value, name in enumerate(listed, start=1))
        raise InvalidVolume(f"{error} ({valid})" if "whole numbers" in str(error) else str(error)) from error
    values = found.values.astype(np.uint8)
    to_project = np.zeros(256, dtype=np.uint8)
    to_project[UNLABELLED] = UNLABELLED
    for value, name in enumerate(listed, start=1):
        if name in names:
            to_project[value] = names.index(name) + 1
        elif (values == value).any():
            raise HTTPException(422, f"segment {name!r} is not a label of this project, which has {', '.join(names)}")
    same_values = bool((to_project[: len(listed) + 1] == np.arange(len(listed) + 1)).all())
    return same_values and found.placement.is_identity, to_project[values]


def _of_segments(scan: VolumeHeader, opened: OpenVolume, numbers: dict[str, int]) -> tuple[bool, npt.NDArray[np.uint8]]:
    """Like ``_of_values``, for a file that names its segments and may cover only a part of the scan."""
    segments = segments_of(opened.name, opened.header)
    placement = _Placement.of(scan, opened)
    if opened.header.layers > _MAX_LAYERS:
        raise InvalidVolume(
            f"{opened.name} has {opened.header.layers} layers of segments; at most {_MAX_LAYERS} are read"
        )
    _check_size(scan, opened)
    stored = opened.read(opened.header.dtype.newbyteorder("=")).values
    layers = stored if opened.header.layers > 1 else stored[None]
    labels = labels_of_segments(opened.name, layers, segments, numbers)
    check_label_values(opened.name, labels, len(numbers), unlabelled=True)
    whole = placement.is_whole(scan, opened.header)
    unchanged = whole and placement.is_identity and len(layers) == 1 and np.array_equal(labels, stored)
    return unchanged, placement.place(opened.name, labels, scan.shape)


def _check_size(scan: VolumeHeader, opened: OpenVolume) -> None:
    """Refuse a file that needs far more memory than its scan: a small compressed file may be huge in memory."""
    if opened.header.n_bytes > max(_SMALL_LABEL_BYTES, _MAX_LABEL_BYTES * math.prod(scan.shape)):
        raise InvalidVolume(
            f"{opened.name} holds {opened.header.n_bytes // 10**6:,} MB of {shown_shape(opened.header.file_shape)} "
            f"values for an image of {shown_shape(scan.shape)} voxels; expected segments of about the image's size"
        )


@dataclass(frozen=True)
class _PlacedLabels:
    values: npt.NDArray
    placement: _Placement


def _values_on(scan: VolumeHeader, opened: OpenVolume, n_values: int, *, unlabelled: bool) -> _PlacedLabels:
    """Return the values of a file that covers the scan, in the scan's voxel order."""
    placement = _Placement.of(scan, opened)
    if not placement.is_whole(scan, opened.header):
        raise _different_grid(scan, opened)
    if opened.header.layers > 1:
        raise InvalidVolume(f"{opened.name} has several layers of segments; expected one volume")
    values = opened.read().values
    check_label_values(opened.name, values, n_values, unlabelled=unlabelled)
    return _PlacedLabels(placement.place(opened.name, values, scan.shape), placement)


@dataclass(frozen=True)
class _Placement:
    """Where the voxels of a label lie on a scan's grid: ``matrix`` ``(4, 4)`` holds whole numbers.

    Slicer mirrors the third axis of every left-handed scan that it loads, and saves labels in that order. It may save
    only the part of a scan that contains segments.
    """

    matrix: npt.NDArray[np.float64]

    @classmethod
    def of(cls, scan: VolumeHeader, opened: OpenVolume) -> _Placement:
        """Return the placement; raise InvalidVolume if the voxel grids do not coincide."""
        label = opened.header
        matrix = np.rint(np.linalg.inv(scan.affine) @ label.affine)
        turns = np.abs(matrix[:3, :3])
        permutes = bool((turns.sum(0) == 1).all() and (turns.sum(1) == 1).all())
        snapped = scan.affine @ matrix
        if not permutes or geometry_difference(label.shape, snapped, label.shape, label.affine, GEOMETRY_TOLERANCE_MM):
            raise _different_grid(scan, opened)
        return cls(matrix)

    @property
    def is_identity(self) -> bool:
        """Return whether each voxel has the same index in label and scan."""
        return bool((self.matrix == np.eye(4)).all())

    def is_whole(self, scan: VolumeHeader, label: VolumeHeader) -> bool:
        """Return whether the label has exactly the scan's voxels."""
        low, high = self._box(label.shape)
        return bool((low == 0).all() and (high == scan.shape).all())

    def place(self, name: str, values: npt.NDArray, shape: tuple[int, int, int]) -> npt.NDArray:
        """Return values ``(X, Y, Z)`` in the scan's voxel order, 0 outside the label.

        Raises:
            InvalidVolume: the label has labelled voxels outside the scan.
        """
        low, high = self._box(values.shape)
        turns = self.matrix[:3, :3]
        order = np.abs(turns).argmax(axis=1)  # the label's axis along each of the scan's
        turned = values.transpose(order)
        turned = turned[tuple(slice(None, None, int(turns[axis, own])) for axis, own in enumerate(order))]
        if (low == 0).all() and (high == shape).all():
            return np.ascontiguousarray(turned)
        placed = np.zeros(shape, dtype=values.dtype)
        begin, end = np.clip(low, 0, shape), np.clip(high, 0, shape)
        inside = turned[tuple(slice(*ends) for ends in zip(begin - low, np.maximum(end, begin) - low, strict=True))]
        if np.count_nonzero(inside) != np.count_nonzero(turned):
            raise InvalidVolume(f"{name} has labelled voxels outside its image; expected segments within it")
        placed[tuple(slice(*ends) for ends in zip(begin, np.maximum(end, begin), strict=True))] = inside
        return placed

    def _box(self, shape: Sequence[int]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the range of the label's voxels on the scan's grid: the first, and one past the last."""
        corners = self.matrix[:3, :3] @ np.array([np.zeros(3), np.array(shape) - 1]).T + self.matrix[:3, 3:]
        return corners.min(1).astype(int), corners.max(1).astype(int) + 1


def _different_grid(scan: VolumeHeader, opened: OpenVolume) -> InvalidVolume:
    label = opened.header
    difference = geometry_difference(scan.shape, scan.affine, label.shape, label.affine)
    return InvalidVolume(f"{opened.name} is not on its image's grid: {difference or 'its voxels lie elsewhere'}")


def _header(image: Path) -> VolumeHeader:
    with open_volume(image) as opened:
        return opened.header


@contextmanager
def _refused(label: Path, image: Path, image_id: str) -> Iterator[None]:
    """Turn InvalidVolume into a 422 with the image's id in place of temporary file names."""
    try:
        yield
    except InvalidVolume as error:
        message = str(error).replace(f"label {label.name}", label.name)
        message = message.replace(label.name, f"the label for {image_id}").replace(image.name, f"image {image_id}")
        raise HTTPException(422, message) from error


def _check_annotated(info: dict[str, Any], names: Sequence[str]) -> None:
    annotated = info.get("annotated")
    if annotated is None or (isinstance(annotated, list) and annotated and set(map(str, annotated)) <= set(names)):
        return
    raise HTTPException(422, f"annotated must be a list of labels out of {', '.join(names)}; got {annotated!r}")


def _segment_names(info: dict[str, Any]) -> list[str]:
    """Return the names of the saved segments by position; empty if the client listed none."""
    listed = info.get("label_info")
    if not isinstance(listed, list) or not all(isinstance(item, dict) and item.get("name") for item in listed):
        return []
    return [str(item["name"]) for item in listed if item["name"] not in _NOT_SAVED]
