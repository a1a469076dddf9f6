"""The scribbles of a request on the scan's grid, and the region around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from fastapi import HTTPException
from nibabel.affines import apply_affine, voxel_sizes

from deformux.data.grid import Box, bounding_box, slices, triple
from deformux_label.lib.requests.scribbles import SCRIBBLE_SEGMENTS, SCRIBBLED_FOREGROUND, ScribblesRequest
from deformux_label.lib.store.label_check import segment_values

__all__ = ["Drawn", "Scribbles", "drawn_of"]

Scribbles = npt.NDArray[np.uint8]

# An object is assumed to extend beyond its scribbles by at most their length; this is the least margin.
_MIN_MARGIN_MM = 20.0


@dataclass(frozen=True)
class Drawn:
    """Scribbles ``(X, Y, Z)`` on the scan's grid, and the region (ends exclusive, perhaps beyond it) to segment."""

    scribbles: Scribbles
    region: Box

    @property
    def inside(self) -> Box:
        """Return the part of the region that lies in the scan."""
        start = triple(np.clip(self.region[0], 0, self.scribbles.shape))
        return start, triple(np.clip(self.region[1], 0, self.scribbles.shape))


def drawn_of(request: ScribblesRequest, *, of_foreground: bool) -> Drawn:
    """Read the scribbles of a request, and the region around the foreground or around all scribbles.

    Raises:
        HTTPException: 422 for a file without scribbles, or a region without foreground scribbles.
    """
    values, to_scan, affine = segment_values(request.scribbles, Path(request.scan.path), request.scan.name)
    scribbles = np.zeros(values.shape, dtype=np.uint8)
    for name, number in request.segment_ids.items():
        scribbles[values == number] = SCRIBBLE_SEGMENTS[name]
    if not scribbles.any():
        raise HTTPException(422, "there are no scribbles in the label file; draw on the foreground first")
    if not (scribbles == SCRIBBLED_FOREGROUND).any():
        raise HTTPException(422, "there is no foreground scribble; draw at least one on the object to segment")
    if request.roi is not None:
        region = _clipped(request.roi, to_scan, scribbles.shape)
        outside = np.ones(scribbles.shape, dtype=bool)
        outside[slices(region)] = False
        scribbles[outside] = 0
        if not (scribbles == SCRIBBLED_FOREGROUND).any():
            raise HTTPException(422, "no foreground scribble lies inside the region of interest; draw one there")
        return Drawn(scribbles, region)
    around = bounding_box(scribbles == SCRIBBLED_FOREGROUND if of_foreground else scribbles > 0)
    assert around is not None
    sizes = voxel_sizes(affine)
    longest = float(((np.array(around[1]) - around[0]) * sizes).max())
    margin = np.ceil(max(_MIN_MARGIN_MM, longest) / sizes).astype(int)
    return Drawn(scribbles, (triple(np.array(around[0]) - margin), triple(np.array(around[1]) + margin)))


def _clipped(roi: Sequence[int], to_scan: npt.NDArray[np.float64], size: Sequence[int]) -> Box:
    """Return the box of the scan between two corners, both included, given in voxels of the label file."""
    corners = np.rint(apply_affine(to_scan, np.reshape(roi, (3, 2)).T))
    start, stop = corners.min(0).astype(int), corners.max(0).astype(int) + 1
    if (stop <= 0).any() or (start >= np.array(size)).any():
        shown = " x ".join(map(str, size))
        raise HTTPException(422, f"roi {list(roi)} lies outside the image, which has {shown} voxels")
    return triple(np.maximum(start, 0)), triple(np.minimum(stop, size))
