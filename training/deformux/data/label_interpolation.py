"""The class of the highest interpolated logit at a scan's voxels, compiled by Numba: one pass, no array of logits."""

# Numba infers the types here, from the arguments of each call.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import numba
import numpy as np

__all__ = ["interpolate_labels"]


def _compiled(function: Any) -> Any:
    """Compile on first use, and keep the machine code on disk if a folder for it is writable."""
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # Numba found no writable folder: compile again in each process
        return numba.njit(**options)(function)


@_compiled
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
    zero, one = np.float32(0), np.float32(1)
    low, high = np.empty(n_classes, np.float32), np.empty(n_classes, np.float32)
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
                    for j in range(start_y, stop_y):
                        t_y = share[1][j]
                        for k in range(start_z, stop_z):
                            t_z = share[2][k]
                            for c in range(n_classes):
                                low[c] = _between(
                                    _between(logits[c, x, y, z], logits[c, x, y, next_z], t_z),
                                    _between(logits[c, x, next_y, z], logits[c, x, next_y, next_z], t_z),
                                    t_y,
                                )
                                high[c] = _between(
                                    _between(logits[c, next_x, y, z], logits[c, next_x, y, next_z], t_z),
                                    _between(logits[c, next_x, next_y, z], logits[c, next_x, next_y, next_z], t_z),
                                    t_y,
                                )
                            label = _highest_between(low, high, zero)
                            same = label == _highest_between(low, high, one)
                            for i in range(start_x, stop_x):
                                found[i, j, k] = label if same else _highest_between(low, high, share[0][i])
                start_z = stop_z
            start_y = stop_y
        start_x = stop_x


@_compiled
def _end_of_run(values, start):
    """Return where the run of equal values that begins at a place ends."""
    stop = start + 1
    while stop < len(values) and values[stop] == values[start]:
        stop += 1
    return stop


@_compiled
def _highest_between(low, high, share):
    """Return the number of the highest of interpolated values, the first on a tie, as argmax does."""
    best, most = 0, _between(low[0], high[0], share)
    for number in range(1, len(low)):
        value = _between(low[number], high[number], share)
        if value > most:
            best, most = number, value
    return best


@_compiled
def _between(first, second, share):
    """Interpolate as ``torch.lerp`` does: each end is exact."""
    if share < np.float32(0.5):
        return first + share * (second - first)
    return second - (second - first) * (np.float32(1.0) - share)
