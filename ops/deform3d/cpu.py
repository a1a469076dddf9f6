"""The CPU backend: arranges the tensors for the Numba kernels and divides the work among threads.

Threads are Python threads in kernels that release the GIL, not Numba's own: its `workqueue` layer aborts the process
when two Python threads enter it at once, its OpenMP layer aborts after a fork, and TBB is not in its wheels. A server
calls this from several threads and trains in another process. The number of threads is `torch.get_num_threads()`.

The kernels are depthwise with one offset group. Everything else goes through the reference: its time goes into one
matrix product per tap, which PyTorch already does well, and all output channels share the samples.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import _cpu_backward, _cpu_forward, reference
from ._checks import Geometry
from ._cpu_sampling import Sizes
from .reference import Gradients

# Samples of one call, channels times taps times output voxels, that take one core 0.1 to 0.2 ms.
_SHARED_FROM = 2**17


def forward(
    input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, g: Geometry
) -> Tensor:
    """Return the output (N, C_out, D_out, H_out, W_out) in the input's dtype, channels-last."""
    if not g.depthwise:
        return reference.forward(input, offset, weight, bias, mask, g)
    dtype = reference.compute_dtype(input.dtype)
    x = _channels_last(input, dtype)
    offset = offset.to(dtype)
    mask = None if mask is None else mask.to(dtype)
    bias = torch.zeros(g.out_channels, dtype=dtype) if bias is None else bias.to(dtype).contiguous()
    output = torch.empty(g.out_shape, dtype=dtype, memory_format=torch.channels_last_3d)
    if g.batch:
        inputs = (
            _flat(x, dtype),
            _flat(offset, dtype),
            _flat(mask, dtype),
            _taps_first(weight, dtype),
            _flat(bias, dtype),
        )
        arguments = (*inputs, _flat(output, dtype), _sizes(x, offset, mask, g))
        threads = _threads(g)
        units = _split(_rows(g), 4 * threads if threads > 1 else 1)
        _share(lambda first, last: _cpu_forward.forward(*arguments, first, last), units, threads)
    return output.to(input.dtype)


def backward(
    grad: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    g: Geometry,
    needs: Sequence[bool],
) -> Gradients:
    """Return the gradients that `needs` (input, offset, weight, bias, mask) asks for."""
    if not g.depthwise:
        return reference.backward(grad, input, offset, weight, mask, g, needs)
    need_input, need_offset, need_weight, need_bias, need_mask = needs
    dtype = reference.compute_dtype(input.dtype)
    grad = grad.to(dtype).contiguous(memory_format=torch.channels_last_3d)
    offset = _dense(offset.to(dtype))
    mask = None if mask is None else _dense(mask.to(dtype))
    taps_first = _taps_first(weight, dtype)

    grad_offset = torch.empty_like(offset) if need_offset else None
    grad_mask = torch.empty_like(mask) if need_mask and mask is not None else None
    grad_taps = torch.zeros(g.taps, g.in_channels, dtype=dtype) if need_weight else None
    if need_offset or need_weight or need_mask:
        _sample_gradients(grad, input, offset, taps_first, mask, g, grad_offset, grad_taps, grad_mask)
    return Gradients(
        _input_gradient(grad, input, offset, taps_first, mask, g) if need_input else None,
        None if grad_offset is None else grad_offset.to(input.dtype),
        None if grad_taps is None else grad_taps.t().reshape(weight.shape).to(input.dtype),
        grad.sum((0, 2, 3, 4)).to(input.dtype) if need_bias else None,
        None if grad_mask is None else grad_mask.to(input.dtype),
    )


