"""Segments of ``.seg.nrrd`` files: the value, layer and name that the header gives each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from deformux.data.header import InvalidVolume, VolumeHeader
from deformux.data.label_values import UNLABELLED

__all__ = ["Segment", "labels_of_segments", "segments_of"]

# Names of segments that are not labels.
_BACKGROUND = ("background",)


@dataclass(frozen=True)
class Segment:
    """A segment: the voxels of ``value`` in a layer of its file."""

    name: str
    value: int
    layer: int


def segments_of(name: str, header: VolumeHeader) -> tuple[Segment, ...]:
    """Return the segments that a header names, in its order.

    Files from before Slicer 4.11 give no values and layers: each segment has its own layer, filled with ones.

    Raises:
        InvalidVolume: a value or a layer is not a number, or there is no such layer.
    """
    numbers = sorted({int(m[1]) for key in header.fields if (m := re.fullmatch(r"Segment([0-9]{1,6})_\w+", key))})
    found = []
    for number in numbers:
        title, identity = (header.fields.get(f"Segment{number}_{key}", "").strip() for key in ("Name", "ID"))
        value = header.fields.get(f"Segment{number}_LabelValue", "1")
        layer = header.fields.get(f"Segment{number}_Layer", str(number if header.layers > 1 else 0))
        if not re.fullmatch(r"[0-9]{1,9}", value.strip()) or not re.fullmatch(r"[0-9]{1,9}", layer.strip()):
            raise InvalidVolume(f"{name} cannot be read: a segment has no number for its value or its layer")
        if int(layer) >= header.layers:
            raise InvalidVolume(f"{name} cannot be read: a segment lies in layer {int(layer)} of {header.layers}")
        found.append(Segment(title or identity, int(value), int(layer)))
    return tuple(found)


def labels_of_segments(
    name: str, layers: npt.NDArray, segments: tuple[Segment, ...], labels: Mapping[str, int]
) -> npt.NDArray[np.uint8]:
    """Return labels ``(X, Y, Z)`` of the segments in layers ``(L, X, Y, Z)``, found by name.

    Voxels of 255 outside all segments are unlabelled. Labels exclude each other; segments need not.

    Raises:
        InvalidVolume: a segment with voxels is not a label, segments of different labels overlap, or voxels lie
            outside all segments.
    """
    found = np.zeros(layers.shape[1:], dtype=np.uint8)
    owner = np.zeros(layers.shape[1:], dtype=np.uint16)
    claimed: list[set[int]] = [{0, UNLABELLED} for _ in layers]
    for number, segment in enumerate(segments, start=1):
        claimed[segment.layer].add(segment.value)
        if segment.value == 0 or segment.name in _BACKGROUND:
            continue
        inside = layers[segment.layer] == segment.value
        if segment.name not in labels:
            if inside.any():
                raise InvalidVolume(
                    f"segment {segment.name[:60]!r} is not a label of this project, which has {', '.join(labels)}"
                )
            continue
        others = found[inside]
        overlap = (others != 0) & (others != labels[segment.name])
        if overlap.any():
            other = segments[int(owner[inside][overlap][0]) - 1]
            raise InvalidVolume(
                f"segments {other.name!r} and {segment.name!r} of {name} overlap in {int(overlap.sum())} voxels; "
                "expected each voxel in at most one of them"
            )
        found[inside], owner[inside] = labels[segment.name], number
    for layer, values in zip(layers, claimed, strict=True):
        if not set(np.unique(layer).tolist()) <= values:
            raise InvalidVolume(f"{name} holds voxels that belong to none of its segments; expected named segments")
        unlabelled = (layer == UNLABELLED) & (found == 0)
        if not any(s.value == UNLABELLED for s in segments):
            found[unlabelled] = UNLABELLED
    return found
