"""The class of the highest interpolated logit at a scan's voxels, compiled by Numba: one pass, no array of logits."""

# Numba infers the types here, from the arguments of each call.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import types

__all__ = ["interpolate_labels"]


def _compiled(*signature: Any) -> Callable[[Any], Any]:
    """Compile for one signature, else on first use; keep the machine code on disk if a folder for it is writable."""
    options = {"nogil": True, "error_model": "numpy"}

    def compiled(function: Any) -> Any:
        try:
            return numba.njit(*signature, cache=True, **options)(function)
        except RuntimeError:  # Numba found no writable folder: compile again in each process
            return numba.njit(*signature, **options)(function)

    return compiled


def _read(dtype: Any, axes: int) -> Any:
    """Return the type of an array of any layout that is only read: one compilation serves all."""
    return types.Array(dtype, axes, "A", readonly=True)


_SIGNATURE = types.void(
    _read(types.float32, 4),
    _read(types.uint8, 3),
    _read(types.boolean, 3),
    types.UniTuple(types.int64[::1], 3),
    types.UniTuple(types.float32[::1], 3),
    types.uint8[:, :, ::1],
)


@_compiled()
def _between(first, second, share):
    """Interpolate as ``torch.lerp`` does: each end is exact."""
    if share < np.float32(0.5):
        return first + share * (second - first)
    return second - (second - first) * (np.float32(1.0) - share)


@_compiled()
def _highest_between(low, high, count, share):
    """Return the place of the highest of so many interpolated values, the first on a tie, as argmax does."""
    best, most = 0, _between(low[0], high[0], share)
    for place in range(1, count):
        value = _between(low[place], high[place], share)
        if value > most:
            best, most = place, value
    return best


@_compiled()
def _end_of_run(values, start):
    """Return where the run of equal values that begins at a place ends."""
    stop = start + 1
    while stop < len(values) and values[stop] == values[start]:
        stop += 1
    return stop


@_compiled(_SIGNATURE)
def interpolate_labels(logits, classes, wanted, below, share, found):
    """Write the class of the highest interpolated logit into every voxel of a box of the scan.

    Only between voxels of different classes is anything interpolated: between equal ones every mean has the same class.
    Logits are interpolated along the third axis first, then the second, then the first.

    Args:
        logits: on the network's grid, its axes in the scan's order, ``(C, x, y, z)``, float32 in any layout.
        classes: of the highest logits, ``(x, y, z)``, uint8.
        wanted: voxels ``(x, y, z)`` of which the effect is wanted; what lies between others only gets the class of one.
        below: along each axis of the box the voxel of the network's grid before, int64.
        share: along each axis, of the way to the next one, float32 in 0..1.
        found: to be filled, ``(X, Y, Z)``, uint8.
    """
    n_classes, size_x, size_y, size_z = logits.shape
    low, high, most = np.empty(n_classes, np.float32), np.empty(n_classes, np.float32), np.empty(n_classes, np.float32)
    left = np.empty(n_classes, np.uint8)
    start_x = 0
    while start_x < len(below[0]):
        x = below[0][start_x]
        stop_x = _end_of_run(below[0], start_x)
        next_x = min(x + 1, size_x - 1)
        start_y = 0
        while start_y < len(below[1]):
            y = below[1][start_y]
            stop_y = _end_of_run(below[1], start_y)
            next_y = min(y + 1, size_y - 1)
            start_z = 0
            while start_z < len(below[2]):
                z = below[2][start_z]
                stop_z = _end_of_run(below[2], start_z)
                next_z = min(z + 1, size_z - 1)
                first = classes[x, y, z]
                same, some = True, False
                for a in (x, next_x):
                    for b in (y, next_y):
                        for c in (z, next_z):
                            same = same and classes[a, b, c] == first
                            some = some or wanted[a, b, c]
                if same or not some:
                    for i in range(start_x, stop_x):
                        for j in range(start_y, stop_y):
                            for k in range(start_z, stop_z):
                                found[i, j, k] = first
                else:
                    # A class that is below the least of another one at all eight corners is never the highest.
                    bound = -np.float32(np.inf)
                    for c in range(n_classes):
                        least, most[c] = np.float32(np.inf), -np.float32(np.inf)
                        for a in (x, next_x):
                            for b in (y, next_y):
                                for d in (z, next_z):
                                    least = min(least, logits[c, a, b, d])
                                    most[c] = max(most[c], logits[c, a, b, d])
                        bound = max(bound, least)
                    count = 0
                    for c in range(n_classes):
                        if most[c] >= bound:
                            left[count] = c
                            count += 1
                    if count == 0:  # logits that are not a number
                        left[0], count = first, 1
                    for j in range(start_y, stop_y):
                        t_y = share[1][j]
                        for k in range(start_z, stop_z):
                            t_z = share[2][k]
                            for n in range(count):
                                c = left[n]
                                low[n] = _between(
                                    _between(logits[c, x, y, z], logits[c, x, y, next_z], t_z),
                                    _between(logits[c, x, next_y, z], logits[c, x, next_y, next_z], t_z),
                                    t_y,
                                )
                                high[n] = _between(
                                    _between(logits[c, next_x, y, z], logits[c, next_x, y, next_z], t_z),
                                    _between(logits[c, next_x, next_y, z], logits[c, next_x, next_y, next_z], t_z),
                                    t_y,
                                )
                            at_first = _highest_between(low, high, count, np.float32(0))
                            everywhere = at_first == _highest_between(low, high, count, np.float32(1))
                            for i in range(start_x, stop_x):
                                best = at_first if everywhere else _highest_between(low, high, count, share[0][i])
                                found[i, j, k] = left[best]
                start_z = stop_z
            start_y = stop_y
        start_x = stop_x
