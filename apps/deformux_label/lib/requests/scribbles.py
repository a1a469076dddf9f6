"""The scribbles of an inference request, as Slicer's scribble tool sends them."""

from __future__ import annotations

import itertools
import math
from typing import Any

from fastapi import HTTPException

__all__ = ["SCRIBBLED_BACKGROUND", "SCRIBBLED_FOREGROUND", "SCRIBBLE_SEGMENTS", "number_of", "roi_of", "segment_ids_of"]

# Values of scribbled voxels; 0 is not scribbled.
SCRIBBLED_BACKGROUND, SCRIBBLED_FOREGROUND = 1, 2
SCRIBBLE_SEGMENTS = {"background_scribbles": SCRIBBLED_BACKGROUND, "foreground_scribbles": SCRIBBLED_FOREGROUND}


def segment_ids_of(listed: Any) -> dict[str, int]:
    """The values of the scribbles' segments in the label file."""
    if not isinstance(listed, list) or not all(isinstance(item, dict) for item in listed):
        raise HTTPException(400, "label_info must list the segments of the label file, each with its name and id")
    found = {}
    for name, item in itertools.product(SCRIBBLE_SEGMENTS, listed):
        if item.get("name") != name:
            continue
        number = item.get("id")
        if not _is_number(number) or number != int(number) or number < 1:
            raise HTTPException(400, f"the id of {name} must be a whole number from 1 on; got {number!r}")
        found[name] = int(number)
    if not found:
        raise HTTPException(400, f"label_info names no scribbles; expected {' and '.join(SCRIBBLE_SEGMENTS)}")
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
