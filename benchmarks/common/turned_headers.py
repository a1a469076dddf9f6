"""Copies of scans whose headers are turned: the same voxels, as if the scanner's planes had another angle."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
from scipy.spatial.transform import Rotation

__all__ = ["turned_affine", "write_turned"]


def turned_affine(affine: npt.ArrayLike, shape: tuple[int, ...], rotation: Rotation) -> npt.NDArray[np.float64]:
    """Return the affine ``(4, 4)`` of a volume of this shape after a rotation about its centre, in RAS millimetres."""
    matrix = np.array(affine, dtype=float)
    centre = matrix[:3, :3] @ ((np.array(shape[:3]) - 1) / 2) + matrix[:3, 3]
    turned = matrix.copy()
    turned[:3, :3] = rotation.as_matrix() @ matrix[:3, :3]
    turned[:3, 3] = centre + rotation.as_matrix() @ (matrix[:3, 3] - centre)
    return turned


def write_turned(source: Path, target: Path, rotation: Rotation) -> None:
    """Write a copy of a NIfTI file with its stored numbers and a turned affine, in sform and qform."""
    image = nib.load(source)
    stored = np.asanyarray(image.dataobj.get_unscaled())
    affine = turned_affine(image.affine, image.shape, rotation)
    header = image.header.copy()
    copy = type(image)(stored, affine, header)
    copy.header.set_slope_inter(image.dataobj.slope, image.dataobj.inter)
    copy.set_sform(affine, code=1)
    copy.set_qform(affine, code=1)
    nib.save(copy, target)
