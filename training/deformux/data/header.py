"""Headers of volumes, and the checks they must pass before a voxel is read."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "GEOMETRY_TOLERANCE_MM",
    "LPS_TO_RAS",
    "MAX_VOXELS_VARIABLE",
    "InvalidVolume",
    "VolumeHeader",
    "affine_of",
    "check_affine",
    "check_shape",
    "geometry_difference",
    "max_voxels",
    "one_volume",
    "shown_shape",
]

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
# Positions that differ by less than this are the same position.
GEOMETRY_TOLERANCE_MM = 1e-3
# Carries the server's --max-voxels to the processes that train and score.
MAX_VOXELS_VARIABLE = "DEFORMUX_MAX_VOXELS"
_DEFAULT_MAX_VOXELS = 1_500_000_000
# A whole-body scan at 0.25 mm has 8,000 slices; no detector row and no radiograph is longer.
_MAX_AXIS_LENGTH = 10_000
# The longest axis against the second longest: about 4 in a scout view. Beyond this the volume is a line.
_MAX_ELONGATED = 64
# An affine's columns lie in a plane if their determinant is a smaller part of the product of their lengths.
_SINGULAR = 1e-6


class InvalidVolume(ValueError):
    """A volume cannot be used; the message is one sentence that names the file, what is wrong and what is expected."""


@dataclass(frozen=True)
class VolumeHeader:
    """The place of a file's voxels, in the file and in the patient.

    Args:
        shape: voxels along the three spatial axes, in the file's order; 1 along the third of a 2D image.
        affine: from voxel indices to RAS millimetres, ``(4, 4)``.
        file_shape: all axes of the file, the fastest one first.
        dtype: of the stored numbers, with their byte order.
        encoding: ``raw``, ``gzip``, ``zlib``, ``bzip2``, ``text`` or ``hex``.
        start: byte of the file at which the encoded voxels begin.
        skip: decoded bytes before the first voxel.
        slope: factor of the stored numbers.
        intercept: added after it.
        layers: number of volumes of a segmentation in one file.
        layer_axis: the axis of ``file_shape`` along which the layers lie.
        fields: key/value pairs of a NRRD file.
    """

    shape: tuple[int, int, int]
    affine: npt.NDArray[np.float64]
    file_shape: tuple[int, ...]
    dtype: np.dtype
    encoding: str
    start: int
    skip: int = 0
    slope: float = 1.0
    intercept: float = 0.0
    layers: int = 1
    layer_axis: int = 0
    fields: Mapping[str, str] = field(default_factory=dict)

    @property
    def n_values(self) -> int:
        """Return the number of stored numbers."""
        return math.prod(self.file_shape)

    @property
    def n_bytes(self) -> int:
        """Return their number of bytes when decoded."""
        return self.n_values * self.dtype.itemsize

    @property
    def is_whole(self) -> bool:
        """Return whether every voxel is a whole number by its type."""
        return self.dtype.kind in "iu" and self.slope == 1 and self.intercept == 0


def max_voxels() -> int:
    """Return the largest number of voxels that is read: the server's bound in the environment, or the default."""
    return int(os.environ.get(MAX_VOXELS_VARIABLE, _DEFAULT_MAX_VOXELS))


def shown_shape(shape: Sequence[object]) -> str:
    """Format a shape, such as ``96 x 96 x 48``."""
    return " x ".join(str(n) for n in shape)


def check_shape(name: str, shape: Sequence[int]) -> None:
    """Refuse a file whose axes have sizes that no scan has.

    A 2D image and a single slice are thin along one axis. A volume thin along two is a line, and each of its voxels
    would cost as much as a patch.

    Raises:
        InvalidVolume: an axis without voxels, too many voxels, or a shape that no scan has.
    """
    if not shape or min(shape) < 1:
        raise InvalidVolume(
            f"{name} has no voxels: its size is {shown_shape(shape)}; expected at least one along each axis"
        )
    if math.prod(shape) > max_voxels():
        raise InvalidVolume(
            f"{name} has {shown_shape(shape)} voxels, {math.prod(shape):,} in total; "
            f"at most {max_voxels():,} are read (option max-voxels)"
        )
    second, longest = sorted((1, *shape))[-2:]
    if longest > _MAX_AXIS_LENGTH or longest > _MAX_ELONGATED * second:
        raise InvalidVolume(
            f"{name} has {shown_shape(shape)} voxels, a shape that no scan has; expected at most {_MAX_AXIS_LENGTH:,} "
            f"along an axis, and at most {_MAX_ELONGATED} times as many as along the second longest"
        )


def check_affine(name: str, affine: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the affine if it gives each voxel its own position.

    Raises:
        InvalidVolume: it is not finite, or singular.
    """
    if not np.isfinite(affine).all():
        raise InvalidVolume(f"{name} has a position or direction that is not finite; expected an affine of numbers")
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if lengths.min() <= 0 or abs(np.linalg.det(affine[:3, :3] / np.maximum(lengths, 1e-300))) < _SINGULAR:
        raise InvalidVolume(
            f"{name} has a singular affine: its axes do not span three dimensions; expected three independent "
            "directions and voxel sizes above 0"
        )
    return affine


def affine_of(directions: npt.ArrayLike, origin: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return the affine ``(4, 4)`` whose columns are steps from voxel to voxel, for one to three axes.

    A missing axis gets 1 mm along its own direction, as ITK and Slicer treat a 2D image.
    """
    steps, start = np.asarray(directions, dtype=float), np.asarray(origin, dtype=float)
    affine = np.eye(4)
    n = len(steps)
    affine[:n, :n], affine[: len(start), 3] = steps, start
    return affine


def one_volume(
    name: str, file_shape: Sequence[int], spatial: Sequence[int], others: str = "time points"
) -> tuple[int, int, int]:
    """Return three sizes of the spatial axes if no other axis is longer than 1; ``others`` says what these hold.

    Raises:
        InvalidVolume: there is more than one volume, or less than an image.
    """
    sizes = [file_shape[axis] for axis in spatial]
    rest = math.prod(n for axis, n in enumerate(file_shape) if axis not in spatial)
    if rest != 1:
        raise InvalidVolume(
            f"{name} holds {rest} {others} ({shown_shape(file_shape)}); expected one 3D volume or one 2D image"
        )
    if not 2 <= len(sizes) <= 3:
        raise InvalidVolume(
            f"{name} has {len(sizes)} dimensions ({shown_shape(file_shape)}); expected one 3D volume or one 2D image"
        )
    x, y, z = (*sizes, 1)[:3]
    return x, y, z


def geometry_difference(
    image_shape: Any,
    image_affine: Any,
    label_shape: Any,
    label_affine: Any,
    tolerance_mm: float = GEOMETRY_TOLERANCE_MM,
) -> str | None:
    """Describe how two grids differ, or return None: by shape in voxels, else by largest corner distance in mm."""
    if tuple(image_shape) != tuple(label_shape):
        return f"the image has {tuple(image_shape)} voxels, the label {tuple(label_shape)}"
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in image_shape], indexing="ij")).reshape(3, -1)
    homogeneous = np.vstack([corners, np.ones(8)])
    offset = (np.asarray(image_affine, dtype=float) - np.asarray(label_affine, dtype=float)) @ homogeneous
    distance = float(np.linalg.norm(offset[:3], axis=0).max())
    if distance > tolerance_mm:
        return f"their corners lie up to {distance:.3g} mm apart"
    return None
