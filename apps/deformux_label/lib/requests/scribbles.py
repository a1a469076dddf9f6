"""The scribbles of an inference request, in the format of Slicer's scribble tool."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastapi import HTTPException

from deformux_label.lib.requests.inference import InferenceRequest
from deformux_label.lib.requests.options import checked_number, one_of
from deformux_label.lib.requests.uploaded_label import label_file_of

__all__ = ["SCRIBBLED_BACKGROUND", "SCRIBBLED_FOREGROUND", "SCRIBBLE_SEGMENTS", "ScribblesRequest"]

# Values of scribbled voxels; 0 is not scribbled.
SCRIBBLED_BACKGROUND, SCRIBBLED_FOREGROUND = 1, 2
SCRIBBLE_SEGMENTS = {"background_scribbles": SCRIBBLED_BACKGROUND, "foreground_scribbles": SCRIBBLED_FOREGROUND}
# Smallest and largest value of each number in a task's config.
_RANGES = {"lamda": (0.0, 1_000.0), "sigma": (1e-4, 1_000.0), "num_bins": (2, 1_024), "num_mixtures": (1, 64)}


class ScribblesRequest(InferenceRequest):
    """A request to segment one label from scribbles.

    Args:
        scribbles: the label file with the scribbles.
        segment_ids: their values in the file, by the names of ``SCRIBBLE_SEGMENTS``.
        roi: bounds along each axis, in voxels of the file; None for the whole image.
        selected: the label to segment, or None if the request names none.
        numbers: the task's numbers by name.
    """

    scribbles: Path
    segment_ids: dict[str, int]
    roi: tuple[int, ...] | None
    selected: str | None
    numbers: dict[str, float]

    @classmethod
    def of(
        cls,
        sent: Mapping[str, Any],
        asked: InferenceRequest,
        *,
        labels: Sequence[str],
        uploads: Path | None,
        defaults: Mapping[str, Any],
        needs_label: bool,
    ) -> ScribblesRequest:
        """Parse the scribbles of a request; checks that need the image come later.

        Args:
            sent: the request.
            asked: the common part of inference requests.
            labels: the project's labels.
            uploads: the folder in which a label file must lie.
            defaults: the task's options.
            needs_label: refuse a request that names no label.

        Raises:
            HTTPException: 400 or 403.
        """
        if asked.options.save_label:
            raise HTTPException(
                400, "a segment from scribbles is not a complete label; submit it with the other segments"
            )
        file, _ = label_file_of(sent, labels, uploads)
        if file is None:
            raise HTTPException(400, "the request has no scribbles; send them as its label file")
        return cls(
            scan=asked.scan,
            options=asked.options,
            scribbles=file,
            segment_ids=_segment_ids(sent.get("label_info")),
            roi=_roi(sent.get("roi")),
            selected=_selected(sent.get("selected_label_name"), labels, needs_label=needs_label),
            numbers={name: _number(name, sent.get(name), defaults[name]) for name in _RANGES if name in defaults},
        )


def _segment_ids(listed: Any) -> dict[str, int]:
    """Return the values of the scribbles' segments in the label file."""
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


def _roi(value: Any) -> tuple[int, ...] | None:
    """Return six voxel bounds, a pair for each axis, or None for the whole image."""
    if value is None or value == []:
        return None
    numbers = isinstance(value, list) and len(value) == 6 and all(_is_number(bound) for bound in value)
    if not numbers:
        raise HTTPException(400, f"roi must be empty or six voxel bounds [i, i, j, j, k, k]; got {str(value)[:60]}")
    return tuple(round(bound) for bound in value)


def _selected(name: Any, labels: Sequence[str], *, needs_label: bool) -> str | None:
    """Return the label that a request names; a project's only label needs no name."""
    if name in (None, ""):
        if len(labels) == 1:
            return labels[0]
        if needs_label:
            raise HTTPException(400, f"selected_label_name must be one of {', '.join(labels)}; got none")
        return None
    return one_of("selected_label_name", name, labels)


def _number(name: str, value: Any, default: float) -> float:
    low, high = _RANGES[name]
    whole = isinstance(default, int)
    return float(default) if value is None else checked_number(name, value, low=low, high=high, whole=whole)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9
