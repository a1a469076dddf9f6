"""Connected components of a mask, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

__all__ = ["Components"]

_Numbers: TypeAlias = npt.NDArray[np.integer[Any]]
_Part: TypeAlias = tuple[slice, slice, slice]

# scipy numbers in int32: of a large scan at once they would take more memory than all else.
_SLAB_VOXELS = 8_000_000
# Voxels touch by a face, an edge or a corner.
_TOUCHING = np.ones((3, 3, 3), dtype=bool)


class Components:
    """The components of a mask's nonzero voxels, which touch by faces, edges or corners.

    Args:
        mask: ``(x, y, z)``; a byte or two per voxel of the box around them are kept.
    """

    def __init__(self, mask: npt.NDArray[Any]) -> None:
        # Of each slab: where it is, the numbers of its own components, and how many come before.
        self._slabs: list[tuple[_Part, _Numbers, int]] = []
        sizes: list[npt.NDArray[np.int64]] = [np.zeros(0, dtype=np.int64)]
        touching: list[npt.NDArray[np.int64]] = [np.zeros((2, 0), dtype=np.int64)]
        before, last = 0, None
        for part in _slabs(mask):
            found, count = ndimage.label(mask[part], _TOUCHING)
            sizes.append(np.bincount(found[found > 0], minlength=count + 1)[1:])
            if last is not None:
                touching.append(_touching(last, found[0].astype(np.int64) + before * (found[0] > 0)))
            last = found[-1].astype(np.int64) + before * (found[-1] > 0)
            self._slabs.append((part, found.astype(np.min_scalar_type(count)), before))
            before += count
        one, other = np.concatenate(touching, axis=1) - 1
        graph = coo_array((np.ones(len(one), dtype=bool), (one, other)), shape=(before, before))
        self._number = 1 + connected_components(graph, directed=False)[1] if before else np.zeros(0, dtype=np.int32)
        joined = np.bincount(self._number, weights=np.concatenate(sizes), minlength=1)
        self.sizes: npt.NDArray[np.int64] = joined.astype(np.int64)
        """Number of voxels of each component, ``(1 + n,)``; 0 for the first, the background."""

    @property
    def largest(self) -> int:
        """Return the number of the largest component, the first of equal ones; 0 if there is none."""
        return int(self.sizes.argmax())

    @property
    def largest_share(self) -> float:
        """Return the share of the nonzero voxels in the largest component; 1 if there are none."""
        return float(self.sizes.max() / self.sizes.sum()) if self.largest else 1.0

    def numbered(self) -> Iterator[tuple[_Part, _Numbers]]:
        """Yield parts that hold all nonzero voxels, and the component of each voxel of a part, 0 for background."""
        for part, numbers, before in self._slabs:
            own = self._number[before : before + int(numbers.max(initial=0))]
            yield part, np.concatenate([np.zeros(1, dtype=own.dtype), own])[numbers]


def _slabs(mask: npt.NDArray[Any]) -> Iterator[_Part]:
    """Yield slabs along the first axis of the box around the nonzero voxels."""
    for planes, rows, columns in ndimage.find_objects((mask > 0).view(np.uint8)):
        plane = (rows.stop - rows.start) * (columns.stop - columns.start)
        step = max(1, _SLAB_VOXELS // plane)
        for at in range(planes.start, planes.stop, step):
            yield slice(at, min(at + step, planes.stop)), rows, columns


def _touching(plane: npt.NDArray[np.int64], following: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the pairs ``(2, n)`` of numbers that touch between two planes that follow each other."""
    around = np.pad(following, 1)
    width = int(around.max()) + 1
    pairs = []
    for a, b in product(range(3), repeat=2):
        shifted = around[a : a + plane.shape[0], b : b + plane.shape[1]]
        both = (plane > 0) & (shifted > 0)
        pairs.append(np.unique(plane[both] * width + shifted[both]))
    return np.stack(np.divmod(np.unique(np.concatenate(pairs)), width))
