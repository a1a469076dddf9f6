"""Launches of the forward pass."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import Geometry
from . import columns as matrices
from .plan import (
    CHANNELS_LAST,
    CUBE_TAPS,
    DTYPE_CODES,
    LOAD_BYTES,
    SHARED_BYTES,
    Chunk,
    Field,
    Runtime,
    Strides,
    Tile,
    Tuning,
    blocks_for,
    check_sizes,
    chunks,
    is_cube,
    kernel,
    loaded_at_once,
    pointers,
    real_bytes,
    samples_bytes,
    sizes,
    taps_at_once,
    taps_first,
    vector_of,
)
from .steps import Step
from .walk import THREADS, walk_of

COLUMN_THREADS = 256


def forward(
    runtime: Runtime,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    g: Geometry,
) -> Tensor:
    """Return the output (N, C_out, D_out, H_out, W_out) in the input's dtype, channels-last."""
    output = _empty_output(input, g)
    if not output.numel():
        return output
    input = input.contiguous(memory_format=CHANNELS_LAST)
    if g.depthwise:
        _depthwise(runtime, input, offset, mask, None, None, weight, bias, output, g)
    else:
        _by_columns(runtime, input, Field.of(offset), Field.of(mask), weight, bias, output, g)
    return output


def forward_fused_offset(
    runtime: Runtime,
    input: Tensor,
    offset_weight: Tensor,
    offset_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    g: Geometry,
) -> Tensor:
    """Return the output; the kernel computes the offsets from offset_weight (3 * taps, C, 1, 1, 1) as it goes."""
    output = _empty_output(input, g)
    if output.numel():
        input = input.contiguous(memory_format=CHANNELS_LAST)
        channels_first = offset_weight.reshape(3 * g.taps, g.in_channels).t().contiguous()
        _depthwise(runtime, input, None, None, channels_first, offset_bias, weight, bias, output, g)
    return output


def can_fuse_offset(dtype: torch.dtype, input_shape: Sequence[int], weight_shape: Sequence[int]) -> bool:
    """Return whether `forward_fused_offset` can run: depthwise 3x3x3, a voxel's channels fit a block's memory."""
    channels = input_shape[1]
    if tuple(weight_shape) != (channels, 1, 3, 3, 3) or dtype not in DTYPE_CODES:
        return False
    return _fused_bytes(dtype, 1, CUBE_TAPS, channels) <= SHARED_BYTES


def _empty_output(input: Tensor, g: Geometry) -> Tensor:
    check_sizes(g)
    shape = (g.batch, g.out_channels, *g.out)
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=CHANNELS_LAST)


def _fused_bytes(dtype: torch.dtype, voxels: int, taps: int, channels: int) -> int:
    """Return the shared memory for samples, offsets and input of a tile; the input takes at least four voxels."""
    computed = voxels * 3 * taps + max(voxels, 4) * channels
    return samples_bytes(dtype, voxels * taps, False) + computed * real_bytes(dtype)


class _Plan(NamedTuple):
    """A launch, and the layout of the weight that its kernel reads."""

    step: Step
    walks: bool  # the weight in its own layout, and no offset branch


def _depthwise(
    runtime: Runtime,
    input: Tensor,
    offset: Tensor | None,
    mask: Tensor | None,
    offset_weight: Tensor | None,
    offset_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    output: Tensor,
    g: Geometry,
) -> None:
    shifts, factors = Field.of(offset), Field.of(mask)
    bias = None if bias is None else bias.contiguous()
    offset_bias = None if offset_bias is None else offset_bias.contiguous()
    first, last, start = pointers(input, output, bias)
    vector = loaded_at_once(g.in_channels, input.dtype, (first | last | start) % LOAD_BYTES)
    plan = plan_depthwise(
        g,
        input.dtype,
        vector,
        shifts.strides,
        None if mask is None else factors.strides,
        offset_weight is not None,
        runtime.tuning,
        runtime.multiprocessors(input.device),
    )
    factor = weight.contiguous() if plan.walks else taps_first(weight)
    addresses = (first, *pointers(shifts.tensor, factor), start, *pointers(factors.tensor), last)
    if not plan.walks:
        addresses += pointers(offset_weight, offset_bias)
    plan.step.start(runtime, input.device, *addresses)


