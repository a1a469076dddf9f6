"""Facts of one scan and of one label, from which a plan is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from deformux.data.components import Components
from deformux.data.header import InvalidVolume, VolumeHeader, geometry_difference
from deformux.data.label_values import UNLABELLED, check_label_values
from deformux.data.partial_labels import filled_between_slices
from deformux.data.volume_reader import OpenVolume, open_volume

__all__ = ["LEVELS", "Intensities", "LabelledFacts", "ScanFacts", "read_case_facts", "read_scan_facts"]

_Index: TypeAlias = tuple[int, int, int]
_Triple: TypeAlias = tuple[float, float, float]

# A scan's own percentiles, as those of the labelled voxels in nnU-Net.
_LOW, _HIGH = 0.5, 99.5
LEVELS: npt.NDArray[np.float64] = np.unique(np.r_[0:2:21j, 2:98:97j, 98:100:21j].round(3))
"""Percentages of the percentiles that describe the intensities of labelled voxels: fine at both ends."""
# Percentiles of a million voxels are as good as those of all.
_MAX_SAMPLES = 1_000_000
# An unlabelled scan's intensities are read from this many slices, within this many bytes from its start.
_SLICES, _MAX_BYTES = 16, 64 * 2**20
# Where writers keep the DICOM modality in a NRRD header.
_MODALITY_FIELDS = ("modality", "0008|0060", "dicom_0008_0060")


@dataclass(frozen=True)
class Intensities:
    """Intensities of a scan: their range, the percentiles 0.5 and 99.5, and whether all are whole numbers."""

    lowest: float
    low: float
    high: float
    highest: float
    whole: bool


@dataclass(frozen=True)
class ScanFacts:
    """Facts of a scan.

    Args:
        shape: voxels along the file's axes.
        affine: from voxels to RAS millimetres, ``(4, 4)``.
        modality: DICOM modality in the header, such as ``CT``; empty if it says none.
        intensities: None if they were not read yet.
    """

    shape: _Index
    affine: tuple[tuple[float, ...], ...]
    modality: str = ""
    intensities: Intensities | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        # asdict copies each number: with thousands of scans that takes seconds.
        found = self.intensities
        return {**vars(self), "intensities": None if found is None else dict(vars(found))}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ScanFacts:
        """Invert ``to_dict``, also after JSON."""
        found = values["intensities"]
        return cls(
            _index(values["shape"]),
            tuple(tuple(float(v) for v in row) for row in values["affine"]),
            str(values["modality"]),
            None if found is None else Intensities(**found),
        )


@dataclass(frozen=True)
class LabelledFacts:
    """Facts of a label, by label value; values that do not occur are missing.

    Args:
        voxels: number of voxels.
        boxes: first voxel, and the one after the last, along the file's axes.
        chords_vox: mean length in voxels of a label's runs along each axis of the file: how thick it is there.
        percentiles: at ``LEVELS``, of the scan's intensities at all labelled voxels; empty if there are none.
        largest_share: of the voxels of all labels together, in their largest connected component; or of those inside,
            without the outermost, if that is less: thin bridges, such as vessels between organs, join nothing.
    """

    voxels: Mapping[int, int]
    boxes: Mapping[int, tuple[_Index, _Index]]
    chords_vox: Mapping[int, _Triple]
    percentiles: tuple[float, ...]
    largest_share: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return dict(vars(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LabelledFacts:
        """Invert ``to_dict``, also after JSON, which turns numbers as keys into text."""
        return cls(
            {int(label): int(n) for label, n in values["voxels"].items()},
            {int(label): (_index(a), _index(b)) for label, (a, b) in values["boxes"].items()},
            {int(label): (float(x), float(y), float(z)) for label, (x, y, z) in values["chords_vox"].items()},
            tuple(float(value) for value in values["percentiles"]),
            float(values["largest_share"]),
        )

    def union(self, labels: Sequence[int]) -> tuple[_Index, _Index] | None:
        """Return the box around some labels, or None if none of them occurs."""
        found = [self.boxes[label] for label in labels if label in self.boxes]
        if not found:
            return None
        start, stop = (np.array(ends) for ends in zip(*found, strict=True))
        return _index(start.min(axis=0)), _index(stop.max(axis=0))


def read_scan_facts(path: Path, *, intensities: bool = True) -> ScanFacts:
    """Read the header of a scan, and its intensities from some of its slices.

    Of a large file no more than the first 64 MB of voxels are read, so that thousands of scans do not take hours.

    Raises:
        InvalidVolume: it cannot be read.
    """
    with open_volume(path) as opened:
        header = _one_layer(opened, "a scan")
        found = None
        if intensities:
            opened.refuse_constant()
            found = _intensities(opened.read_slices(_SLICES, most_bytes=_MAX_BYTES), header)
    return _facts(header, found)


def read_case_facts(image: Path, label: Path) -> tuple[ScanFacts, LabelledFacts]:
    """Read a scan and its label, both whole.

    Raises:
        InvalidVolume: one of them cannot be read, or the label is not on its scan's grid.
    """
    with open_volume(image) as opened, open_volume(label) as opened_label:
        header, own = _one_layer(opened, "a scan"), _one_layer(opened_label, "one volume of labels")
        difference = geometry_difference(header.shape, header.affine, own.shape, own.affine)
        if difference:
            raise InvalidVolume(f"label {label.name} is not on its image's grid: {difference}")
        opened.refuse_constant()
        values = opened.read().values
        labels = opened_label.read().values
    check_label_values(label.name, labels, UNLABELLED - 1, unlabelled=True)
    labels = filled_between_slices(labels.astype(np.uint8))
    labels[labels == UNLABELLED] = 0
    return _facts(header, _intensities(values, header)), _label_facts(labels, values)


def _one_layer(opened: OpenVolume, expected: str) -> VolumeHeader:
    if opened.header.layers > 1:
        raise InvalidVolume(f"{opened.name} is a segmentation of several layers; expected {expected}")
    return opened.header


def _facts(header: VolumeHeader, intensities: Intensities | None) -> ScanFacts:
    fields = {key.lower(): value for key, value in header.fields.items()}
    modality = next((fields[key] for key in _MODALITY_FIELDS if key in fields), "")
    affine = tuple(tuple(float(v) for v in row) for row in header.affine)
    return ScanFacts(_index(header.shape), affine, modality.strip().upper()[:16], intensities)


def _intensities(values: npt.NDArray, header: VolumeHeader) -> Intensities | None:
    """Return the facts of finite intensities; None if there are none."""
    flat = _finite_sample(values)
    if not flat.size:
        return None
    low, high = np.percentile(flat, (_LOW, _HIGH))
    whole = header.is_whole or bool((flat == np.round(flat)).all())
    return Intensities(float(flat.min()), float(low), float(high), float(flat.max()), whole)


def _label_facts(labels: npt.NDArray[np.uint8], values: npt.NDArray) -> LabelledFacts:
    counts = np.bincount(labels.ravel(order="K"), minlength=UNLABELLED)
    found = [int(label) for label in np.flatnonzero(counts) if label]
    places = ndimage.find_objects(labels)
    boxes = {
        label: (_index(s.start for s in places[label - 1]), _index(s.stop for s in places[label - 1]))
        for label in found
    }
    runs = [_runs(labels, axis) for axis in range(3)]
    chords = {label: tuple(float(counts[label] / along[label]) for along in runs) for label in found}
    inside = _finite_sample(values[labels > 0])
    return LabelledFacts(
        voxels={label: int(counts[label]) for label in found},
        boxes=boxes,
        chords_vox={label: (x, y, z) for label, (x, y, z) in chords.items()},
        percentiles=tuple(float(f"{v:.6g}") for v in np.percentile(inside, LEVELS)) if inside.size else (),
        largest_share=_largest_share(labels),
    )


def _largest_share(labels: npt.NDArray[np.uint8]) -> float:
    """Return the share of labelled voxels in the largest piece, with and without thin bridges, whichever is less."""
    boxes = ndimage.find_objects((labels > 0).view(np.uint8))
    if not boxes:
        return 1.0
    # With a margin of background, except at the scan's border, which cuts through what goes on beyond it.
    margined = tuple(slice(max(0, side.start - 1), side.stop + 1) for side in boxes[0])
    mask = labels[margined] > 0
    inside = ndimage.binary_erosion(mask, border_value=1)
    return min(Components(part).largest_share for part in (mask, inside))


def _runs(labels: npt.NDArray[np.uint8], axis: int) -> npt.NDArray[np.int64]:
    """Return the number of runs of equal values along an axis, by value."""
    lines = np.moveaxis(labels, axis, 0)
    starts = lines[1:][lines[1:] != lines[:-1]]
    return np.bincount(lines[0].ravel(), minlength=UNLABELLED) + np.bincount(starts, minlength=UNLABELLED)


def _finite_sample(values: npt.NDArray) -> npt.NDArray:
    """Return finite values, evenly thinned if there are very many."""
    flat = values.ravel(order="K")
    # An odd step does not fall into step with the rows.
    step = max(1, flat.size // _MAX_SAMPLES) | 1 if flat.size > _MAX_SAMPLES else 1
    flat = flat[::step]
    return flat[np.isfinite(flat)]


def _index(values: Any) -> _Index:
    x, y, z = (int(value) for value in values)
    return x, y, z
