"""Spacing, patch and strides of a plan: arithmetic on sizes, along the axes of the project's frame.

Spacing and strides follow nnU-Net (Isensee et al., Nature Methods 2021, supplementary note 2; its version 2). A network
that trains for minutes sees fewer voxels than nnU-Net's, so spacing may then be coarsened until a patch sees what is
labelled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["PlannedStrides", "Voxels3", "coarsened_spacing", "nnunet_spacing", "planned_patch", "planned_strides"]

_Triple: TypeAlias = tuple[float, float, float]
Voxels3: TypeAlias = tuple[int, int, int]
PlannedStrides: TypeAlias = tuple[Voxels3, Voxels3, Voxels3, Voxels3]

# nnU-Net's threshold: slices are thick if more than this times as far apart as pixels, and fewer by the same factor.
_ANISOTROPIC = 3.0
_THIN_PERCENTILE = 10.0
# An axis is halved while it is less than this times as coarse as the finest one.
_SAME_RESOLUTION = 2.0
# Voxels that a halved axis keeps at least: nnU-Net's 4 along thick slices. Elsewhere the published network's 2 in a
# patch of 32, so that an isotropic set keeps the published strides, and weights of a pretrained model fit.
_LEAST_THICK_VOX, _LEAST_VOX = 4, 2
_STAGES = 4
# A patch is not cut below this many voxels along an axis, except by the scans' own size.
_LEAST_PATCH_VOX = 32
_MAX_PATCH_VOX = 512
# Spacing is raised by this factor until what is labelled fits.
_STEP = 1.02


def nnunet_spacing(spacings_mm: npt.ArrayLike, shapes: npt.ArrayLike) -> tuple[_Triple, int | None]:
    """Return nnU-Net's spacing of a set, and its axis of thick slices, or None.

    It is the median along each axis. Where one axis is more than three times as coarse as the others, and has less than
    a third of their voxels, it is the 10th percentile along that axis, since a median would drop slices of the better
    scans.

    Args:
        spacings_mm: of each scan, ``(n, 3)``.
        shapes: their voxels, ``(n, 3)``.
    """
    spacings, sizes = np.asarray(spacings_mm, dtype=float), np.asarray(shapes, dtype=float)
    target, size = np.median(spacings, axis=0), np.median(sizes, axis=0)
    thick = int(np.argmax(target))
    others = [axis for axis in range(3) if axis != thick]
    anisotropic = target[thick] > _ANISOTROPIC * target[others].max()
    if not (anisotropic and size[thick] * _ANISOTROPIC < size[others].min()):
        return _triple(target), None
    target[thick] = max(np.percentile(spacings[:, thick], _THIN_PERCENTILE), target[others].max())
    return _triple(target), thick


def coarsened_spacing(
    spacing_mm: Sequence[float],
    need_mm: Sequence[float],
    *,
    most_voxels: float,
    coarsest_mm: Sequence[float],
    seen: Callable[[_Triple], bool] = lambda _: True,
) -> _Triple:
    """Return the spacing at which a field of view has at most a number of voxels, finest axes coarsened first.

    Args:
        spacing_mm: to start from; no axis gets finer.
        need_mm: the field of view.
        most_voxels: that it may have.
        coarsest_mm: limit along each axis; where all are reached the field of view has more voxels.
        seen: whether a patch sees enough of it at a spacing. If it has so few voxels and a patch still does not,
            because its sides are multiples of the strides, spacing is coarsened on, unless that never helps.
    """
    start, need = np.asarray(spacing_mm, dtype=float), np.asarray(need_mm, dtype=float)
    limit = np.maximum(start, np.asarray(coarsest_mm, dtype=float))
    spacing, level = start, float(start.min())
    small: _Triple | None = None
    while True:
        here = _triple(spacing)
        if np.prod(np.maximum(need / spacing, 1.0)) <= most_voxels:
            small = small or here
            if seen(here):
                return here
        if not (spacing < limit).any():
            return small or here
        level *= _STEP
        spacing = np.minimum(np.maximum(start, level), limit)


def planned_strides(spacing_mm: Sequence[float], size: Sequence[float]) -> PlannedStrides:
    """Return the strides of the four stages for a patch.

    An axis is not halved while it is at least twice as coarse as the finest one that can be, nor if too few voxels
    would remain: 4 along an axis that starts that coarse, else 2.
    """
    spacing, left = [float(s) for s in spacing_mm], [float(n) for n in size]
    finest = min(spacing)
    least = [_LEAST_THICK_VOX if s >= _SAME_RESOLUTION * finest else _LEAST_VOX for s in spacing]
    stages: list[Voxels3] = []
    for _ in range(_STAGES):
        room = [n >= 2 * few for n, few in zip(left, least, strict=True)]
        reference = min((s for s, has in zip(spacing, room, strict=True) if has), default=math.inf)
        stride = [2 if has and s < _SAME_RESOLUTION * reference else 1 for s, has in zip(spacing, room, strict=True)]
        spacing = [s * step for s, step in zip(spacing, stride, strict=True)]
        left = [math.ceil(n / step) for n, step in zip(left, stride, strict=True)]
        stages.append(_whole(stride))
    return stages[0], stages[1], stages[2], stages[3]


def planned_patch(
    spacing_mm: Sequence[float], need_vox: Sequence[float], image_vox: Sequence[float], *, most_voxels: float
) -> tuple[Voxels3, PlannedStrides]:
    """Return the patch that sees most of what is needed with at most a number of voxels, and its strides.

    It starts from what is needed and is cut along the axis that has most of it, as nnU-Net cuts from the median shape.

    Args:
        spacing_mm: of the patch.
        need_vox: voxels of the field of view.
        image_vox: voxels of the scans; no axis of the patch is longer, but for the strides.
        most_voxels: of the patch.
    """
    need = [min(float(n), float(most), _MAX_PATCH_VOX) for n, most in zip(need_vox, image_vox, strict=True)]
    patch, strides = _fitted(spacing_mm, [max(1, math.ceil(n - 1e-6)) for n in need])
    while math.prod(patch) > most_voxels:
        floor = [min(_LEAST_PATCH_VOX, n) for n in need]
        multiple = _multiple(strides)
        able = [axis for axis in range(3) if patch[axis] - multiple[axis] >= min(floor[axis], patch[axis])]
        able = [axis for axis in able if patch[axis] > multiple[axis]]
        if not able:
            break
        longest = max(able, key=lambda axis: patch[axis] / need[axis])
        cut = list(patch)
        cut[longest] -= multiple[longest]
        patch, strides = _fitted(spacing_mm, cut)
    return patch, strides


def _fitted(spacing_mm: Sequence[float], size: Sequence[int]) -> tuple[Voxels3, PlannedStrides]:
    """Return a size rounded up to what the strides divide, and the strides."""
    strides = planned_strides(spacing_mm, size)
    rounded = [-(-n // step) * step for n, step in zip(size, _multiple(strides), strict=True)]
    return _whole(rounded), strides


def _multiple(strides: PlannedStrides) -> Voxels3:
    return _whole([math.prod(along) for along in zip(*strides, strict=True)])


def _whole(values: Sequence[int]) -> Voxels3:
    x, y, z = (int(value) for value in values)
    return x, y, z


def _triple(values: npt.ArrayLike) -> _Triple:
    # Headers hold 32-bit numbers: 0.15 comes as 0.149999991.
    x, y, z = (float(f"{value:.5g}") for value in np.asarray(values))
    return x, y, z
