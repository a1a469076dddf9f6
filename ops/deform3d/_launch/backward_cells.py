"""Launches of `kernels/backward_cells.cu`: the gradient of the input of a depthwise 3x3x3 convolution."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import Geometry
from ..reference import compute_dtype
from .plan import (
    DTYPE_CODES,
    GATHER_VECTOR,
    INT32_MAX,
    Kernel,
    Runtime,
    Strides,
    Tuning,
    blocks_for,
    is_cube,
    kernel,
    loaded_at_once,
    real_bytes,
    sizes,
    vectors,
)
from .steps import Step

_THREADS = 256
_WARP = 32
# A cell number and an id; a key, its sorted copy, an id of 8 bytes, and as much again for PyTorch's sort.
_SAMPLE_BYTES, _DETERMINISTIC_BYTES = 8, 32
# The cost of a segment beyond its cells, in cells.
_SEGMENT_CELLS = 0.5


class CellsPlan(NamedTuple):
    """The launches of one kind of call, in order."""

    samples: int
    rows: int
    numbers: int  # cells of a row, plus one
    keys: Step
    starts: Step
    place: Step
    slabs: tuple[Slab, ...]


class Slab(NamedTuple):
    """Slices of the gradient along d that are processed together, so that their parts fit in memory."""

    first_d: int
    edges_shape: tuple[int, ...]
    gather: Step
    add: Step


def cells_kernels() -> Iterator[Kernel]:
    """Yield every kernel of this module."""
    for dtype in DTYPE_CODES:
        for name in ("deform_cell_keys", "deform_cell_starts", "deform_cell_place"):
            yield _sort_kernel(name, dtype)
        for vector in vectors(dtype):
            if vector <= GATHER_VECTOR:
                for name in ("deform_cell_gather", "deform_add_edges"):
                    yield _vector_kernel(name, dtype, vector, Tuning())


@functools.lru_cache(maxsize=1024)
def plan_cells(
    g: Geometry,
    dtype: torch.dtype,
    addresses: int,
    offset_strides: Strides,
    mask_strides: Strides,
    deterministic: bool,
    tuning: Tuning,
    multiprocessors: int,
) -> CellsPlan | None:
    """Return the launches for a depthwise convolution, or None if it needs chunks or a general kernel.

    Args:
        g: sizes of the call.
        dtype: of its tensors.
        addresses: the last four bits of the addresses of the output's gradient and the weights, or-ed together.
        offset_strides: of the offset (sample, channel, voxel).
        mask_strides: of the mask, zeros without one.
        deterministic: whether sums must have the same order every time.
        tuning: sizes of launches.
        multiprocessors: of the device.
    """
    vector = loaded_at_once(g.in_channels, dtype, addresses, GATHER_VECTOR)
    samples, rows, numbers = g.batch * g.out_voxels * g.taps, g.batch * (g.size[0] + 1) * (g.size[1] + 1), g.size[2] + 2
    bytes_needed = samples * (_DETERMINISTIC_BYTES if deterministic else _SAMPLE_BYTES)
    fits = max(samples, rows * numbers + 1) <= INT32_MAX and bytes_needed <= tuning.cells_bytes
    if not (tuning.fast_cells and is_cube(g) and fits):
        return None
    slice_bytes = 4 * g.batch * g.size[1] * g.size[2] * g.in_channels * real_bytes(dtype)
    most = max(1, tuning.chunk_bytes // slice_bytes)
    return CellsPlan(
        samples,
        rows,
        numbers,
        *_sort_steps(g, dtype, offset_strides, samples, rows, numbers),
        tuple(
            _slab(
                g,
                dtype,
                vector,
                (*offset_strides, *mask_strides),
                first,
                min(most, g.size[0] - first),
                deterministic,
                tuning,
                multiprocessors,
            )
            for first in range(0, g.size[0], most)
        ),
    )


def _sort_steps(
    g: Geometry, dtype: torch.dtype, offset_strides: Strides, samples: int, rows: int, numbers: int
) -> tuple[Step, Step, Step]:
    """Return the launches that name or count cells, find where their samples start, and place the samples."""
    voxels = g.batch * g.out_voxels
    return (
        Step(
            _sort_kernel("deform_cell_keys", dtype),
            blocks_for(samples, _THREADS),
            (_THREADS, 1),
            0,
            (*sizes(g), *offset_strides, voxels, rows * numbers),
        ),
        Step(
            _sort_kernel("deform_cell_starts", dtype),
            blocks_for(rows, _THREADS // _WARP),
            (_THREADS, 1),
            0,
            (rows, numbers),
        ),
        Step(
            _sort_kernel("deform_cell_place", dtype),
            blocks_for(samples, _THREADS),
            (_THREADS, 1),
            0,
            (voxels, g.taps),
        ),
    )


def _slab(
    g: Geometry,
    dtype: torch.dtype,
    vector: int,
    strides: tuple[int, ...],
    first_d: int,
    depth: int,
    deterministic: bool,
    tuning: Tuning,
    multiprocessors: int,
) -> Slab:
    _, height, width = g.size
    lanes = min(g.in_channels // vector, tuning.cells_threads)
    slots = tuning.cells_threads // lanes
    band = _band(height + 1, tuning.cells_band)
    rows = g.batch * (depth + 1) * -(-(height + 1) // band) * band

    def cost(segment: int) -> float:
        """Return the number of cells that the busiest slot visits."""
        units = -(-rows * -(-width // segment) // multiprocessors)
        return -(-units // slots) * (segment + 1 + _SEGMENT_CELLS)

    segment = tuning.cells_segment or min((-(-width // parts) for parts in range(1, width + 1)), key=cost)
    within = depth * height * width * g.in_channels
    id_words = 2 if deterministic else 1  # PyTorch's sort returns 64-bit indices
    gather = Step(
        _vector_kernel("deform_cell_gather", dtype, vector, tuning),
        min(rows * -(-width // segment), multiprocessors),
        (lanes, slots),
        0,
        (*sizes(g), g.in_channels, *strides, g.batch, first_d, depth, segment, band, id_words),
    )
    add = Step(
        _vector_kernel("deform_add_edges", dtype, vector, tuning),
        blocks_for(g.batch * within // vector, _THREADS),
        (_THREADS, 1),
        0,
        (g.batch, within // vector, g.voxels * g.in_channels),
    )
    return Slab(first_d, (4, g.batch, depth, height, width, g.in_channels), gather, add)


def _band(rows: int, most: int) -> int:
    """Return the number of neighbouring rows of cells to visit together: the best fit near `most`."""
    near = range(max(1, most - most // 2), most + 1)
    return min(near, key=lambda band: (-(-rows // band) * band, -band))


def sorted_ids(
    runtime: Runtime, plan: CellsPlan, offset: Tensor, counted: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Return the ids of the samples in the order of their cells, and where each cell starts.

    Args:
        runtime: starts kernels.
        plan: of the call.
        offset: with the strides of the plan.
        counted: counts per cell and the cells of the samples, if another kernel has filled them.
    """
    device = offset.device
    if torch.are_deterministic_algorithms_enabled():
        keys = torch.empty(plan.samples, dtype=torch.int32, device=device)
        plan.keys.start(runtime, device, offset.data_ptr(), 0, 0, keys.data_ptr())
        keys, ids = torch.sort(keys, stable=True)
        numbers = torch.arange(plan.rows * plan.numbers + 1, dtype=torch.int32, device=device)
        return ids, torch.searchsorted(keys, numbers, out_int32=True)
    if counted is None:
        counts, cells = counted = empty_counts(plan, device)
        plan.keys.start(runtime, device, offset.data_ptr(), counts.data_ptr(), cells.data_ptr(), 0)
    counts, cells = counted
    starts = torch.empty(plan.rows * plan.numbers, dtype=torch.int32, device=device)
    plan.starts.start(runtime, device, counts.data_ptr(), starts.data_ptr())
    ids = torch.empty(plan.samples, dtype=torch.int32, device=device)
    plan.place.start(runtime, device, cells.data_ptr(), starts.data_ptr(), ids.data_ptr())
    return ids, starts


