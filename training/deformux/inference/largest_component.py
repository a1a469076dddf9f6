"""The largest connected piece of a segmentation's foreground, as nnU-Net keeps it (Isensee et al., 2021).

Networks trained for minutes put islands of labels far from the organ.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from deformux.data.components import Components
from deformux.data.grid import ScanGrid

__all__ = ["classes_of_largest", "keep_largest_component"]


def keep_largest_component(labels: npt.NDArray[np.uint8]) -> bool:
    """Set labels ``(X, Y, Z)`` to 0, in place, outside the largest component; return whether that changed any.

    The component is that of all labels together, whose voxels touch by faces, edges or corners.
    """
    components = Components(labels)
    if len(components.sizes) <= 2:
        return False
    for part, numbers in components.numbered():
        labels[part][numbers != components.largest] = 0
    return True


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