@functools.lru_cache(maxsize=1024)
def plan_depthwise(
    g: Geometry,
    dtype: torch.dtype,
    vector: int,
    offset_strides: Strides,
    mask_strides: Strides | None,
    fused: bool,
    tuning: Tuning,
    multiprocessors: int,
) -> _Plan:
    """Return the launch of one kind of call; cached, because a network repeats the same few calls."""
    strides = (*offset_strides, *(mask_strides or (0, 0, 0)))
    walk = None if fused else walk_of(g, dtype, vector, tuning)
    if walk:
        tiles = walk.tiles(g)
        numbers = (*g.size, *strides, tiles)
        step = Step(walk.kernel, min(tiles, multiprocessors), (THREADS, 1), walk.shared_bytes, numbers)
        return _Plan(step, walks=True)
    lanes = min(g.in_channels // vector, tuning.forward_threads)
    at_once = taps_at_once(g, tuning)

    def shared(voxels: int) -> int:
        if fused:
            return _fused_bytes(dtype, voxels, g.taps, g.in_channels)
        return samples_bytes(dtype, voxels * at_once, mask_strides is not None)

    most = min(tuning.forward_voxels, tuning.forward_threads // lanes)
    tile = Tile.of(g.out, g.batch, most, multiprocessors, lambda voxels: shared(voxels) <= SHARED_BYTES)
    step = Step(
        kernel("forward", "deform_forward", dtype, vector, is_cube(g), FUSED=int(fused)),
        blocks_for(tile.count, 1),
        (lanes, tile.voxels),
        shared(tile.voxels),
        (*sizes(g), g.in_channels, *strides, *tile.arguments, at_once),
    )
    return _Plan(step, walks=False)


def _by_columns(
    runtime: Runtime,
    input: Tensor,
    shifts: Field,
    factors: Field,
    weight: Tensor,
    bias: Tensor | None,
    output: Tensor,
    g: Geometry,
) -> None:
    matrix = matrices.weight_matrix(weight, g)
    rows = output.permute(0, 2, 3, 4, 1).view(-1, g.out_channels)
    for chunk in chunks(g, g.in_channels * g.taps * input.element_size(), runtime.tuning):
        columns = write_columns(runtime, input, shifts, factors, chunk, g)
        product = matrices.ungroup_rows(torch.bmm(matrices.group_columns(columns, g), matrix))
        part = rows[chunk.first_voxel : chunk.first_voxel + chunk.voxels]
        if bias is None:
            part.copy_(product)
        else:
            torch.add(product, bias, out=part)


def write_columns(runtime: Runtime, input: Tensor, shifts: Field, factors: Field, chunk: Chunk, g: Geometry) -> Tensor:
    """Return the modulated samples of a chunk, (R, offset_groups, taps, C / offset_groups)."""
    columns = matrices.empty_columns(input, chunk.voxels, g)
    vector = vector_of(g.sampled_together, input, columns)
    items = columns.numel() // vector
    runtime.launch(
        input.device,
        kernel("columns", "deform_columns", input.dtype, vector, False),
        blocks_for(items, COLUMN_THREADS),
        (COLUMN_THREADS, 1),
        0,
        (*column_arguments(input, shifts, factors, chunk, g), columns.data_ptr()),
    )
    return columns


def column_arguments(input: Tensor, shifts: Field, factors: Field, chunk: Chunk, g: Geometry) -> tuple[int, ...]:
    """Return the kernels' COLUMN_ARGUMENTS."""
    return (
        *pointers(input, shifts.tensor, factors.tensor),
        *sizes(g),
        *(g.in_channels, *shifts.strides, *factors.strides, chunk.first_voxel, chunk.voxels, g.offset_groups),
    )
