"""Code that both passes of the Numba backend share: sizes, compilation, and the positions that a voxel's taps sample.

Input, output and their gradients are channels-last in memory, (N, D, H, W, C), so that the innermost loops run over
contiguous channels. Arrays are flat and indexed in elements, in 64 bits. A row is a line of output voxels along w; rows
are numbered over (n, d, h). Kernels release the GIL and never write to memory that another thread writes to.

A row is cut into segments. The sampling positions of a segment are computed once. Then each block of channels visits
all voxels and taps of the segment: neighbouring voxels sample overlapping places, which stay in the first-level cache.
"""

# Numba infers the types here, from the arguments of each call.
# mypy: disable-error-code="no-untyped-def, arg-type"

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np

from ._cpu_simd import corner_weights, floor, load, mul, store


class Sizes(NamedTuple):
    """The sizes of one call and the strides, in elements, of its tensors."""

    channels: int
    d: int
    h: int
    w: int
    out_d: int
    out_h: int
    out_w: int
    k_d: int
    k_h: int
    k_w: int
    stride_d: int
    stride_h: int
    stride_w: int
    pad_d: int
    pad_h: int
    pad_w: int
    dil_d: int
    dil_h: int
    dil_w: int
    x_n: int
    x_d: int
    x_h: int
    x_w: int
    o_n: int
    o_c: int
    o_d: int
    o_h: int
    o_w: int
    m_n: int
    m_c: int
    m_d: int
    m_h: int
    m_w: int


# Voxels of a segment: as many floats as fill a cache line, so that planar offsets are read a whole line at a time.
SEGMENT = 16


def jit(function: Any) -> Any:
    """Compile on first use, and keep the machine code on disk if a folder for it is writable.

    Numba recompiles when the file of the function changes, not when another file that it calls does: after an edit
    of this module or `_cpu_simd`, remove the ``__pycache__`` folder.
    """
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # Numba found no writable folder: compile again in each process
        return numba.njit(**options)(function)


@jit
def locate(offset, mask, at_x, row_d, row_h, row_w, s, first, place, upper, corner):
    """List the taps of one output voxel that sample inside the volume, from entry `first` on; return their number.

    Per entry, `place` holds the index of the lowest corner, the steps to the upper corners along d, h, w, the tap, the
    slices of the lower and the upper corners, and a mask of the corners outside (see `clear_outside`); `upper` holds
    the weights of the upper corners along d, h, w; `corner` holds the weights of the eight corners, zero outside, times
    the mask. A corner outside the volume gets the place of its neighbour inside, so that it can be read.
    `offset` and `mask` are laid out by `fetch`, with the voxel's first values at 3 * first and first.
    """
    real = offset.dtype.type
    least = real(0)
    one = real(1)
    count = 0
    tap = 0
    for i in range(s.k_d):
        centre_d = real(row_d + i * s.dil_d)
        for j in range(s.k_h):
            centre_h = real(row_h + j * s.dil_h)
            for k in range(s.k_w):
                shift = 3 * (first + tap)
                at_d = centre_d + load(offset, shift, one)
                at_h = centre_h + load(offset, shift + 1, one)
                at_w = real(row_w + k * s.dil_w) + load(offset, shift + 2, one)
                inside = (
                    at_d >= least
                    and at_d < real(s.d - 1)
                    and at_h >= least
                    and at_h < real(s.h - 1)
                    and at_w >= least
                    and at_w < real(s.w - 1)
                )
                # All comparisons are false for NaN: such a position samples nothing, like one far outside.
                if inside or (
                    at_d >= -one
                    and at_d < real(s.d)
                    and at_h >= -one
                    and at_h < real(s.h)
                    and at_w >= -one
                    and at_w < real(s.w)
                ):
                    floor_d = floor(at_d)
                    floor_h = floor(at_h)
                    floor_w = floor(at_w)
                    low_d = np.int64(floor_d)
                    low_h = np.int64(floor_h)
                    low_w = np.int64(floor_w)
                    step_d = s.x_d
                    step_h = s.x_h
                    step_w = s.x_w
                    up_d = low_d + 1
                    weights = corner_weights(at_d - floor_d, at_h - floor_h, at_w - floor_w)
                    if mask.size:
                        weights = mul(weights, load(mask, first + tap, one))
                    entry = 8 * (first + count)
                    store(corner, entry, weights)
                    outside = 0
                    if not inside:
                        outside = (low_d < 0) + 2 * (up_d >= s.d)
                        outside += 4 * (low_h < 0) + 8 * (low_h + 1 >= s.h) + 16 * (low_w < 0) + 32 * (low_w + 1 >= s.w)
                        if outside & 3:
                            step_d = 0
                            low_d = max(low_d, 0)
                            up_d = low_d
                        if outside & 12:
                            step_h = 0
                            low_h = max(low_h, 0)
                        if outside & 48:
                            step_w = 0
                            low_w = max(low_w, 0)
                        clear_outside(corner, entry, outside)
                    store(place, entry, at_x + low_d * s.x_d + low_h * s.x_h + low_w * s.x_w)
                    store(place, entry + 1, step_d)
                    store(place, entry + 2, step_h)
                    store(place, entry + 3, step_w)
                    store(place, entry + 4, tap)
                    store(place, entry + 5, low_d)
                    store(place, entry + 6, up_d)
                    store(place, entry + 7, outside)
                    if upper.size:
                        u = 3 * (first + count)
                        store(upper, u, at_d - floor_d)
                        store(upper, u + 1, at_h - floor_h)
                        store(upper, u + 2, at_w - floor_w)
                    count += 1
                tap += 1
    return count


@jit
def clear_outside(values, entry, outside):
    """Zero the values of the corners outside: `outside` has two bits per axis, for lower and upper corners."""
    for i in range(8):
        if (outside >> (i >> 2)) & 1 or (outside >> (2 + (i >> 1 & 1))) & 1 or (outside >> (4 + (i & 1))) & 1:
            values[entry + i] = 0


@jit
def fetch(source, start, step_c, step_w, channels, length, local):
    """Copy the values of `length` voxels of a row, with the channels of each voxel together."""
    if step_c == 1:
        for i in range(length):
            for j in range(channels):
                local[i * channels + j] = source[start + i * step_w + j]
    else:  # one cache line at a time: the channels' planes are often whole pages apart and would evict each other
        for j in range(channels):
            for i in range(length):
                local[i * channels + j] = source[start + j * step_c + i * step_w]


@jit
def deliver(local, target, start, step_c, step_w, channels, length):
    """Copy back what `fetch` copied."""
    if step_c == 1:
        for i in range(length):
            for j in range(channels):
                target[start + i * step_w + j] = local[i * channels + j]
    else:
        for j in range(channels):
            for i in range(length):
                target[start + j * step_c + i * step_w] = local[i * channels + j]
