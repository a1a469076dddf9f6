"""A volume on another volume's grid, by their positions in the patient."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from deformux.data.header import geometry_difference

__all__ = ["on_grid"]

# The positions of a slab's voxels take three float64 each.
_SLAB_VOXELS = 2_000_000


def on_grid(
    values: npt.NDArray[np.float32],
    affine: npt.NDArray[np.float64],
    shape: tuple[int, ...],
    grid_affine: npt.NDArray[np.float64],
) -> npt.NDArray[np.float32]:
    """Interpolate a volume ``(X, Y, Z)`` linearly at the voxels of a grid; return ``shape``.

    As in ITK, a volume reaches half a voxel beyond the centres of its outermost voxels. Outside, the result is its
    lowest value.

    Args:
        values: the volume.
        affine, grid_affine: from voxels to RAS millimetres, ``(4, 4)``, of the volume and of the grid.
        shape: voxels of the grid.
    """
    if geometry_difference(shape, grid_affine, values.shape, affine) is None:
        return values
    to_own = np.linalg.inv(affine) @ grid_affine
    size = np.array(values.shape)
    lowest = values.min()
    found = np.empty(shape, dtype=np.float32)
    step = max(1, _SLAB_VOXELS // int(np.prod(shape[1:])))
    for begin in range(0, shape[0], step):
        slab = found[begin : begin + step]
        start = to_own[:3, :3] @ [begin, 0, 0] + to_own[:3, 3]
        ndimage.affine_transform(values, to_own[:3, :3], start, slab.shape, output=slab, order=1, mode="nearest")
        first, second, third = (np.arange(n, dtype=float) for n in slab.shape)
        for axis in range(3):
            x, y, z = to_own[axis, :3]
            index = start[axis] + (x * first[:, None, None] + y * second[:, None] + z * third)
            slab[(index < -0.5) | (index > size[axis] - 0.5)] = lowest
    return found
