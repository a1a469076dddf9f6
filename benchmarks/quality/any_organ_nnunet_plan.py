"""nnU-Net's plan of a 3D U-Net by its published rules (Isensee et al., Nature Methods 2021, supplement; v2's planner).

Its estimate of GPU memory, by which it shrinks patches, says nothing about a CPU: here a number of voxels per step
decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["UNetPlan", "unet_plan"]

_SMALLEST_MAP = 4
_COARSE = 3.0  # axes beyond this factor of the others count as anisotropic
_ISOTROPIC_PATCH = 256
_LEAST_BATCH = 2
_MAX_PART_OF_DATA = 0.05

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class UNetPlan:
    """Plan of a U-Net; axes are those of the scans' files.

    Args:
        spacing_mm: to which scans are resampled.
        patch_size: voxels.
        batch_size: patches per step.
        kernels, strides: of each stage, the first with stride 1.
        flat: rotate and scale in the plane of highest resolution only.
        coarse_axis: the axis with the largest spacing.
    """

    spacing_mm: tuple[float, float, float]
    patch_size: Triple
    batch_size: int
    kernels: tuple[Triple, ...]
    strides: tuple[Triple, ...]
    flat: bool
    coarse_axis: int


def unet_plan(shapes: Sequence[Sequence[int]], spacings: Sequence[Sequence[float]], *, voxels: int) -> UNetPlan:
    """Plan a U-Net for scans of these sizes and spacings in mm, with at most ``voxels`` in the patches of a step."""
    spacing = _target_spacing(np.array(shapes, dtype=float), np.array(spacings, dtype=float))
    resampled = np.rint(np.array(shapes) * np.array(spacings) / spacing)
    median = np.median(resampled, axis=0)
    patch = _patch_size(spacing, median, voxels // _LEAST_BATCH)
    strides, kernels = _stages(spacing, patch)
    of_data = int(_MAX_PART_OF_DATA * np.prod(median) * len(shapes) / np.prod(patch))
    batch = max(_LEAST_BATCH, min(voxels // int(np.prod(patch)), of_data))
    coarse = int(np.argmax(spacing))
    return UNetPlan(
        spacing_mm=(float(spacing[0]), float(spacing[1]), float(spacing[2])),
        patch_size=_triple(patch),
        batch_size=batch,
        kernels=kernels,
        strides=strides,
        flat=bool(patch.max() / patch[coarse] > _COARSE),
        coarse_axis=coarse,
    )


def _target_spacing(shapes: np.ndarray, spacings: np.ndarray) -> np.ndarray:
    """Return the median, but the finest tenth along an axis that is coarse in millimetres and short in voxels."""
    target, size = np.median(spacings, axis=0), np.median(shapes, axis=0)
    worst = int(np.argmax(target))
    others = [axis for axis in range(3) if axis != worst]
    if target[worst] > _COARSE * target[others].max() and size[worst] * _COARSE < size[others].min():
        target[worst] = max(np.percentile(spacings[:, worst], 10), target[others].max() + 1e-5)
    return target


def _patch_size(spacing: np.ndarray, median: np.ndarray, voxels: int) -> np.ndarray:
    """Return a patch, isotropic in mm where scans allow it, cut where it holds most of a scan until it is small."""
    isotropic = np.rint(_ISOTROPIC_PATCH / spacing * np.prod(spacing) ** (1 / 3))
    patch = _padded(np.minimum(isotropic, median), spacing)
    while np.prod(patch) > voxels:
        axis = int(np.argmax(patch / median))
        smaller = patch.copy()
        smaller[axis] -= _multiple(spacing, patch)[axis]
        # The multiple of the smaller patch, which may have fewer stages.
        patch[axis] -= _multiple(spacing, smaller)[axis]
        patch = _padded(patch, spacing)
    return patch


def _padded(patch: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    multiple = _multiple(spacing, patch)
    return (np.ceil(patch / multiple) * multiple).astype(int)


def _multiple(spacing: np.ndarray, patch: np.ndarray) -> np.ndarray:
    return np.prod(_stages(spacing, patch)[0], axis=0)


def _stages(spacing: np.ndarray, patch: np.ndarray) -> tuple[tuple[Triple, ...], tuple[Triple, ...]]:
    """Return strides and kernels of each stage, the bottleneck last.

    An axis is halved while it has twice the smallest map and its voxels are less than twice as long as the shortest
    that can be halved. Its kernels are 1 until its voxels are less than twice as long as the shortest, then 3.
    """
    sizes, lengths = np.array(patch, dtype=float), np.array(spacing, dtype=float)
    kernel = np.ones(3, dtype=int)
    strides, kernels = [np.ones(3, dtype=int)], []
    while True:
        large = sizes >= 2 * _SMALLEST_MAP
        if not large.any():
            break
        halved = large & (lengths < 2 * lengths[large].min())
        if halved.sum() == 1 and sizes[halved][0] < 3 * _SMALLEST_MAP:
            break
        kernel = np.where(lengths < 2 * lengths.min(), 3, kernel)
        kernels.append(kernel)
        strides.append(np.where(halved, 2, 1))
        sizes, lengths = np.where(halved, np.ceil(sizes / 2), sizes), np.where(halved, 2 * lengths, lengths)
    kernels.append(np.full(3, 3))
    return tuple(map(_triple, strides)), tuple(map(_triple, kernels))


def _triple(values: np.ndarray) -> Triple:
    x, y, z = (int(value) for value in values)
    return x, y, z
