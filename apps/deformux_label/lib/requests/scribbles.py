"""The scribbles of an inference request, as Slicer's scribble tool sends them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from fastapi import HTTPException
from nibabel.affines import apply_affine, voxel_sizes

from deformux.data.grid import Box, bounding_box, slices, triple
from deformux_label.lib.store.label_check import segment_values

__all__ = ["BACKGROUND", "FOREGROUND", "Drawn", "Scribbles", "drawn_of", "number_of", "roi_of", "segment_ids_of"]

Scribbles = npt.NDArray[np.uint8]
# Values of scribbled voxels; 0 is not scribbled.
BACKGROUND, FOREGROUND = 1, 2
_SEGMENTS = {"background_scribbles": BACKGROUND, "foreground_scribbles": FOREGROUND}

# An object reaches at most as far beyond its scribbles as they are long, but at least so far.
_LEAST_MARGIN_MM = 20.0


@dataclass(frozen=True)
class Drawn:
    """Scribbles ``(X, Y, Z)`` on the scan's grid, and the region (ends exclusive, perhaps beyond it) to segment."""

    scribbles: Scribbles
    region: Box

    @property
    def inside(self) -> Box:
        """The part of the region that is in the scan."""
        start = triple(np.clip(self.region[0], 0, self.scribbles.shape))
        return start, triple(np.clip(self.region[1], 0, self.scribbles.shape))


def drawn_of(request: Mapping[str, Any], *, of_foreground: bool) -> Drawn:
    """The scribbles of a request; their region is around the foreground, or around all of them.

    Raises:
        HTTPException: 422 for a file without scribbles, or a region without any of the foreground.
    """
    image = Path(request["image"])
    values, to_scan, affine = segment_values(request["scribbles"], image, request["image_id"] or image.name)
    scribbles = np.zeros(values.shape, dtype=np.uint8)
    for name, number in request["segment_ids"].items():
        scribbles[values == number] = _SEGMENTS[name]
    if not scribbles.any():
        raise HTTPException(422, "there are no scribbles in the label file; draw on the foreground first")
    if not (scribbles == FOREGROUND).any():
        raise HTTPException(422, "there is no foreground scribble; draw at least one on what is to be segmented")
    if request["roi"] is not None:
        region = _clipped(request["roi"], to_scan, scribbles.shape)
        outside = np.ones(scribbles.shape, dtype=bool)
        outside[slices(region)] = False
        scribbles[outside] = 0
        if not (scribbles == FOREGROUND).any():
            raise HTTPException(422, "no foreground scribble lies inside the region of interest; draw one there")
        return Drawn(scribbles, region)
    around = bounding_box(scribbles == FOREGROUND if of_foreground else scribbles > 0)
    assert around is not None
    sizes = voxel_sizes(affine)
    longest = float(((np.array(around[1]) - around[0]) * sizes).max())
    margin = np.ceil(max(_LEAST_MARGIN_MM, longest) / sizes).astype(int)
    return Drawn(scribbles, (triple(np.array(around[0]) - margin), triple(np.array(around[1]) + margin)))


def _clipped(roi: Sequence[int], to_scan: npt.NDArray[np.float64], size: Sequence[int]) -> Box:
    """The box of the scan between two corners, both included, of the label file's voxels."""
    corners = np.rint(apply_affine(to_scan, np.reshape(roi, (3, 2)).T))
    start, stop = corners.min(0).astype(int), corners.max(0).astype(int) + 1
    if (stop <= 0).any() or (start >= np.array(size)).any():
        shown = " x ".join(map(str, size))
        raise HTTPException(422, f"roi {list(roi)} lies outside the image, which has {shown} voxels")
    return triple(np.maximum(start, 0)), triple(np.minimum(stop, size))


def segment_ids_of(listed: Any) -> dict[str, int]:
    """The values of the scribbles' segments in the label file."""
    if not isinstance(listed, list) or not all(isinstance(item, dict) for item in listed):
        raise HTTPException(400, "label_info must list the segments of the label file, each with its name and id")
    found = {}
    for name, item in itertools.product(_SEGMENTS, listed):
        if item.get("name") != name:
            continue
        number = item.get("id")
        if not _is_number(number) or number != int(number) or number < 1:
            raise HTTPException(400, f"the id of {name} must be a whole number from 1 on; got {number!r}")
        found[name] = int(number)
    if not found:
        raise HTTPException(400, f"label_info names no scribbles; expected {' and '.join(_SEGMENTS)}")
    return found


def roi_of(value: Any) -> list[int] | None:
    """Six voxel bounds, a pair for each axis, or None for the whole image."""
    if value is None or value == []:
        return None
    numbers = isinstance(value, list) and len(value) == 6 and all(_is_number(bound) for bound in value)
    if not numbers:
        raise HTTPException(400, f"roi must be empty or six voxel bounds [i, i, j, j, k, k]; got {str(value)[:60]}")
    return [round(bound) for bound in value]


def number_of(name: str, value: Any, preset: float, low: float, high: float) -> float:
    """An option between two bounds, whole where its preset is, or the preset where it is not given."""
    if value is None:
        return preset
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not low <= number <= high or (isinstance(preset, int) and not number.is_integer()):
        kind = "a whole number" if isinstance(preset, int) else "a number"
        raise HTTPException(400, f"{name} must be {kind} from {low:g} to {high:g}; got {str(value)[:60]!r}")
    return number


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9
