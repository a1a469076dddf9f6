"""The Numba kernels: what one thread does with its share of a depthwise convolution. `cpu` shares the work out.

Input, output and their gradients are channels-last in memory, (N, D, H, W, C), so that the innermost loops run over
contiguous channels. Arrays are flat and indexed in elements, in 64 bits. A row is a line of output voxels along w; rows
are numbered over (n, d, h). Kernels release the GIL and never write what another thread writes.

A row is cut into segments. A segment's sampling positions are found once, then each block of channels goes through all
its voxels and taps: what neighbouring voxels sample overlaps, and a block of it stays in the first-level cache.
"""

# Numba infers the types here, from the arguments of each call.
# mypy: disable-error-code="no-untyped-def, arg-type"

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np

from ._simd import corner_weights, floor, load, mul, mul_add, store, store_sums, vector, zero


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


def _jit(function: Any) -> Any:
    """Compile on first use, and keep the machine code on disk where a folder for it can be written."""
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # Numba found no folder it can write: compile anew in each process
        return numba.njit(**options)(function)


@_jit
def _locate(offset, mask, at_x, row_d, row_h, row_w, s, first, place, upper, corner):
    """List the taps of one output voxel that sample inside the volume, from entry `first` on; return how many.

    Per entry: `place` has the index of the lowest corner, the steps to the upper ones along d, h, w, the tap, slices
    of lower and upper corners, and which corners are outside (see `_clear_outside`); `upper` the weights of the upper
    corners along d, h, w; `corner` the weights of the eight corners, zero outside, times the mask. A corner outside the
    volume has the place of the one inside next to it, so that it can be read.
    `offset` and `mask` are as `_fetch` leaves them, the voxel's first value at 3 * first and first.
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
                # All false for a position that is not a number: it samples nothing, as one far outside.
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
                        _clear_outside(corner, entry, outside)
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


@_jit
def _clear_outside(values, entry, outside):
    """Set to zero those of eight values whose corners are outside: per axis, a bit for its lower and its upper ones."""
    for i in range(8):
        if (outside >> (i >> 2)) & 1 or (outside >> (2 + (i >> 1 & 1))) & 1 or (outside >> (4 + (i & 1))) & 1:
            values[entry + i] = 0


@_jit
def _fetch(source, start, step_c, step_w, channels, length, local):
    """Copy the values of `length` voxels of a row, each voxel's channels together."""
    if step_c == 1:
        for i in range(length):
            for j in range(channels):
                local[i * channels + j] = source[start + i * step_w + j]
    else:  # line by line of the cache: the channels' planes are often whole pages apart, and would evict each other
        for j in range(channels):
            for i in range(length):
                local[i * channels + j] = source[start + j * step_c + i * step_w]


@_jit
def _deliver(local, target, start, step_c, step_w, channels, length):
    """The reverse of `_fetch`."""
    if step_c == 1:
        for i in range(length):
            for j in range(channels):
                target[start + i * step_w + j] = local[i * channels + j]
    else:
        for j in range(channels):
            for i in range(length):
                target[start + j * step_c + i * step_w] = local[i * channels + j]


@_jit
def forward(x, offset, mask, weight, bias, y, s, first, last):
    """Write the output rows first .. last - 1."""
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
            _fetch(offset, o + w * s.o_w, s.o_c, s.o_w, 3 * taps, length, shifts)
            if mask.size:
                _fetch(mask, m + w * s.m_w, s.m_c, s.m_w, taps, length, factors)
            for i in range(length):
                row_w = (w + i) * s.stride_w - s.pad_w
                count[i] = _locate(shifts, factors, n * s.x_n, row_d, row_h, row_w, s, i * taps, place, upper, corner)
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


@_jit
def _sum_taps(x, place, corner, first, count, weight, bias, y, out, c, s, like):
    """Write one output voxel's channels from c on, as many as `like` holds."""
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