def _sample_gradients(
    grad: Tensor,
    input: Tensor,
    offset: Tensor,
    taps_first: Any,
    mask: Tensor | None,
    g: Geometry,
    grad_offset: Tensor | None,
    grad_taps: Tensor | None,
    grad_mask: Tensor | None,
) -> None:
    """Fill grad_offset, grad_mask and grad_taps, the gradient of the weight as (taps, C), where given."""
    dtype = grad.dtype
    x = _channels_last(input, dtype)
    chunks = _split(_rows(g), min(64, max(2, g.batch * g.out_voxels // (4 * g.taps))))
    parts = torch.zeros(len(chunks), 0 if grad_taps is None else grad_taps.numel(), dtype=dtype)
    rows = parts.numpy()
    inputs = _flat(x, dtype), _flat(offset, dtype), _flat(mask, dtype), taps_first, _flat(grad, dtype)
    outputs = _flat(grad_offset, dtype), _flat(grad_mask, dtype)
    sizes = _sizes(x, offset, mask, g)

    def work(part: int, first: int, last: int) -> None:
        _cpu_backward.grad_samples(*inputs, *outputs, rows[part], sizes, first, last)

    _share(work, [(part, *chunk) for part, chunk in enumerate(chunks)], _threads(g))
    if grad_taps is not None:
        # Summed in the order of the chunks, whose number depends only on the shapes: equal bits for any thread count.
        torch.sum(parts, 0, out=grad_taps.view(-1))


def _input_gradient(
    grad: Tensor, input: Tensor, offset: Tensor, taps_first: Any, mask: Tensor | None, g: Geometry
) -> Tensor:
    dtype = grad.dtype
    total = torch.empty(input.shape, dtype=dtype, memory_format=torch.channels_last_3d).zero_()
    sizes = _sizes(total, offset, mask, g)
    low, high = np.empty((2, _rows(g)), np.int64)
    flat = (_flat(offset, dtype), _flat(mask, dtype), taps_first, _flat(grad, dtype), low, high, _flat(total, dtype))
    threads = _threads(g)
    reaches = _split(_rows(g), threads)
    _share(lambda first, last: _cpu_backward.reach(flat[0], sizes, first, last, low, high), reaches, threads)
    # Divide by samples first, then by channels in whole cache lines, then by slices, which repeat work at borders.
    wanted = -(-threads // max(g.batch, 1))
    by_channel = min(wanted, max(1, g.in_channels // 64))
    by_slice = min(-(-wanted // by_channel), g.size[0])
    units = [
        (n, *slices, 16 * c_first, min(16 * c_last, g.in_channels))
        for n in range(g.batch)
        for slices in _split(g.size[0], by_slice)
        for c_first, c_last in _split(-(-g.in_channels // 16), by_channel)
    ]
    _share(lambda *unit: _cpu_backward.grad_volume(*flat, sizes, *unit), units, threads)
    return total.to(input.dtype)


def _channels_last(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `tensor` with the channels of a voxel next to each other; no copy if they already are."""
    tensor = tensor.to(dtype)
    if tensor.stride(1) == 1:
        return tensor
    return tensor.contiguous(memory_format=torch.channels_last_3d)


def _dense(tensor: Tensor) -> Tensor:
    """Return `tensor` in one of the two layouts that a gradient can have."""
    if tensor.is_contiguous(memory_format=torch.channels_last_3d):
        return tensor
    return tensor.contiguous()


def _taps_first(weight: Tensor, dtype: torch.dtype) -> Any:
    """Return a depthwise weight (C, 1, kD, kH, kW) as flat (taps, C)."""
    rows = weight.detach().to(dtype).numpy().reshape(weight.shape[0], -1)
    return np.ascontiguousarray(rows.T).reshape(-1)


def _flat(tensor: Tensor | None, dtype: torch.dtype) -> Any:
    """Return the tensor's memory from its first to its last element as a flat array; an empty one for None."""
    if tensor is None or not tensor.numel():
        return _nothing(dtype)
    span = tensor.numel()
    if not (tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last_3d)):
        span = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((span,), (1,)).numpy()


@functools.cache
def _nothing(dtype: torch.dtype) -> Any:
    return torch.empty(0, dtype=dtype).numpy()


def _rows(g: Geometry) -> int:
    return g.batch * g.out[0] * g.out[1]


def _sizes(x: Tensor, offset: Tensor, mask: Tensor | None, g: Geometry) -> Sizes:
    x_n, _, x_d, x_h, x_w = x.stride()
    mask_strides = (0, 0, 0, 0, 0) if mask is None else mask.stride()
    return Sizes(
        g.in_channels,
        *g.size,
        *g.out,
        *g.kernel,
        *g.stride,
        *g.padding,
        *g.dilation,
        *(x_n, x_d, x_h, x_w),
        *offset.stride(),
        *mask_strides,
    )


def _split(count: int, parts: int) -> list[tuple[int, int]]:
    """Cut range(count) into at most `parts` ranges of nearly equal length."""
    parts = max(1, min(parts, count))
    return list(itertools.pairwise(count * i // parts for i in range(parts + 1)))


def _threads(g: Geometry) -> int:
    """Return the number of threads for a call; waking a second one takes longer than a small call."""
    return torch.get_num_threads() if g.batch * g.out_voxels * g.taps * g.in_channels >= _SHARED_FROM else 1


_pool: ThreadPoolExecutor | None = None


def _forget_pool() -> None:
    """Drop the pool in a forked process: it has none of its parent's threads and starts its own on first use."""
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def _share(work: Callable[..., None], units: Sequence[tuple[int, ...]], threads: int) -> None:
    """Call `work` once per unit, on up to `threads` threads including this one."""
    global _pool
    helpers = min(threads, len(units)) - 1
    if helpers < 1:
        for unit in units:
            work(*unit)
        return
    left = list(reversed(units))

    def take() -> None:
        while True:
            try:
                unit = left.pop()  # atomic
            except IndexError:
                return
            work(*unit)

    if _pool is None:
        _pool = ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="deform3d")
    waiting = [_pool.submit(take) for _ in range(helpers)]
    take()
    for helper in waiting:
        # A helper that has not started, because torch's own threads still spin on its core, has nothing left to do.
        if not helper.cancel():
            helper.result()
