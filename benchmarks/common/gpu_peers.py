"""Peers of the CUDA operator: the published algorithm and `grid_sample` in PyTorch's own operations, and `tvdcn`.

All compute the 3 x 3 x 3 depthwise deformable convolution with padding 1, on any device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

TAPS = 27
Operator = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ColumnKernels:
    """The three steps for which the published code has CUDA kernels; the rest are matrix products."""

    columns: Callable[[Tensor, Tensor], Tensor]
    offset_gradient: Callable[[Tensor, Tensor, Tensor], Tensor]
    input_gradient: Callable[[Tensor, Tensor, Tensor], Tensor]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _corners(offset: Tensor) -> Iterator[tuple[Tensor, Tensor, list[Tensor]]]:
    """Yield for each corner its index into (N * voxels), weight, and slopes along d, h, w; each (27, N * voxels)."""
    batch, _, *size = offset.shape
    voxels = size[0] * size[1] * size[2]
    shifts = offset.to(compute_dtype(offset.dtype)).reshape(batch, TAPS, 3, *size)
    tap = torch.arange(TAPS, device=offset.device).view(1, TAPS, 1, 1, 1)
    place = [tap // 9, tap // 3 % 3, tap % 3]
    lows, fractions = [], []
    inside = torch.ones_like(shifts[:, :, 0], dtype=torch.bool)
    for axis in range(3):
        shape = [1, 1, 1, 1, 1]
        shape[axis + 2] = size[axis]
        centre = torch.arange(size[axis], device=offset.device).view(shape) + place[axis] - 1
        position = centre + shifts[:, :, axis]
        inside = inside & (position > -1) & (position < size[axis])
        low = position.floor()
        lows.append(low.long())
        fractions.append(position - low)
    sample = torch.arange(batch, device=offset.device).view(batch, 1, 1, 1, 1)
    for corner in range(8):
        uppers = [corner >> 2 & 1, corner >> 1 & 1, corner & 1]
        index, valid, factors = sample, inside, []
        for axis, upper in enumerate(uppers):
            at = lows[axis] + upper
            valid = valid & (at >= 0) & (at < size[axis])
            index = index * size[axis] + at.clamp(0, size[axis] - 1)
            factors.append(fractions[axis] if upper else 1 - fractions[axis])
        keep = valid.to(shifts.dtype)
        slopes = [
            (1 if upper else -1) * factors[(axis + 1) % 3] * factors[(axis + 2) % 3] * keep
            for axis, upper in enumerate(uppers)
        ]

        def rows(tensor: Tensor) -> Tensor:
            return tensor.reshape(batch, TAPS, voxels).transpose(0, 1).reshape(TAPS, batch * voxels)

        yield rows(index), rows(factors[0] * factors[1] * factors[2] * keep), [rows(slope) for slope in slopes]


def _channel_rows(volume: Tensor) -> Tensor:
    """Reshape (N, C, D, H, W) to (C, N * voxels)."""
    return volume.transpose(0, 1).reshape(volume.shape[1], -1)


def columns(input: Tensor, offset: Tensor) -> Tensor:
    """Return the sample of every channel and tap at every voxel: (C, 27, N * voxels)."""
    flat = _channel_rows(input)
    total: Tensor | None = None
    for index, weight, _ in _corners(offset):
        part = flat[:, index] * weight
        total = part if total is None else total + part
    assert total is not None
    return total.to(input.dtype)


def offset_gradient(grad_columns: Tensor, input: Tensor, offset: Tensor) -> Tensor:
    """Return (N, 81, D, H, W) from the gradient of the columns."""
    flat, axes = _channel_rows(input), [0.0, 0.0, 0.0]
    for index, _, slopes in _corners(offset):
        dot = (grad_columns.to(slopes[0].dtype) * flat[:, index]).sum(0)
        axes = [total + dot * slope for total, slope in zip(axes, slopes, strict=True)]
    batch, _, *size = offset.shape
    split = torch.stack(axes, 1).view(TAPS, 3, batch, *size)  # type: ignore[arg-type]
    return split.movedim(2, 0).reshape(offset.shape).to(offset.dtype)


def input_gradient(grad_columns: Tensor, input: Tensor, offset: Tensor) -> Tensor:
    """Return (N, C, D, H, W) from the gradient of the columns, by atomic additions."""
    batch, channels, *size = input.shape
    shape = (channels, batch * size[0] * size[1] * size[2])
    flat = torch.zeros(shape, dtype=compute_dtype(input.dtype), device=input.device)
    for index, weight, _ in _corners(offset):
        part = (grad_columns * weight).reshape(channels, -1)
        flat = flat.scatter_add(1, index.reshape(1, -1).expand(channels, -1), part)
    return flat.view(channels, batch, *size).transpose(0, 1).to(input.dtype)


EAGER = ColumnKernels(columns, offset_gradient, input_gradient)


def compiled_kernels() -> ColumnKernels:
    """Compile each step to about one kernel, as in the published code."""
    options: dict[str, Any] = {"assert_indirect_indexing": False}
    return ColumnKernels(
        *(torch.compile(f, dynamic=True, options=options) for f in (columns, offset_gradient, input_gradient))
    )


class _Im2colGemm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor, do: ColumnKernels) -> Tensor:
        ctx.save_for_backward(input, offset, weight)
        ctx.do = do
        batch, channels, *size = input.shape
        matrix, buffer = weight.view(channels, 1, TAPS), do.columns(input, offset)
        output = bias.view(-1, 1).repeat(1, buffer.shape[2])
        for group in range(channels):
            output[group : group + 1].addmm_(matrix[group], buffer[group])
        return output.view(channels, batch, *size).transpose(0, 1).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        input, offset, weight = ctx.saved_tensors
        channels, rows = weight.shape[0], _channel_rows(grads[0])
        matrix = weight.view(channels, TAPS, 1)
        buffer = rows.new_empty(channels, TAPS, rows.shape[1])
        for group in range(channels):
            torch.mm(matrix[group], rows[group : group + 1], out=buffer[group])
        by_offset = ctx.do.offset_gradient(buffer, input, offset)
        by_input = ctx.do.input_gradient(buffer, input, offset)
        del buffer
        # The columns are made a second time, as the published code does: keeping them would take their memory.
        buffer = ctx.do.columns(input, offset)
        by_weight = torch.empty_like(matrix)
        for group in range(channels):
            torch.mm(buffer[group], rows[group : group + 1].t(), out=by_weight[group])
        return by_input, by_offset, by_weight.view(weight.shape), rows.sum(1), None


def im2col_gemm(kernels: ColumnKernels = EAGER) -> Operator:
    """Return the published algorithm: a buffer of columns for all 27 taps, then one matrix product per group."""

    def run(input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return _Im2colGemm.apply(input, offset, weight, bias, kernels)

    return run


def grid_samples(input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the sum of 27 `grid_sample` calls; every spatial size is at least 2."""
    batch, _, *size = input.shape
    shifts = offset.view(batch, TAPS, 3, *size)
    output = bias.view(1, -1, 1, 1, 1)
    for tap in range(TAPS):
        coordinates = []
        for axis, place in ((2, tap % 3), (1, tap // 3 % 3), (0, tap // 9)):
            shape = [1, 1, 1, 1]
            shape[axis + 1] = size[axis]
            centre = torch.arange(size[axis], dtype=input.dtype, device=input.device).view(shape) + (place - 1)
            coordinates.append((centre + shifts[:, tap, axis]) * (2 / (size[axis] - 1)) - 1)
        sampled = F.grid_sample(input, torch.stack(coordinates, -1), padding_mode="zeros", align_corners=True)
        output = output + sampled * weight[:, 0, tap // 9, tap // 3 % 3, tap % 3].view(1, -1, 1, 1, 1)
    return output


class _Tvdcn(torch.autograd.Function):
    """The forward and backward of `tvdcn`, whose own autograd function fails without a mask or a bias."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        output: Tensor = torch.ops.tvdcn.deform_conv3d(*_tvdcn_arguments(*tensors))
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        arguments = _tvdcn_arguments(*ctx.saved_tensors)
        with torch._C._AutoDispatchBelowAutograd():
            by_input, by_weight, by_offset, _, by_bias = torch.ops.tvdcn._deform_conv3d_backward(*grads, *arguments)
        return by_input, by_offset, by_weight, by_bias


def _tvdcn_arguments(input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor) -> tuple[Any, ...]:
    ones = (1, 1, 1)
    return input, weight, offset, None, bias, ones, ones, ones, weight.shape[0]


def tvdcn_operator() -> Operator:
    """Return the operator of `tvdcn` (github.com/inspiros/tvdcn, MIT licence), which has no bfloat16.

    The wheels of 1.1.0 are linked against PyTorch 2.7 and CUDA 12.8. With PyTorch 2.11 their library lacks three
    symbols, `torch::autograd::_wrap_outputs` among them, and with a PyTorch for CUDA 13 the package refuses to load; it
    takes part where it was built from its repository against the installed PyTorch (the source distribution has no
    headers).

    Raises:
        ImportError: it is not installed, or it cannot be loaded; the message says which.
    """
    try:
        import tvdcn
    except ModuleNotFoundError as error:
        raise ImportError("tvdcn is not installed") from error
    except (ImportError, OSError, RuntimeError) as error:
        raise ImportError(f"tvdcn cannot be loaded: {error}") from error
    if not tvdcn.has_ops():
        raise ImportError(
            f"tvdcn {tvdcn.__version__} cannot be loaded: its compiled library was not built for "
            f"PyTorch {torch.__version__}; build it from its repository"
        )

    def run(*tensors: Tensor) -> Tensor:
        output: Tensor = _Tvdcn.apply(*tensors)
        return output

    return run
