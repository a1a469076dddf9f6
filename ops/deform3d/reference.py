"""The oracle: deformable convolution in plain PyTorch, one kernel tap after another.

It is slow and obvious, and works for every floating dtype, device, group and mask. The other backends are tested
against it. `forward` is differentiable by autograd; `backward` computes the same gradients explicitly, so that training
needs the memory of one tap instead of all taps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import Geometry


class Gradients(NamedTuple):
    """Gradients in argument order; None if not requested."""

    input: Tensor | None
    offset: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    mask: Tensor | None


class _Corner(NamedTuple):
    rows: Tensor  # (N * offset_groups * P,) the rows of `_to_rows` to read
    weight: Tensor  # (N * offset_groups * P,) trilinear weight, zero outside the volume
    slopes: tuple[Tensor, Tensor, Tensor]  # derivatives of `weight` by the position along d, h, w


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that sums are computed in: float32 for half types, else `dtype`."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def forward(
    input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, g: Geometry
) -> Tensor:
    """Return the output (N, C_out, D_out, H_out, W_out) in the input's dtype, contiguous."""
    dtype = compute_dtype(input.dtype)
    rows = _to_rows(input.to(dtype), g)
    kernel = weight.to(dtype).reshape(g.groups, g.out_channels // g.groups, g.in_channels // g.groups, g.taps)
    output = rows.new_zeros(g.batch, g.groups, g.out_channels // g.groups, g.out_voxels)
    for tap in range(g.taps):
        sampled = _interpolate(rows, _corners(offset.to(dtype), tap, g))
        column = _to_channels(_modulate(sampled, mask, tap, g), g)
        output = output + torch.einsum("goi,ngip->ngop", kernel[..., tap], column)
    output = output.reshape(g.batch, g.out_channels, *g.out)
    if bias is not None:
        output = output + bias.to(dtype).view(1, -1, 1, 1, 1)
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
    need_input, need_offset, need_weight, need_bias, need_mask = needs
    dtype = compute_dtype(input.dtype)
    rows = _to_rows(input.to(dtype), g)
    kernel = weight.to(dtype).reshape(g.groups, g.out_channels // g.groups, g.in_channels // g.groups, g.taps)
    grad_out = grad.to(dtype).reshape(g.batch, g.groups, g.out_channels // g.groups, g.out_voxels)

    grad_rows = torch.zeros_like(rows)
    grad_offset = rows.new_zeros(g.batch, g.offset_groups, g.taps, 3, g.out_voxels)
    grad_kernel = torch.zeros_like(kernel)
    grad_mask = rows.new_zeros(g.batch, g.offset_groups, g.taps, g.out_voxels)
    per_voxel = (g.batch, g.offset_groups, g.out_voxels)
    for tap in range(g.taps):
        corners = list(_corners(offset.to(dtype), tap, g))
        sampled = _interpolate(rows, corners)
        if need_weight:
            column = _to_channels(_modulate(sampled, mask, tap, g), g)
            grad_kernel[..., tap] = torch.einsum("ngop,ngip->goi", grad_out, column)
        grad_column = _from_channels(torch.einsum("goi,ngop->ngip", kernel[..., tap], grad_out), g)
        if need_mask:
            grad_mask[:, :, tap] = (grad_column * sampled).sum(1).view(per_voxel)
        grad_column = _modulate(grad_column, mask, tap, g)
        for corner in corners:
            if need_input:
                grad_rows.index_add_(0, corner.rows, grad_column * corner.weight[:, None])
            if need_offset:
                dot = (grad_column * rows[corner.rows]).sum(1)
                for axis in range(3):
                    grad_offset[:, :, tap, axis] += (dot * corner.slopes[axis]).view(per_voxel)
    return Gradients(
        _from_rows(grad_rows, g).to(input.dtype) if need_input else None,
        grad_offset.reshape(offset.shape).to(input.dtype) if need_offset else None,
        grad_kernel.reshape(weight.shape).to(input.dtype) if need_weight else None,
        grad_out.sum((0, 3)).reshape(-1).to(input.dtype) if need_bias else None,
        grad_mask.reshape(g.batch, g.offset_groups * g.taps, *g.out).to(input.dtype) if need_mask else None,
    )


def _to_rows(input: Tensor, g: Geometry) -> Tensor:
    """Reshape (N, C, D, H, W) to (N * offset_groups * D * H * W, C / offset_groups): one row per voxel."""
    split = input.reshape(g.batch, g.offset_groups, g.sampled_together, g.voxels).transpose(2, 3)
    return split.reshape(g.batch * g.offset_groups * g.voxels, g.sampled_together)


def _from_rows(rows: Tensor, g: Geometry) -> Tensor:
    split = rows.view(g.batch, g.offset_groups, g.voxels, g.sampled_together).transpose(2, 3)
    return split.reshape(g.batch, g.in_channels, *g.size)


def _to_channels(rows: Tensor, g: Geometry) -> Tensor:
    """Reshape (N * offset_groups * P, C / offset_groups) to (N, groups, C / groups, P)."""
    split = rows.view(g.batch, g.offset_groups, g.out_voxels, g.sampled_together).transpose(2, 3)
    return split.reshape(g.batch, g.groups, g.in_channels // g.groups, g.out_voxels)


def _from_channels(column: Tensor, g: Geometry) -> Tensor:
    split = column.reshape(g.batch, g.offset_groups, g.sampled_together, g.out_voxels).transpose(2, 3)
    return split.reshape(g.batch * g.offset_groups * g.out_voxels, g.sampled_together)


def _modulate(rows: Tensor, mask: Tensor | None, tap: int, g: Geometry) -> Tensor:
    if mask is None:
        return rows
    factors = mask.reshape(g.batch, g.offset_groups, g.taps, g.out_voxels)[:, :, tap]
    return rows * factors.reshape(-1, 1).to(rows.dtype)


def _interpolate(rows: Tensor, corners: Sequence[_Corner] | Iterator[_Corner]) -> Tensor:
    total: Tensor | None = None
    for corner in corners:
        part = rows[corner.rows] * corner.weight[:, None]
        total = part if total is None else total + part
    assert total is not None
    return total


def _corners(offset: Tensor, tap: int, g: Geometry) -> Iterator[_Corner]:
    """Yield the eight voxels around each sampling position of one tap; zero outside the volume, as in torchvision."""
    _, k_h, k_w = g.kernel
    tap_index = (tap // (k_h * k_w), tap // k_w % k_h, tap % k_w)
    shifts = offset.reshape(g.batch, g.offset_groups, g.taps, 3, *g.out)[:, :, tap]

    floors, fractions, inside = [], [], torch.ones_like(shifts[:, :, 0], dtype=torch.bool)
    for axis in range(3):
        centre = torch.arange(g.out[axis], device=offset.device) * g.stride[axis] - g.padding[axis]
        centre = (centre + tap_index[axis] * g.dilation[axis]).to(offset.dtype)
        position = centre.view([-1 if i == axis else 1 for i in range(3)]) + shifts[:, :, axis]
        # A position that is not finite, or a voxel or more outside, samples nothing: comparisons are false for NaN.
        inside = inside & (position >= -1) & (position < g.size[axis])
        position = torch.where(inside, position, torch.zeros_like(position))
        floors.append(position.detach().floor())
        fractions.append(position - floors[-1])

    sample = torch.arange(g.batch * g.offset_groups, device=offset.device) * g.voxels
    for corner in range(8):
        index = torch.zeros_like(floors[0], dtype=torch.int64)
        valid = inside
        factors, signs = [], []
        for axis in range(3):
            upper = corner >> (2 - axis) & 1
            place = floors[axis].long() + upper
            valid = valid & (place >= 0) & (place < g.size[axis])
            index = index * g.size[axis] + place.clamp(0, g.size[axis] - 1)
            factors.append(fractions[axis] if upper else 1 - fractions[axis])
            signs.append(1 if upper else -1)
        keep = valid.to(offset.dtype)
        yield _Corner(
            rows=(index + sample.view(g.batch, g.offset_groups, 1, 1, 1)).reshape(-1),
            weight=(factors[0] * factors[1] * factors[2] * keep).reshape(-1),
            slopes=(
                (signs[0] * factors[1] * factors[2] * keep).reshape(-1),
                (signs[1] * factors[0] * factors[2] * keep).reshape(-1),
                (signs[2] * factors[0] * factors[1] * keep).reshape(-1),
            ),
        )
