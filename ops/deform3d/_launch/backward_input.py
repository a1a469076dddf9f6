"""Launches of `kernels/backward_input.cu`: the gradient of the input for every convolution, in chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import Geometry
from ..reference import compute_dtype
from .plan import (
    CHANNELS_LAST,
    GATHER_VECTOR,
    Chunk,
    Field,
    Runtime,
    blocks_for,
    cells_per_sample,
    chunks,
    is_cube,
    kernel,
    pointers,
    record_bytes,
    sizes,
    sort_kernel,
    vector_of,
)

_SORT_THREADS = 256


class InputGradient:
    """The gradient of the input of one call, summed chunk by chunk from samples that are sorted by cell.

    Args:
        runtime: starts kernels.
        grad: gradient of the output, channels-last.
        input: channels-last.
        shifts: the offset.
        factors: the mask.
        g: sizes of the call.
    """

    def __init__(
        self, runtime: Runtime, grad: Tensor, input: Tensor, shifts: Field, factors: Field, g: Geometry
    ) -> None:
        self._runtime = runtime
        self._grad = grad
        self._input = input
        self._shifts = shifts
        self._factors = factors
        self._g = g
        self._total: Tensor | None = None

    @property
    def total(self) -> Tensor:
        """Return the gradient, channels-last, once every chunk has been added."""
        assert self._total is not None
        return self._total.to(self._input.dtype)

    def chunks(self, more_bytes: int) -> list[Chunk]:
        """Return the chunks of the output; each may take `more_bytes` per voxel besides the sorted samples."""
        g = self._g
        per_sample = record_bytes(self._input.dtype) + torch.int32.itemsize
        return list(chunks(g, g.offset_groups * g.taps * per_sample + more_bytes, self._runtime.tuning))

    def add(self, chunk: Chunk, *, taps: Tensor | None = None, columns: Tensor | None = None) -> None:
        """Add the gradients of one chunk: weight taps times the output's gradient, or rows of columns."""
        g, real = self._g, compute_dtype(self._input.dtype)
        if self._total is None:
            self._total = self._empty_total(chunk)
        starts, records = self._sorted(chunk)
        own = self._total[chunk.first_sample : chunk.first_sample + chunk.samples].permute(0, 2, 3, 4, 1)
        slice_bytes = 4 * chunk.samples * g.size[1] * g.size[2] * g.in_channels * real.itemsize
        most = max(1, self._runtime.tuning.chunk_bytes // slice_bytes)
        for first in range(0, g.size[0], most):
            part = own[:, first : first + most]
            edges = torch.empty((4, *part.shape), dtype=real, device=part.device)
            self._gather_slab(chunk, edges, first, starts, records, taps, columns)
            if chunk.whole:
                part.copy_(edges.sum(0))
            else:
                part += edges.sum(0)

    def _empty_total(self, chunk: Chunk) -> Tensor:
        """Return an unwritten gradient if chunks of whole samples write it, else zeros in the dtype of the sums."""
        input = self._input
        dtype = input.dtype if chunk.whole else compute_dtype(input.dtype)
        total = torch.empty(input.shape, dtype=dtype, device=input.device, memory_format=CHANNELS_LAST)
        return total if chunk.whole else total.zero_()

    def _gather_slab(
        self,
        chunk: Chunk,
        edges: Tensor,
        first_d: int,
        starts: Tensor,
        records: Tensor,
        taps: Tensor | None,
        columns: Tensor | None,
    ) -> None:
        """Write the parts of the gradient, (4, samples, slices, H, W, C), for the slices from first_d on."""
        g, tuning, dtype = self._g, self._runtime.tuning, self._input.dtype
        read = (columns,) if taps is None else (self._grad, taps)
        vector = vector_of(g.sampled_together, *read, most=GATHER_VECTOR)
        lanes = min(g.in_channels // vector, tuning.gather_threads)
        at_once = tuning.gather_threads // lanes
        depth = edges.shape[2]
        rows = chunk.samples * (depth + 1) * (g.size[1] + 1)
        segment = tuning.gather_segment
        # Shorter segments repeat more cells, but keep every multiprocessor busy when there are few rows.
        wanted = tuning.gather_blocks * self._runtime.multiprocessors(self._input.device) * at_once
        while segment > 1 and rows * -(-g.size[2] // segment) < wanted:
            segment //= 2
        rows *= -(-g.size[2] // segment)
        self._runtime.launch(
            self._input.device,
            kernel(
                "backward_input",
                "deform_gather",
                dtype,
                vector,
                columns is None and is_cube(g),
                COLUMNS=int(columns is not None),
            ),
            blocks_for(rows, at_once),
            (lanes, at_once),
            0,
            (
                *pointers(records, starts, taps, self._grad, columns, self._factors.tensor, edges),
                *sizes(g),
                *(g.in_channels, chunk.first_voxel, g.offset_groups, *self._factors.strides),
                *(chunk.samples, first_d, depth, segment),
            ),
        )

    def _sorted(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """Return where the samples of each cell start, and the records of the samples in that order."""
        g, dtype, device = self._g, self._input.dtype, self._input.device
        count = chunk.voxels * g.offset_groups * g.taps
        cells = chunk.samples * cells_per_sample(g)
        records = torch.empty(count * record_bytes(dtype), dtype=torch.uint8, device=device)
        if torch.are_deterministic_algorithms_enabled():
            keys = torch.empty(count, dtype=torch.int32, device=device)
            self._sort_launch("deform_count", chunk, cells, (0, 0, keys.data_ptr()))
            keys, order = torch.sort(keys, stable=True)
            numbers = torch.arange(cells + 1, dtype=torch.int32, device=device)
            starts = torch.searchsorted(keys, numbers, out_int32=True)
            self._sort_launch("deform_place", chunk, cells, pointers(starts, None, order, records))
            return starts, records
        counts = torch.zeros(cells, dtype=torch.int32, device=device)
        ranks = torch.empty(count, dtype=torch.int32, device=device)
        self._sort_launch("deform_count", chunk, cells, pointers(counts, ranks, None))
        starts = torch.zeros(cells + 1, dtype=torch.int32, device=device)
        torch.cumsum(counts, 0, dtype=torch.int32, out=starts[1:])
        self._sort_launch("deform_place", chunk, cells, pointers(starts, ranks, None, records))
        return starts, records

    def _sort_launch(self, name: str, chunk: Chunk, cells: int, more: tuple[int, ...]) -> None:
        g = self._g
        count = chunk.voxels * g.offset_groups * g.taps
        self._runtime.launch(
            self._input.device,
            sort_kernel(name, self._input.dtype, is_cube(g) and g.depthwise),
            blocks_for(count, _SORT_THREADS),
            (_SORT_THREADS, 1),
            0,
            (
                *pointers(self._shifts.tensor),
                *sizes(g),
                *(*self._shifts.strides, chunk.first_sample, chunk.first_voxel, chunk.voxels, g.offset_groups, cells),
                *more,
            ),
        )
