"""Frames: in which order and direction a scan's axes enter the network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from nibabel.affines import voxel_sizes
from nibabel.orientations import io_orientation

__all__ = [
    "AUGMENTATION_REASONS",
    "FRAMES",
    "choose_frame",
    "frame_augmentation",
    "frame_axes",
    "frame_codes",
    "frame_grid",
    "through_plane_axis",
]

FRAMES = ("ras", "acquisition")

_Affine: TypeAlias = npt.NDArray[np.float64]

# Letters of the anatomical axes, for the negative and the positive direction.
_LETTERS = (("L", "R"), ("P", "A"), ("I", "S"))
# Slices are thicker than this times the pixels; pixels are rarely longer than this times their width.
_COARSER = 1.2
# The nearest anatomical axis changes at 45 degrees; scans of one protocol differ by less than the rest.
_MARGIN_DEGREES = 30.0

# Largest rotations, in degrees: of a patient in a scanner, and in the plane of a scan whose rows may point anywhere.
_ROTATION = 15.0
_IN_PLANE_ROTATION = 30.0
# Patches are rotated in voxels: a rotation between axes of unequal spacing shears, and past this ratio it is left out.
_MOST_UNEQUAL = 2.0

# Why ``frame_augmentation`` changes a field of a recipe, by its name.
AUGMENTATION_REASONS: Mapping[str, str] = MappingProxyType(
    {
        "flip_axes": "labels may tell left from right, so nothing is mirrored",
        "rotation_degrees": "small between axes of unequal spacing, none where one is twice the other; larger in the "
        "plane of the acquisition, where no direction of the patient is fixed",
        "voxel_aspect": "deformations are as large in millimetres along every axis, and no coarser scan is simulated "
        "along an axis that is coarse already",
        "unlabelled_border": "anatomy goes on beyond a patch: what a rotation brings in is not background",
    }
)


def through_plane_axis(shape: Sequence[int], affine: npt.ArrayLike) -> int | None:
    """Return the file's axis along which its slices are stacked, or None where none stands out.

    It is the one axis of a single voxel; else the one whose spacing is more than 1.2 times every other's. Numbers of
    voxels do not decide: crops of isotropic scans are shortest along any axis.

    Args:
        shape: voxels ``(X, Y, Z)`` of the file.
        affine: from its voxels to RAS millimetres, ``(4, 4)``.
    """
    single = np.flatnonzero(np.asarray(shape) == 1)
    if len(single) == 1:
        return int(single[0])
    spacing = voxel_sizes(np.asarray(affine, dtype=float))
    second, largest = np.sort(spacing)[1:]
    return int(spacing.argmax()) if largest > _COARSER * second else None


def frame_axes(
    frame: str, shape: Sequence[int], affine: npt.ArrayLike
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Return the file's axis along each axis of a frame, and 1 or -1 for its direction.

    ``ras`` takes the axes nearest to right, anterior and superior. ``acquisition`` takes the through-plane axis last,
    the last stored one where none stands out, and the others as stored. Its axes are right-handed: where the file's are
    not, the second is reversed. Converters of one DICOM series differ there (dcm2niix reverses the rows), and a network
    that never sees a mirror image can tell left from right. No angle decides, so scans that differ little in angle
    never differ in frame.

    Args:
        frame: one of ``FRAMES``.
        shape: voxels ``(X, Y, Z)`` of the file.
        affine: from its voxels to RAS millimetres, ``(4, 4)``.
    """
    matrix = np.asarray(affine, dtype=float)
    if frame == "ras":
        nearest = io_orientation(matrix).astype(int)
        first, second, last = (int(axis) for axis in np.argsort(nearest[:, 0]))
        signs = (int(nearest[first, 1]), int(nearest[second, 1]), int(nearest[last, 1]))
        return (first, second, last), signs
    through = through_plane_axis(shape, matrix)
    last = 2 if through is None else through
    first, second = (axis for axis in range(3) if axis != last)
    right_handed = np.linalg.det(matrix[:3, [first, second, last]]) > 0
    return (first, second, last), (1, 1 if right_handed else -1, 1)


