"""Launches of `kernels/backward_taps.cu`: the gradients of offset, mask, weight and bias of the network's layers."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from .._checks import Geometry
from .plan import (
    INT32_MAX,
    LOAD_BYTES,
    PRESET_CHANNELS,
    PRESET_DTYPES,
    Kernel,
    Strides,
    Tile,
    Tuning,
    covering,
    is_cube,
    kernel,
    loaded_at_once,
    real_bytes,
    record_bytes,
    sizes,
)
from .steps import Step

# The number of warps per multiprocessor that registers allow.
MAX_WARPS = 16
_WARP = 32
# Eleven integers, and padding to align the samples of the next warp.
_TASK_BYTES = 48
# The cost for a warp of a tile and of 32 voxels, in units of one pass over the voxels that it takes at once.
_TASK_PASSES, _BATCH_PASSES = 0.3, 0.5
# With more tiles, the rows of partial sums, one per tile and tap, would be needlessly large.
_MANY_TILES = 16384
_SUM_COLUMNS, _SUM_SLICES = 8, 32


class TapsPlan(NamedTuple):
    """The main launch, and the launch that sums its rows of partial gradients."""

    step: Step
    partial_shape: tuple[int, int, int]  # (tiles, rows, C)
    sums: Step


def taps_kernels() -> Iterator[Kernel]:
    """Yield every kernel of this module."""
    for dtype in PRESET_DTYPES:
        for channels in PRESET_CHANNELS:
            yield _taps_kernel(dtype, channels, Tuning())
    for dtype in (*PRESET_DTYPES, torch.float64):
        yield _sums_kernel(dtype)


@functools.lru_cache(maxsize=1024)
def plan_taps(
    g: Geometry,
    dtype: torch.dtype,
    addresses: int,
    offset_strides: Strides,
    mask_strides: Strides,
    with_bias: bool,
    tuning: Tuning,
    multiprocessors: int,
) -> TapsPlan | None:
    """Return the launches for a depthwise convolution, or None if it needs another kernel.

    Args:
        g: sizes of the call.
        dtype: of its tensors.
        addresses: the last four bits of the addresses of volumes and weights, or-ed together.
        offset_strides: of the offset (sample, channel, voxel).
        mask_strides: of the mask, zeros without one.
        with_bias: whether to sum the gradient of the bias, too.
        tuning: sizes of launches.
        multiprocessors: of the device.
    """
    vector = loaded_at_once(g.in_channels, dtype, addresses)
    known = dtype in PRESET_DTYPES and g.in_channels in PRESET_CHANNELS and vector * dtype.itemsize == LOAD_BYTES
    if not (tuning.fast_samples and known and is_cube(g) and g.depthwise):
        return None
    rows = g.taps + with_bias
    blocks = multiprocessors * (MAX_WARPS // tuning.taps_warps)
    tile = _tile(g, _WARP // _split(g.in_channels // vector)[0], rows, blocks, tuning)
    if tile.count * rows > INT32_MAX or g.batch * max(g.voxels, g.out_voxels) > INT32_MAX:
        return None
    step = Step(
        _taps_kernel(dtype, g.in_channels, tuning),
        min(tile.count * rows, blocks),
        (_WARP * tuning.taps_warps, 1),
        tuning.taps_warps * _warp_bytes(dtype),
        (*sizes(g), *offset_strides, *mask_strides, g.batch, *tile.arguments, int(with_bias)),
    )
    return TapsPlan(
        step, (tile.count, rows, g.in_channels), plan_sums(dtype, tile.count, g.taps, g.in_channels, with_bias)
    )


def plan_sums(dtype: torch.dtype, tiles: int, taps: int, channels: int, with_bias: bool) -> Step:
    """Return the launch that sums the rows of partial gradients of weight and bias."""
    return Step(
        _sums_kernel(dtype),
        -(-(taps + with_bias) * channels // _SUM_COLUMNS),
        (_SUM_COLUMNS, _SUM_SLICES),
        _SUM_COLUMNS * _SUM_SLICES * real_bytes(dtype),
        (tiles, taps, channels),
    )


def _split(vectors: int) -> tuple[int, int]:
    """Return (lanes, rounds) for a number of 16-byte loads: few lanes, because sums over lanes take shuffles."""
    rounds = 3 if vectors % 3 == 0 else 2 if vectors >= 8 else 1
    return vectors // rounds, rounds


def _taps_kernel(dtype: torch.dtype, channels: int, tuning: Tuning) -> Kernel:
    vector = LOAD_BYTES // dtype.itemsize
    lanes, rounds = _split(channels // vector)
    more = {"LANES": lanes, "ROUNDS": rounds, "WARPS": tuning.taps_warps}
    return kernel("backward_taps", "deform_backward_taps", dtype, vector, True, **more)


def _sums_kernel(dtype: torch.dtype) -> Kernel:
    return kernel("backward_sums", "deform_sum_rows", dtype, 1, True)


def _warp_bytes(dtype: torch.dtype) -> int:
    """Return the size of the kernel's `WarpSamples`."""
    return _WARP * (record_bytes(dtype) + real_bytes(dtype) + 4 + 1) + _TASK_BYTES


def _tile(g: Geometry, slots: int, rows: int, blocks: int, tuning: Tuning) -> Tile:
    """Return the tile that gives the busiest warp the least work; of equals, the largest."""
    best, least = None, 0.0
    for log in range(max(tuning.taps_voxels, 1).bit_length()):
        tile = _box(g, log)
        if tile.voxels != 1 << log:
            break
        passes = -(-tile.voxels // slots) + _BATCH_PASSES * -(-tile.voxels // _WARP) + _TASK_PASSES
        tasks = -(-tile.count * rows // blocks)
        cost = -(-tasks // tuning.taps_warps) * passes
        if best is None or cost <= least or best.count > _MANY_TILES:
            best, least = tile, cost
    assert best is not None
    return best


def _box(g: Geometry, log: int) -> Tile:
    """Return the nearly cubic box of 2**log voxels, or fewer if the output is smaller; it grows along w first."""
    logs = [0, 0, 0]
    while sum(logs) < log:
        free = [axis for axis in (2, 1, 0) if 1 << logs[axis] < g.out[axis]]
        if not free:
            break
        logs[min(free, key=lambda axis: logs[axis])] += 1
    return Tile((logs[0], logs[1], logs[2]), covering(g.out, g.batch, [1 << axis_log for axis_log in logs]))
