"""The Numba kernel of the forward pass: what one thread does with its share of a depthwise convolution."""

# Numba infers the types here, from the arguments of each call.
# mypy: disable-error-code="no-untyped-def, arg-type"

from __future__ import annotations

import numpy as np

from ._cpu_sampling import SEGMENT, fetch, jit, locate
from ._cpu_simd import load, mul, mul_add, store, vector


@jit
def forward(x, offset, mask, weight, bias, y, s, first, last):
    """Write the output rows first to last - 1."""
    taps = s.k_d * s.k_h * s.k_w
    place = np.empty(SEGMENT * 8 * taps, np.int64)
    corner = np.empty(SEGMENT * 8 * taps, x.dtype)
    upper = np.empty(0, x.dtype)
    count = np.empty(SEGMENT, np.int64)
    shifts = np.empty(SEGMENT * 3 * taps, offset.dtype)
    factors = np.empty(SEGMENT * taps if mask.size else 0, offset.dtype)
    lanes = 64 // x.itemsize
    for row in range(first, last):
        n = row // (s.out_d * s.out_h)
        d = row // s.out_h % s.out_d
        h = row % s.out_h
        o = n * s.o_n + d * s.o_d + h * s.o_h
        m = n * s.m_n + d * s.m_d + h * s.m_h
        row_d = d * s.stride_d - s.pad_d
        row_h = h * s.stride_h - s.pad_h
        for w in range(0, s.out_w, SEGMENT):
            length = min(SEGMENT, s.out_w - w)
            fetch(offset, o + w * s.o_w, s.o_c, s.o_w, 3 * taps, length, shifts)
            if mask.size:
                fetch(mask, m + w * s.m_w, s.m_c, s.m_w, taps, length, factors)
            for i in range(length):
                row_w = (w + i) * s.stride_w - s.pad_w
                count[i] = locate(shifts, factors, n * s.x_n, row_d, row_h, row_w, s, i * taps, place, upper, corner)
            out = (row * s.out_w + w) * s.channels
            c = 0
            while c + 2 * lanes <= s.channels:
                for i in range(length):
                    _sum_taps(
                        x, place, corner, i * taps, count[i], weight, bias, y, out + i * s.channels, c, s, vector(x, 2)
                    )
                c += 2 * lanes
            while c + lanes <= s.channels:
                for i in range(length):
                    _sum_taps(
                        x, place, corner, i * taps, count[i], weight, bias, y, out + i * s.channels, c, s, vector(x, 1)
                    )
                c += lanes
            while c < s.channels:
                for i in range(length):
                    _sum_taps(
                        x,
                        place,
                        corner,
                        i * taps,
                        count[i],
                        weight,
                        bias,
                        y,
                        out + i * s.channels,
                        c,
                        s,
                        x.dtype.type(0),
                    )
                c += 1


@jit
def _sum_taps(x, place, corner, first, count, weight, bias, y, out, c, s, like):
    """Write the channels of one output voxel from c on, as many as `like` holds."""
    total = load(bias, c, like)
    for t in range(first, first + count):
        q = 8 * t
        a = place[q] + c
        b = a + place[q + 1]
        step_h = place[q + 2]
        step_w = place[q + 3]
        value = mul(load(x, a, like), corner[q])
        value = mul_add(load(x, a + step_w, like), corner[q + 1], value)
        value = mul_add(load(x, a + step_h, like), corner[q + 2], value)
        value = mul_add(load(x, a + step_h + step_w, like), corner[q + 3], value)
        value = mul_add(load(x, b, like), corner[q + 4], value)
        value = mul_add(load(x, b + step_w, like), corner[q + 5], value)
        value = mul_add(load(x, b + step_h, like), corner[q + 6], value)
        value = mul_add(load(x, b + step_h + step_w, like), corner[q + 7], value)
        total = mul_add(value, load(weight, place[q + 4] * s.channels + c, like), total)
    store(y, out + c, total)