def frame_codes(frame: str, shape: Sequence[int], affine: npt.ArrayLike) -> str:
    """Return the axis codes, such as ``RAS``, that turn a file into a frame; arguments as ``frame_axes``.

    A code stands for the anatomical direction to which ``nibabel.io_orientation`` assigns an axis of the file; in
    ``acquisition`` it only names that axis.
    """
    nearest = io_orientation(np.asarray(affine, dtype=float)).astype(int)
    order, signs = frame_axes(frame, shape, affine)
    return "".join(
        _LETTERS[nearest[axis, 0]][int(sign * nearest[axis, 1] > 0)] for axis, sign in zip(order, signs, strict=True)
    )


def frame_grid(
    frame: str, shape: Sequence[int], affine: npt.ArrayLike
) -> tuple[tuple[int, int, int], tuple[float, float, float]]:
    """Return voxels and spacing in mm of a file along the axes of a frame; arguments as ``frame_axes``."""
    (a, b, c), _ = frame_axes(frame, shape, affine)
    spacing = [float(size) for size in voxel_sizes(np.asarray(affine, dtype=float))]
    return (int(shape[a]), int(shape[b]), int(shape[c])), (spacing[a], spacing[b], spacing[c])


def frame_augmentation(frame: str, spacing_mm: Sequence[float]) -> Mapping[str, Any]:
    """Return changes to a recipe (``deformux.fitting.recipe``) that suit a frame and its spacing.

    ``AUGMENTATION_REASONS`` has a reason for each.

    Args:
        frame: one of ``FRAMES``.
        spacing_mm: of the network's grid, along the frame's axes.
    """
    spacing = np.asarray(spacing_mm, dtype=float)
    degrees = []
    for axis in range(3):
        turned = np.delete(spacing, axis)
        unequal = turned.max() / turned.min()
        most = _IN_PLANE_ROTATION if frame == "acquisition" and axis == 2 else _ROTATION
        degrees.append(0.0 if unequal > _MOST_UNEQUAL else round(float(most / unequal), 1))
    return {
        "flip_axes": (),
        "rotation_degrees": tuple(degrees),
        "voxel_aspect": tuple(round(float(size), 3) for size in spacing / spacing.min()),
        "unlabelled_border": True,
    }


def choose_frame(affines: Iterable[npt.ArrayLike], shapes: Iterable[Sequence[int]]) -> tuple[str, str]:
    """Return the frame for a project's scans and the reason, one sentence without a full stop.

    ``ras`` needs all axes of all scans within 30 degrees of right, anterior or superior, and slices stacked along the
    same of these in every scan in which a through-plane axis stands out.

    Args:
        affines: of the files, from their voxels to RAS millimetres, each ``(4, 4)``.
        shapes: their voxels ``(X, Y, Z)``, in the same order.
    """
    n, oblique, widest = 0, 0, 0.0
    stacked = {"right": 0, "anterior": 0, "superior": 0}
    for affine, shape in zip(affines, shapes, strict=True):
        matrix = np.asarray(affine, dtype=float)
        angle, nearest = _tilt(matrix)
        n, oblique, widest = n + 1, oblique + (angle > _MARGIN_DEGREES), max(widest, angle)
        through = through_plane_axis(shape, matrix)
        if through is not None:
            stacked[list(stacked)[nearest[through]]] += 1
    used = [name for name, count in stacked.items() if count]
    if oblique:
        return "acquisition", (
            f"{oblique} of {n} scans are tilted by more than {_MARGIN_DEGREES:g} degrees, up to {widest:.0f}, so that "
            "the axis nearest to right, anterior or superior would differ between scans"
        )
    if len(used) > 1:
        counts = ", ".join(f"{stacked[name]} along {name}" for name in used)
        return "acquisition", f"slices are stacked along different axes: {counts}"
    along = f" and slices are stacked along {used[0]} in all" if used else ""
    return "ras", f"all scans lie within {_MARGIN_DEGREES:g} degrees of right, anterior, superior{along}"


def _tilt(affine: _Affine) -> tuple[float, list[int]]:
    """Return the largest angle in degrees between an axis and its anatomical one, and the latter's index for each."""
    nearest = [int(axis) for axis in io_orientation(affine)[:, 0]]
    cosines = np.abs(affine[nearest, range(3)]) / voxel_sizes(affine)
    return float(np.degrees(np.arccos(np.clip(cosines.min(), 0.0, 1.0)))), nearest