def empty_counts(plan: CellsPlan, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return zeroed counts per cell, and unwritten cell numbers per sample."""
    counts = torch.zeros(plan.rows * plan.numbers + 1, dtype=torch.int32, device=device)
    return counts, torch.empty(plan.samples, dtype=torch.int32, device=device)


def gather(
    runtime: Runtime,
    plan: CellsPlan,
    ids: Tensor,
    starts: Tensor,
    offset: Tensor,
    taps: Tensor,
    grad: Tensor,
    mask: Tensor | None,
    grad_input: Tensor,
) -> None:
    """Write the gradient of the input, channels-last."""
    addresses = (ids, starts, offset, taps, grad)
    for slab in plan.slabs:
        edges = torch.empty(slab.edges_shape, dtype=compute_dtype(grad.dtype), device=grad.device)
        slab.gather.start(
            runtime,
            grad.device,
            *(tensor.data_ptr() for tensor in addresses),
            0 if mask is None else mask.data_ptr(),
            edges.data_ptr(),
        )
        skipped = slab.first_d * grad_input.stride(2) * grad_input.element_size()
        slab.add.start(runtime, grad.device, edges.data_ptr(), grad_input.data_ptr() + skipped)


def _sort_kernel(name: str, dtype: torch.dtype) -> Kernel:
    """Return an instance of a kernel that reads no channels."""
    return kernel("backward_sort", name, dtype, 1, True)


def _vector_kernel(name: str, dtype: torch.dtype, vector: int, tuning: Tuning) -> Kernel:
    more = {"THREADS": tuning.cells_threads, "UNROLL": tuning.cells_unroll}
    return kernel("backward_cells", name, dtype, vector, True, **more)
