"""Submitted labels of which only some slices were annotated.

The stored label stays as it was drawn, and says in its metadata which slices these are. Training and Dice read a copy
that is 255, unlabelled, in all others.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import HTTPException
from nibabel.affines import voxel_sizes

from deformux.data.partial_labels import SLICE_RULES, AnnotatedSlices, drawn_slices
from deformux.data.volume_reader import open_volume, read_volume
from deformux_label.lib.store.volume_writer import write_labels

__all__ = ["FIELD", "annotated_slices_of", "with_annotated_slices", "write_annotated_slices"]

FIELD = "annotated_slices"


def with_annotated_slices(info: Mapping[str, Any], label: Path, rule: str) -> dict[str, Any]:
    """Return the metadata of a label with the slices that were annotated; without the field if all were.

    Args:
        info: a client's; its field, if it is there, holds a rule, or an axis and the slices along it.
        label: in the order of its image's voxels.
        rule: of the project, one of ``SLICE_RULES``.

    Raises:
        HTTPException: 422 if the field holds neither, or slices that the label lacks.
    """
    given = info.get(FIELD)
    rest = {key: value for key, value in info.items() if key != FIELD}
    if isinstance(given, str) or given is None:
        found = _by_rule(label, rule if given is None else _checked_rule(given))
    else:
        with open_volume(label) as opened:
            found = _checked_slices(given, opened.header.shape)
    return rest if found is None else {**rest, FIELD: found.to_dict()}


def annotated_slices_of(info: Mapping[str, Any]) -> AnnotatedSlices | None:
    """Return the slices that were annotated in a stored label, or None for all."""
    stored = info.get(FIELD)
    return AnnotatedSlices(int(stored["axis"]), tuple(stored["slices"])) if isinstance(stored, dict) else None


def write_annotated_slices(label: Path, slices: AnnotatedSlices, names: Mapping[str, int], target: Path) -> None:
    """Write a copy of a label that is 255 in the slices that were not annotated; ``names`` are those of its values."""
    volume = read_volume(label, np.uint8)
    write_labels(target, slices.apply(volume.values), volume.header.affine, names)


def _by_rule(label: Path, rule: str) -> AnnotatedSlices | None:
    if rule == "all":
        return None
    volume = read_volume(label, np.uint8)
    return drawn_slices(volume.values, voxel_sizes(volume.header.affine).tolist(), rule)


def _checked_rule(given: str) -> str:
    if given not in SLICE_RULES:
        raise HTTPException(422, f"{FIELD} must be {_expected()}; got {given[:80]!r}")
    return given


def _checked_slices(given: Any, shape: tuple[int, ...]) -> AnnotatedSlices:
    if not isinstance(given, dict) or set(given) != {"axis", "slices"}:
        raise HTTPException(422, f"{FIELD} must be {_expected()}; got {str(given)[:80]}")
    axis, slices = given["axis"], given["slices"]
    if type(axis) is not int or not 0 <= axis <= 2:
        raise HTTPException(422, f"the axis of {FIELD} must be 0, 1 or 2 of the image's file; got {str(axis)[:80]}")
    if not isinstance(slices, list) or not slices:
        raise HTTPException(422, f"the slices of {FIELD} must be a list of numbers; got {str(slices)[:80]}")
    for number in slices:
        if type(number) is not int or not 0 <= number < shape[axis]:
            raise HTTPException(
                422,
                f"the slices of {FIELD} must be whole numbers from 0 to {shape[axis] - 1} along axis {axis}; "
                f"got {str(number)[:80]}",
            )
    return AnnotatedSlices(axis, tuple(sorted(set(slices))))


def _expected() -> str:
    return f'{", ".join(SLICE_RULES)}, or an object such as {{"axis": 2, "slices": [0, 5, 10]}}'
