"""The clicks of an editing request, as Slicer's SmartEdit and other clients send them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import HTTPException
from pydantic import SkipValidation

from deformux_label.lib.requests.inference import InferenceRequest
from deformux_label.lib.requests.options import chosen, one_of
from deformux_label.lib.requests.uploaded_label import label_file_of

__all__ = ["BACKGROUND_LABEL", "MAX_POINTS", "VOXEL_ORDERS", "ClickedVoxels", "EditRequest", "to_file_order"]

BACKGROUND_LABEL = "background"
MAX_POINTS = 1_000
# Slicer mirrors the third axis of every left-handed scan that it loads, and counts voxels in that order. Its extension
# sends the first value of an option; without the option, voxels are those of the file.
VOXEL_ORDERS = ("slicer", "file")

_Voxel = tuple[int, int, int]
# Label value (0 is background) to voxels; a voxel belongs to one label.
ClickedVoxels = dict[int, list[_Voxel]]


class EditRequest(InferenceRequest):
    """A request to correct a segmentation by clicks.

    Args:
        points: the clicks of each label, in the order of voxels that ``voxel_order`` names.
        voxel_order: one of ``VOXEL_ORDERS``.
        mask: the client's own segmentation to start from, or None for the automatic one.
        label_info: the segments of ``mask``, as in a submitted label.
        client: name of the client; each client has its own editor.
    """

    points: Annotated[ClickedVoxels, SkipValidation]
    voxel_order: str
    mask: Path | None
    label_info: Any
    client: str

    @classmethod
    def of(
        cls,
        sent: Mapping[str, Any],
        asked: InferenceRequest,
        *,
        labels: Sequence[str],
        uploads: Path | None,
        client: str,
    ) -> EditRequest:
        """Parse the clicks of a request; checks that need the image come later.

        Args:
            sent: the request.
            asked: the common part of inference requests.
            labels: the project's labels.
            uploads: the folder in which a label file must lie.
            client: name of the client.

        Raises:
            HTTPException: 400 or 403.
        """
        file, active = label_file_of(sent, (*labels, BACKGROUND_LABEL), uploads)
        return cls(
            scan=asked.scan,
            options=asked.options,
            points=_points(sent, labels, active),
            voxel_order=one_of("voxel_order", chosen(sent.get("voxel_order", "file")), VOXEL_ORDERS),
            mask=file,
            label_info=sent.get("label_info"),
            client=client,
        )


def to_file_order(points: ClickedVoxels, size: Sequence[int], affine: np.ndarray, order: str) -> ClickedVoxels:
    """Return clicks as voxels of the file, which has this ``size`` and ``affine`` to RAS millimetres.

    Raises:
        HTTPException: 422 for a point outside the image.
    """
    for voxels in points.values():
        for voxel in voxels:
            if not all(0 <= index < n for index, n in zip(voxel, size, strict=True)):
                shown = " x ".join(map(str, size))
                raise HTTPException(422, f"point {list(voxel)} lies outside the image, which has {shown} voxels")
    if order != "slicer" or np.linalg.det(np.asarray(affine)[:3, :3]) > 0:
        return points
    last = size[2] - 1
    return {value: [(i, j, last - k) for i, j, k in voxels] for value, voxels in points.items()}


def _points(request: Mapping[str, Any], labels: Sequence[str], active: str | None) -> ClickedVoxels:
    """Return the clicked voxels of each label, without duplicates.

    Accepts both forms: a list of ``[i, j, k]`` under each label's name and ``background`` (SmartEdit of several
    labels), and ``foreground`` and ``background`` for the ``active`` label. If two labels have the same voxel, the
    active label wins, else the one with the lower value.

    Raises:
        HTTPException: 400 for a malformed point, an unknown label, or too many points.
    """
    values = {name: value for value, name in enumerate(labels, start=1)} | {BACKGROUND_LABEL: 0}
    if active is not None and active not in values:
        raise HTTPException(400, f"label must be one of {', '.join(values)}; got {active!r}")
    lists = {name: _voxels(name, request[name]) for name in values if request.get(name)}
    if request.get("foreground"):
        if active is None or active == BACKGROUND_LABEL:
            raise HTTPException(400, f"foreground points need a label, one of {', '.join(labels)}; got {active!r}")
        lists[active] = lists.get(active, []) + _voxels("foreground", request["foreground"])
    for name, value in request.items():
        if name not in values and name != "foreground" and _is_points(value):
            raise HTTPException(400, f"there are points for {name!r}, which is not one of {', '.join(values)}")
    if (number := sum(map(len, lists.values()))) > MAX_POINTS:
        raise HTTPException(400, f"at most {MAX_POINTS} points are allowed; got {number}")
    order = sorted(lists, key=lambda name: (name != active, values[name] == 0, values[name]))
    owner: dict[_Voxel, int] = {}
    for name in order:
        for voxel in lists[name]:
            owner.setdefault(voxel, values[name])
    points: ClickedVoxels = {}
    for voxel, value in owner.items():
        points.setdefault(value, []).append(voxel)
    return points


def _voxels(name: str, value: Any) -> list[_Voxel]:
    if not isinstance(value, list):
        raise HTTPException(400, f"the points of {name!r} must be a list of [i, j, k]; got {_short(value)}")
    if len(value) > MAX_POINTS:
        raise HTTPException(400, f"at most {MAX_POINTS} points are allowed; got {len(value)} for {name!r}")
    return [_voxel(name, point) for point in value]


def _voxel(name: str, point: Any) -> _Voxel:
    if not isinstance(point, list) or len(point) != 3 or not all(_is_whole(index) for index in point):
        raise HTTPException(400, f"a point of {name!r} must be three whole numbers [i, j, k]; got {_short(point)}")
    i, j, k = (int(index) for index in point)
    return i, j, k


def _is_whole(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, int) or value.is_integer()


def _is_points(value: Any) -> bool:
    return isinstance(value, Collection) and not isinstance(value, str | Mapping) and _starts_with_a_list(value)


def _starts_with_a_list(values: Collection[Any]) -> bool:
    return isinstance(next(iter(values), None), list)


def _short(value: Any, most: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}…"
