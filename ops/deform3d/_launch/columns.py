"""Convolutions that mix channels: rows of samples for PyTorch's matrix product, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import Geometry


def weight_matrix(weight: Tensor, g: Geometry) -> Tensor:
    """Return the weight as (groups, samples per group, C_out / groups), samples ordered as in the columns."""
    if g.groups == 1:
        # (C_out, offset_groups, C / offset_groups, taps) -> offset group, tap, channel: as in the columns.
        split = weight.reshape(g.out_channels, g.offset_groups, g.sampled_together, g.taps)
        return split.permute(1, 3, 2, 0).reshape(1, g.in_channels * g.taps, g.out_channels)
    split = weight.reshape(g.groups, g.out_channels // g.groups, g.in_channels // g.groups * g.taps)
    return split.transpose(1, 2)


def weight_from_matrix(matrix: Tensor, g: Geometry) -> Tensor:
    """Undo `weight_matrix`: (groups, samples per group, C_out / groups) -> (C_out, C_in / groups, kD, kH, kW)."""
    shape = (g.out_channels, g.in_channels // g.groups, *g.kernel)
    if g.groups == 1:
        split = matrix.view(g.offset_groups, g.taps, g.sampled_together, g.out_channels)
        return split.permute(3, 0, 2, 1).reshape(shape)
    return matrix.transpose(1, 2).reshape(shape)


def group_columns(columns: Tensor, g: Geometry) -> Tensor:
    """Reshape columns (R, offset_groups, taps, C / offset_groups) to (groups, R, samples per group)."""
    rows = columns.shape[0]
    if g.groups == 1:
        return columns.view(1, rows, -1)
    channels_first = columns.permute(0, 1, 3, 2).reshape(rows, g.groups, g.in_channels // g.groups * g.taps)
    return channels_first.transpose(0, 1)


def ungroup_columns(grouped: Tensor, g: Geometry) -> Tensor:
    """Undo `group_columns`; the result is contiguous."""
    rows = grouped.shape[1]
    if g.groups == 1:
        return grouped.reshape(rows, g.offset_groups, g.taps, g.sampled_together)
    channels_first = grouped.transpose(0, 1).reshape(rows, g.offset_groups, g.sampled_together, g.taps)
    return channels_first.permute(0, 1, 3, 2).contiguous()


def group_rows(output: Tensor, g: Geometry) -> Tensor:
    """Reshape rows of the output or of its gradient (R, C_out) to (groups, R, C_out / groups)."""
    return output.view(-1, g.groups, g.out_channels // g.groups).transpose(0, 1)


def ungroup_rows(grouped: Tensor) -> Tensor:
    """Undo `group_rows`: (groups, R, C_out / groups) -> (R, C_out)."""
    return grouped.transpose(0, 1).reshape(grouped.shape[1], -1)


def empty_columns(like: Tensor, rows: int, g: Geometry) -> Tensor:
    """Return unwritten columns (R, offset_groups, taps, C / offset_groups)."""
    return torch.empty((rows, g.offset_groups, g.taps, g.sampled_together), dtype=like.dtype, device=like.device)
