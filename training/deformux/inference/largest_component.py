"""The largest connected piece of a segmentation's foreground, as nnU-Net keeps it (Isensee et al., 2021).

Networks trained for minutes put islands of labels far from the organ, and with few labels some as large as the organ.
So where the labelled scans agree about where the labels lie, a component counts by its distance from there too.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from deformux.data.components import Components
from deformux.data.grid import ScanGrid
from deformux.data.preprocessing import Preprocessing

__all__ = ["classes_of_largest", "keep_as_planned", "keep_largest_component"]

# A component this far from the usual place, in sides of the scan, counts for exp(-1/2) = 0.61 of its voxels.
_FAR = 0.2
# Components smaller than this, relative to the largest, are never kept.
_LEAST_SHARE = 0.05
# Of a larger part, only about as many voxels give the centres.
_CENTER_VOXELS = 2**20


def keep_as_planned(labels: npt.NDArray[np.uint8], grid: ScanGrid, prep: Preprocessing) -> bool:
    """Remove from labels ``(X, Y, Z)`` on the scan's grid, in place, what ``prep`` does not keep; return whether any.

    Every path from logits to a mask ends here.
    """
    return prep.keep_largest and keep_largest_component(labels, grid, prep.labels_center)


def keep_largest_component(
    labels: npt.NDArray[np.uint8], grid: ScanGrid | None = None, center: Sequence[float] | None = None
) -> bool:
    """Set labels ``(X, Y, Z)`` to 0, in place, outside the largest component; return whether that changed any.

    The component is that of all labels together, whose voxels touch by faces, edges or corners.

    Args:
        labels: on the scan's grid.
        grid: of the scan, for ``center``.
        center: where the labels' centre usually lies (``Preprocessing.labels_center``): components count as smaller
            the farther from there they are. None counts voxels alone.
    """
    components = Components(labels)
    if len(components.sizes) <= 2:
        return False
    kept = components.largest
    large = np.flatnonzero(components.sizes >= _LEAST_SHARE * components.sizes.max())
    if grid is not None and center is not None and len(large) > 1:
        apart = np.linalg.norm(_centers(components, large, grid) - center, axis=1)
        kept = int(large[(components.sizes[large] * np.exp(-((apart / _FAR) ** 2) / 2)).argmax()])
    for part, numbers in components.numbered():
        labels[part][numbers != kept] = 0
    return True


def _centers(components: Components, wanted: npt.NDArray[np.int64], grid: ScanGrid) -> npt.NDArray[np.float64]:
    """Return the centres ``(n, 3)`` of some components, as shares of the sides of the network's grid."""
    count = len(components.sizes)
    sums, voxels = np.zeros((count, 3)), np.zeros(count)
    for part, numbers in components.numbered():
        step = max(1, round((numbers.size / _CENTER_VOXELS) ** (1 / 3)))
        some = numbers[::step, ::step, ::step]
        index = np.argwhere(some > 0)
        number = some[tuple(index.T)]
        voxels += np.bincount(number, minlength=count)
        index = index * step + [side.start for side in part]
        for axis in range(3):
            sums[:, axis] += np.bincount(number, index[:, axis], minlength=count)
    found = sums[wanted] / np.maximum(voxels[wanted], 1)[:, None]
    moved = found @ grid.to_network[:3, :3].T + grid.to_network[:3, 3]
    return np.asarray((moved + 0.5) / np.array(grid.network_size))


def classes_of_largest(
    classes: npt.NDArray[np.uint8],
    grid: ScanGrid,
    *,
    found: npt.NDArray[np.uint8],
    kept: npt.NDArray[np.uint8],
) -> npt.NDArray[np.uint8]:
    """Return the classes of a segmentation on the network's grid without what was removed on the scan's.

    Args:
        classes: of the highest logits, ``(x, y, z)``.
        grid: of the scan.
        found: labels of the scan ``(X, Y, Z)`` by the same logits.
        kept: those that ``keep_largest_component`` left.
    """
    components = Components(classes)
    reached = np.zeros(len(components.sizes), dtype=bool)
    for part, numbers in components.numbered():
        reached[numbers[grid.at_network(kept, part) > 0]] = True
    result = classes.copy()
    for part, numbers in components.numbered():
        # Pieces may be joined on one grid and apart on the other; the surface of an island may lie between its voxels.
        removed = (grid.at_network(kept, part) == 0) & (grid.at_network(found, part) > 0)
        result[part][removed | ~reached[numbers]] = 0
    return result
