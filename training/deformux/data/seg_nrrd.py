"""The segments of a ``.seg.nrrd`` file: by the value, the layer and the name that its header gives each of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from deformux.data.header import InvalidVolume, VolumeHeader
from deformux.data.label_values import UNLABELLED

__all__ = ["Segment", "labels_of_segments", "segments_of"]

# Segments of clients that stand for no label.
_BACKGROUND = ("background",)


@dataclass(frozen=True)
class Segment:
    """A segment: the voxels of ``value`` in a layer of its file."""

    name: str
    value: int
    layer: int


def segments_of(name: str, header: VolumeHeader) -> tuple[Segment, ...]:
    """The segments that a header names, in its order.

    Files of before Slicer 4.11 give no values and layers: each segment has a layer of its own, with ones in it.

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
    """Labels ``(X, Y, Z)`` of the segments in layers ``(L, X, Y, Z)``, found by their names.

    Voxels of 255 that no segment claims are unlabelled. Labels exclude each other, segments need not.

    Raises:
        InvalidVolume: a segment that is not empty is no label, two of different labels overlap, or there are voxels of
            no segment.
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
            raise InvalidVolume(f"{name} holds voxels of values that none of its segments has; expected named segments")
        unlabelled = (layer == UNLABELLED) & (found == 0)
        if not any(s.value == UNLABELLED for s in segments):
            found[unlabelled] = UNLABELLED
    return found
