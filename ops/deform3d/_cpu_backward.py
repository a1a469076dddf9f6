"""The Numba kernels of the backward pass: what one thread does with its share of a depthwise convolution."""

# Numba infers the types here, from the arguments of each call.
# mypy: disable-error-code="no-untyped-def, arg-type"

from __future__ import annotations

import numpy as np

from ._cpu_sampling import SEGMENT, clear_outside, deliver, fetch, jit, locate
from ._cpu_simd import floor, load, mul, mul_add, store, store_sums, vector, zero


@jit
def reach(offset, s, first, last, low, high):
    """Write the input slices (along d) that each of the rows first to last - 1 samples: low[row] to high[row]."""
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


@jit
def grad_samples(x, offset, mask, weight, grad, grad_offset, grad_mask, grad_weight, s, first, last):
    """Write grad_offset and grad_mask of the rows first to last - 1, and add the share of these rows to grad_weight.

    grad_offset and grad_mask have the strides of offset and mask; an empty array means that its gradient is not needed.
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
            fetch(offset, o + w * s.o_w, s.o_c, s.o_w, 3 * taps, length, shifts)
            if mask.size:
                fetch(mask, m + w * s.m_w, s.m_c, s.m_w, taps, length, factors)
            for i in range(length):
                row_w = (w + i) * s.stride_w - s.pad_w
                e = i * taps
                count = locate(shifts, factors, n * s.x_n, row_d, row_h, row_w, s, e, place, upper, corner)
                g = (row * s.out_w + w + i) * s.channels
                _dot_taps(x, place, corner, e, count, weight, grad, g, dots, grad_weight, s.channels)
                _combine_dots(dots, place, upper, factors, e, count, taps, grad_shifts, grad_factors)
            if grad_offset.size:
                deliver(grad_shifts, grad_offset, o + w * s.o_w, s.o_c, s.o_w, 3 * taps, length)
            if grad_mask.size:
                deliver(grad_factors, grad_mask, m + w * s.m_w, s.m_c, s.m_w, taps, length)


@jit
def _combine_dots(dots, place, upper, factors, first, count, taps, grad_shifts, grad_factors):
    """Compute one output voxel's gradients of offset and mask from its products with the corners."""
    real = dots.dtype.type
    for tap in range(taps if count < taps else 0):
        grad_factors[first + tap] = real(0)
        for axis in range(3):
            grad_shifts[3 * (first + tap) + axis] = real(0)
    for t in range(count):
        q = 8 * t
        e = 8 * (first + t)
        if place[e + 7]:
            clear_outside(dots, q, place[e + 7])
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


@jit
def _dot_taps(x, place, corner, first, count, weight, grad, g, dots, grad_weight, channels):
    """Write, per tap, the products of its eight corners with grad * weight, and add to the gradient of the weight."""
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


@jit
def grad_volume(offset, mask, weight, grad, low, high, grad_x, s, n, first, last, c_first, c_last):
    """Add the gradient of sample n to grad_x, in the slices first to last - 1 and the channels c_first to c_last - 1.

    The strides of the input in `s` are those of grad_x. The caller never gives one voxel and channel to two threads.
    The summands of a voxel and their order do not depend on how slices and channels are divided: the result is the same
    to the last bit for any number of threads.
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
                fetch(offset, o + w * s.o_w, s.o_c, s.o_w, 3 * taps, length, shifts)
                if mask.size:
                    fetch(mask, m + w * s.m_w, s.m_c, s.m_w, taps, length, factors)
                for i in range(length):
                    row_w = (w + i) * s.stride_w - s.pad_w
                    count[i] = locate(
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


@jit
def _spread_taps(grad_x, place, corner, entry, count, first, last, weight, grad, g, c, s, like):
    """Add one output voxel's gradient to the corners it sampled, for as many channels from c on as `like` holds."""
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


@jit
def _spread(grad_x, a, step_h, step_w, weighted, corner, q):
    """Add to the four corners in one slice."""
    store(grad_x, a, mul_add(weighted, corner[q], load(grad_x, a, weighted)))
    a += step_w
    store(grad_x, a, mul_add(weighted, corner[q + 1], load(grad_x, a, weighted)))
    a += step_h - step_w
    store(grad_x, a, mul_add(weighted, corner[q + 2], load(grad_x, a, weighted)))
    a += step_w
    store(grad_x, a, mul_add(weighted, corner[q + 3], load(grad_x, a, weighted)))