@_jit
def reach(offset, s, first, last, low, high):
    """Write which input slices (along d) the rows first .. last - 1 sample: low[row] .. high[row], inclusive."""
    real = offset.dtype.type
    taps = s.k_d * s.k_h * s.k_w
    for row in range(first, last):
        n = row // (s.out_d * s.out_h)
        d = row // s.out_h % s.out_d
        o = n * s.o_n + d * s.o_d + row % s.out_h * s.o_h
        least = real(s.d)
        most = -real(1)
        for tap in range(taps):
            centre = real(d * s.stride_d - s.pad_d + tap // (s.k_h * s.k_w) * s.dil_d)
            for w in range(s.out_w):
                at = centre + offset[o + 3 * tap * s.o_c + w * s.o_w]
                least = at if at < least else least
                most = at if at > most else most
        low[row] = np.int64(floor(max(least, -real(1))))
        high[row] = np.int64(floor(min(most, real(s.d)))) + 1


@_jit
def grad_samples(x, offset, mask, weight, grad, grad_offset, grad_mask, grad_weight, s, first, last):
    """Write grad_offset and grad_mask of the rows first .. last - 1, and add these rows' part to grad_weight.

    grad_offset and grad_mask have the strides of offset and mask; an empty array is a gradient that is not needed.
    """
    taps = s.k_d * s.k_h * s.k_w
    shifts = np.empty(SEGMENT * 3 * taps, offset.dtype)
    factors = np.empty(SEGMENT * taps if mask.size else 0, offset.dtype)
    grad_shifts = np.empty(SEGMENT * 3 * taps, offset.dtype)
    grad_factors = np.empty(SEGMENT * taps, offset.dtype)
    place = np.empty(SEGMENT * 8 * taps, np.int64)
    upper = np.empty(SEGMENT * 3 * taps, x.dtype)
    corner = np.empty(SEGMENT * 8 * taps, x.dtype)
    dots = np.empty(8 * taps, x.dtype)
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
            _fetch(offset, o + w * s.o_w, s.o_c, s.o_w, 3 * taps, length, shifts)
            if mask.size:
                _fetch(mask, m + w * s.m_w, s.m_c, s.m_w, taps, length, factors)
            for i in range(length):
                row_w = (w + i) * s.stride_w - s.pad_w
                e = i * taps
                count = _locate(shifts, factors, n * s.x_n, row_d, row_h, row_w, s, e, place, upper, corner)
                g = (row * s.out_w + w + i) * s.channels
                _dot_taps(x, place, corner, e, count, weight, grad, g, dots, grad_weight, s.channels)
                _combine_dots(dots, place, upper, factors, e, count, taps, grad_shifts, grad_factors)
            if grad_offset.size:
                _deliver(grad_shifts, grad_offset, o + w * s.o_w, s.o_c, s.o_w, 3 * taps, length)
            if grad_mask.size:
                _deliver(grad_factors, grad_mask, m + w * s.m_w, s.m_c, s.m_w, taps, length)


@_jit
def _combine_dots(dots, place, upper, factors, first, count, taps, grad_shifts, grad_factors):
    """Turn one output voxel's products with the corners into its gradients of offset and mask."""
    real = dots.dtype.type
    for tap in range(taps if count < taps else 0):
        grad_factors[first + tap] = real(0)
        for axis in range(3):
            grad_shifts[3 * (first + tap) + axis] = real(0)
    for t in range(count):
        q = 8 * t
        e = 8 * (first + t)
        if place[e + 7]:
            _clear_outside(dots, q, place[e + 7])
        u = 3 * (first + t)
        u_d = upper[u]
        u_h = upper[u + 1]
        u_w = upper[u + 2]
        slope00 = dots[q + 1] - dots[q]
        slope01 = dots[q + 3] - dots[q + 2]
        slope10 = dots[q + 5] - dots[q + 4]
        slope11 = dots[q + 7] - dots[q + 6]
        line00 = dots[q] + u_w * slope00
        line01 = dots[q + 2] + u_w * slope01
        line10 = dots[q + 4] + u_w * slope10
        line11 = dots[q + 6] + u_w * slope11
        across0 = line01 - line00
        across1 = line11 - line10
        plane0 = line00 + u_h * across0
        plane1 = line10 + u_h * across1
        along0 = slope00 + u_h * (slope01 - slope00)
        along1 = slope10 + u_h * (slope11 - slope10)
        tap = first + place[e + 4]
        factor = factors[tap] if factors.size else real(1)
        store(grad_factors, tap, plane0 + u_d * (plane1 - plane0))
        store(grad_shifts, 3 * tap, factor * (plane1 - plane0))
        store(grad_shifts, 3 * tap + 1, factor * (across0 + u_d * (across1 - across0)))
        store(grad_shifts, 3 * tap + 2, factor * (along0 + u_d * (along1 - along0)))


@_jit
def _dot_taps(x, place, corner, first, count, weight, grad, g, dots, grad_weight, channels):
    """Per tap, write the products of its eight corners with grad * weight, and add to the weight's gradient."""
    lanes = 64 // x.itemsize
    need_weight = grad_weight.size > 0
    for t in range(count):
        q = 8 * (first + t)
        a0 = place[q]
        b0 = a0 + place[q + 1]
        step_h = place[q + 2]
        step_w = place[q + 3]
        k = place[q + 4] * channels
        like = vector(x, 1)
        s0 = zero(like)
        s1 = zero(like)
        s2 = zero(like)
        s3 = zero(like)
        s4 = zero(like)
        s5 = zero(like)
        s6 = zero(like)
        s7 = zero(like)
        c = 0
        while c + lanes <= channels:
            a = a0 + c
            b = b0 + c
            gradient = load(grad, g + c, like)
            weighted = mul(gradient, load(weight, k + c, like))
            v0 = load(x, a, like)
            v1 = load(x, a + step_w, like)
            v2 = load(x, a + step_h, like)
            v3 = load(x, a + step_h + step_w, like)
            v4 = load(x, b, like)
            v5 = load(x, b + step_w, like)
            v6 = load(x, b + step_h, like)
            v7 = load(x, b + step_h + step_w, like)
            s0 = mul_add(v0, weighted, s0)
            s1 = mul_add(v1, weighted, s1)
            s2 = mul_add(v2, weighted, s2)
            s3 = mul_add(v3, weighted, s3)
            s4 = mul_add(v4, weighted, s4)
            s5 = mul_add(v5, weighted, s5)
            s6 = mul_add(v6, weighted, s6)
            s7 = mul_add(v7, weighted, s7)
            if need_weight:
                value = mul(v0, corner[q])
                value = mul_add(v1, corner[q + 1], value)
                value = mul_add(v2, corner[q + 2], value)
                value = mul_add(v3, corner[q + 3], value)
                value = mul_add(v4, corner[q + 4], value)
                value = mul_add(v5, corner[q + 5], value)
                value = mul_add(v6, corner[q + 6], value)
                value = mul_add(v7, corner[q + 7], value)
                store(grad_weight, k + c, mul_add(value, gradient, load(grad_weight, k + c, like)))
            c += lanes
        store_sums(dots, 8 * t, s0, s1, s2, s3, s4, s5, s6, s7)
        while c < channels:
            single = grad[g + c] * weight[k + c]
            sampled = x.dtype.type(0)
            for i in range(8):
                at = (a0 if i < 4 else b0) + (step_h if i & 2 else 0) + (step_w if i & 1 else 0) + c
                dots[8 * t + i] += x[at] * single
                sampled += x[at] * corner[q + i]
            if need_weight:
                grad_weight[k + c] += sampled * grad[g + c]
            c += 1


@_jit
def grad_volume(offset, mask, weight, grad, low, high, grad_x, s, n, first, last, c_first, c_last):
    """Add sample n's gradient to grad_x in the slices first .. last - 1, channels c_first .. c_last - 1.

    The strides of the input in `s` are those of grad_x. The caller gives no voxel and channel to two threads. What is
    added to a voxel, and in which order, does not depend on how slices and channels are shared out: the result is the
    same to the last bit for any number of threads.
    """
    taps = s.k_d * s.k_h * s.k_w
    place = np.empty(SEGMENT * 8 * taps, np.int64)
    upper = np.empty(0, grad.dtype)
    corner = np.empty(SEGMENT * 8 * taps, grad.dtype)
    count = np.empty(SEGMENT, np.int64)
    shifts = np.empty(SEGMENT * 3 * taps, offset.dtype)
    factors = np.empty(SEGMENT * taps if mask.size else 0, offset.dtype)
    lanes = 64 // grad.itemsize
    for d in range(s.out_d):
        row_d = d * s.stride_d - s.pad_d
        for h in range(s.out_h):
            row = (n * s.out_d + d) * s.out_h + h
            if low[row] >= last or high[row] < first:
                continue
            o = n * s.o_n + d * s.o_d + h * s.o_h
            m = n * s.m_n + d * s.m_d + h * s.m_h
            row_h = h * s.stride_h - s.pad_h
            for w in range(0, s.out_w, SEGMENT):
                length = min(SEGMENT, s.out_w - w)
                _fetch(offset, o + w * s.o_w, s.o_c, s.o_w, 3 * taps, length, shifts)
                if mask.size:
                    _fetch(mask, m + w * s.m_w, s.m_c, s.m_w, taps, length, factors)
                for i in range(length):
                    row_w = (w + i) * s.stride_w - s.pad_w
                    count[i] = _locate(
                        shifts, factors, n * s.x_n, row_d, row_h, row_w, s, i * taps, place, upper, corner
                    )
                g = (row * s.out_w + w) * s.channels
                c = c_first
                while c + 2 * lanes <= c_last:
                    for i in range(length):
                        _spread_taps(
                            grad_x,
                            place,
                            corner,
                            i * taps,
                            count[i],
                            first,
                            last,
                            weight,
                            grad,
                            g + i * s.channels,
                            c,
                            s,
                            vector(grad, 2),
                        )
                    c += 2 * lanes
                while c + lanes <= c_last:
                    for i in range(length):
                        _spread_taps(
                            grad_x,
                            place,
                            corner,
                            i * taps,
                            count[i],
                            first,
                            last,
                            weight,
                            grad,
                            g + i * s.channels,
                            c,
                            s,
                            vector(grad, 1),
                        )
                    c += lanes
                while c < c_last:
                    for i in range(length):
                        _spread_taps(
                            grad_x,
                            place,
                            corner,
                            i * taps,
                            count[i],
                            first,
                            last,
                            weight,
                            grad,
                            g + i * s.channels,
                            c,
                            s,
                            grad.dtype.type(0),
                        )
                    c += 1


@_jit
def _spread_taps(grad_x, place, corner, entry, count, first, last, weight, grad, g, c, s, like):
    """Add one output voxel's gradient to the corners it sampled, for the channels from c on that `like` holds."""
    gradient = load(grad, g + c, like)
    for t in range(entry, entry + count):
        q = 8 * t
        a = place[q] + c
        step_h = place[q + 2]
        step_w = place[q + 3]
        weighted = mul(gradient, load(weight, place[q + 4] * s.channels + c, like))
        if place[q + 5] >= first and place[q + 5] < last:
            _spread(grad_x, a, step_h, step_w, weighted, corner, q)
        if place[q + 6] >= first and place[q + 6] < last:
            _spread(grad_x, a + place[q + 1], step_h, step_w, weighted, corner, q + 4)


@_jit
def _spread(grad_x, a, step_h, step_w, weighted, corner, q):
    """Add to the four corners of one slice."""
    store(grad_x, a, mul_add(weighted, corner[q], load(grad_x, a, weighted)))
    a += step_w
    store(grad_x, a, mul_add(weighted, corner[q + 1], load(grad_x, a, weighted)))
    a += step_h - step_w
    store(grad_x, a, mul_add(weighted, corner[q + 2], load(grad_x, a, weighted)))
    a += step_w
    store(grad_x, a, mul_add(weighted, corner[q + 3], load(grad_x, a, weighted)))
