"""Launches of the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._checks import Geometry
from ..reference import Gradients, compute_dtype
from . import columns as matrices
from .backward_cells import CellsPlan, empty_counts, gather, plan_cells, sorted_ids
from .backward_taps import TapsPlan, plan_taps
from .forward import COLUMN_THREADS, column_arguments, write_columns
from .plan import (
    GATHER_VECTOR,
    LAST,
    LOAD_BYTES,
    SHARED_BYTES,
    Chunk,
    Field,
    Runtime,
    Tile,
    blocks_for,
    cells_per_sample,
    check_sizes,
    chunks,
    is_cube,
    kernel,
    pointers,
    real_bytes,
    record_bytes,
    samples_bytes,
    sizes,
    sort_kernel,
    taps_at_once,
    taps_first,
    vector_of,
)

_SORT_THREADS = 256
_WARP = 32


def backward(
    runtime: Runtime,
    grad: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    g: Geometry,
    needs: Sequence[bool],
) -> Gradients:
    """Return the gradients that `needs` (input, offset, weight, bias, mask) asks for."""
    check_sizes(g)
    if not grad.numel():
        return _of_nothing(input, offset, weight, mask, g, needs)
    need_input, need_offset, need_weight, need_bias, need_mask = needs
    call = _Call(
        runtime,
        grad.contiguous(memory_format=LAST),
        input.contiguous(memory_format=LAST),
        Field.of(offset),
        Field.of(mask),
        weight,
        g,
    )
    grad_offset = call.shifts.like() if need_offset else None
    grad_mask = call.factors.like() if need_mask else None
    if g.depthwise:
        grad_input, grad_weight, grad_bias = call.depthwise(grad_offset, grad_mask, need_input, need_weight, need_bias)
    else:
        grad_input, grad_weight = call.by_columns(grad_offset, grad_mask, need_input, need_weight)
        grad_bias = call.bias_gradient() if need_bias else None
    return Gradients(grad_input, grad_offset, grad_weight, grad_bias, grad_mask)


def _of_nothing(
    input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None, g: Geometry, needs: Sequence[bool]
) -> Gradients:
    """Return the gradients where nothing was put out: what they sum over is empty."""
    bias = weight.new_empty((g.out_channels,))
    leaves = (input, offset, weight, bias, mask)
    return Gradients(
        *(
            torch.zeros_like(leaf) if need and leaf is not None else None
            for leaf, need in zip(leaves, needs, strict=True)
        )
    )


@dataclass(frozen=True)
class _Call:
    """One backward: the forward's tensors as the kernels read them."""

    runtime: Runtime
    grad: Tensor
    input: Tensor
    shifts: Field
    factors: Field
    weight: Tensor
    g: Geometry

    # ------------------------------------------------------------------------------------------------ depthwise

    def depthwise(
        self,
        grad_offset: Tensor | None,
        grad_mask: Tensor | None,
        need_input: bool,
        need_weight: bool,
        need_bias: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Write the gradients of offset and mask; return those of input, weight and bias."""
        taps = taps_first(self.weight)
        cells = self._plan_cells(taps) if need_input else None
        counted = grad_weight = grad_bias = grad_input = None
        if grad_offset is not None or need_weight or grad_mask is not None:
            plan = self._plan_taps(taps, need_weight and need_bias)
            if plan is None:
                grad_weight = self._samples(taps, grad_offset, grad_mask, need_weight)
            else:
                counts = self.runtime.tuning.count_in_taps and not torch.are_deterministic_algorithms_enabled()
                if cells is not None and counts:
                    counted = empty_counts(cells, taps.device)
                grad_weight, grad_bias = self._taps(plan, taps, grad_offset, grad_mask, counted, need_weight, need_bias)
        if need_bias and grad_bias is None:
            grad_bias = self.bias_gradient()
        if cells is not None:
            grad_input = self._by_cells(cells, taps, counted)
        elif need_input:
            grad_input = self._input_gradient(taps)
        return grad_input, grad_weight, grad_bias

    def bias_gradient(self) -> Tensor:
        """Return the sum of the output's gradient over all voxels."""
        return self.grad.sum((0, 2, 3, 4), dtype=compute_dtype(self.grad.dtype)).to(self.grad.dtype)

    def _plan_taps(self, taps: Tensor, with_bias: bool) -> TapsPlan | None:
        g = self.g
        return plan_taps(
            g,
            taps.dtype,
            (self.input.data_ptr() | self.grad.data_ptr() | taps.data_ptr()) % LOAD_BYTES,
            self.shifts.strides,
            self.factors.strides,
            with_bias,
            self.runtime.tuning,
            self.runtime.multiprocessors(taps.device),
        )

    def _taps(
        self,
        plan: TapsPlan,
        taps: Tensor,
        grad_offset: Tensor | None,
        grad_mask: Tensor | None,
        counted: tuple[Tensor, Tensor] | None,
        need_weight: bool,
        need_bias: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Write the gradients of offset and mask; return those of weight and, if both are needed, bias."""
        device, partial, grad_weight, grad_bias = taps.device, None, None, None
        if need_weight:
            partial = torch.empty(plan.partial_shape, dtype=compute_dtype(taps.dtype), device=device)
            grad_weight = torch.empty_like(self.weight, memory_format=torch.contiguous_format)
            grad_bias = taps.new_empty((self.g.out_channels,)) if need_bias else None
        tensors = (
            self.input,
            self.shifts.tensor,
            taps,
            self.factors.tensor,
            self.grad,
            grad_offset,
            grad_mask,
            partial,
        )
        plan.step.start(self.runtime, device, *pointers(*tensors, *(counted or (None, None))))
        if partial is not None:
            plan.sums.start(self.runtime, device, *pointers(partial, grad_weight, grad_bias))
        return grad_weight, grad_bias

    def _plan_cells(self, taps: Tensor) -> CellsPlan | None:
        return plan_cells(
            self.g,
            taps.dtype,
            (self.grad.data_ptr() | taps.data_ptr()) % LOAD_BYTES,
            self.shifts.strides,
            self.factors.strides,
            torch.are_deterministic_algorithms_enabled(),
            self.runtime.tuning,
            self.runtime.multiprocessors(taps.device),
        )

    def _by_cells(self, plan: CellsPlan, taps: Tensor, counted: tuple[Tensor, Tensor] | None) -> Tensor:
        """Return the gradient of the input."""
        offset = self.shifts.tensor
        assert offset is not None
        ids, starts = sorted_ids(self.runtime, plan, offset, counted)
        grad_input = torch.empty(self.input.shape, dtype=taps.dtype, device=taps.device, memory_format=LAST)
        gather(self.runtime, plan, ids, starts, offset, taps, self.grad, self.factors.tensor, grad_input)
        return grad_input

    def _samples(
        self, taps: Tensor, grad_offset: Tensor | None, grad_mask: Tensor | None, need_weight: bool
    ) -> Tensor | None:
        """Write the gradients of offset and mask; return the weight's."""
        g, tuning, dtype = self.g, self.runtime.tuning, self.input.dtype
        vector = vector_of(g.in_channels, self.input, self.grad, taps)
        at_once = taps_at_once(g, tuning)
        masked = self.factors.tensor is not None

        def shared(voxels: int) -> int:
            slots = voxels * at_once
            return samples_bytes(dtype, slots, masked) + (3 + masked) * slots * real_bytes(dtype)

        busy = self.runtime.multiprocessors(self.input.device)
        tile = Tile.of(g.out, g.batch, tuning.samples_voxels, busy, lambda voxels: shared(voxels) <= SHARED_BYTES)
        blocks = min(tile.count, tuning.samples_blocks * busy)
        partial = None
        if need_weight:
            shape = (blocks, g.taps, g.in_channels)
            partial = torch.zeros(shape, dtype=compute_dtype(dtype), device=self.input.device)
        self.runtime.launch(
            self.input.device,
            kernel("backward_samples", "deform_backward_samples", dtype, vector, is_cube(g)),
            blocks,
            (_WARP * tuning.samples_warps, 1),
            shared(tile.voxels),
            (
                *pointers(self.input, self.shifts.tensor, taps, self.factors.tensor, self.grad),
                *pointers(grad_offset, grad_mask, partial),
                *sizes(g),
                *(g.in_channels, *self.shifts.strides, *self.factors.strides, *tile.arguments, at_once),
                _lanes(g.in_channels // vector),
            ),
        )
        if partial is None:
            return None
        return partial.sum(0).t().reshape(self.weight.shape).to(dtype)

    def _input_gradient(self, taps: Tensor) -> Tensor:
        """Return the gradient of the input, gathered from the samples sorted by cell."""
        grad_input: Tensor | None = None
        for chunk in self._chunks(0):
            grad_input = self._gather(chunk, grad_input, taps=taps)
        assert grad_input is not None
        return grad_input.to(self.input.dtype)

    # --------------------------------------------------------------------------------- convolutions that mix channels

    def by_columns(
        self, grad_offset: Tensor | None, grad_mask: Tensor | None, need_input: bool, need_weight: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Write the gradients of offset and mask; return those of input and weight."""
        g, real = self.g, compute_dtype(self.input.dtype)
        matrix = matrices.weight_matrix(self.weight, g)
        grad_matrix = torch.zeros(matrix.shape, dtype=real, device=matrix.device) if need_weight else None
        rows = self.grad.permute(0, 2, 3, 4, 1).view(-1, g.out_channels)
        grad_input: Tensor | None = None
        for chunk in self._chunks(2 * g.in_channels * g.taps * self.input.element_size()):
            part = matrices.group_rows(rows[chunk.first_voxel : chunk.first_voxel + chunk.voxels], g)
            if grad_matrix is not None:
                columns = write_columns(self.runtime, self.input, self.shifts, self.factors, chunk, g)
                grad_matrix += torch.bmm(matrices.group_columns(columns, g).transpose(1, 2), part)
                del columns
            columns = matrices.ungroup_columns(torch.bmm(part, matrix.transpose(1, 2)), g)
            if grad_offset is not None or grad_mask is not None:
                self._columns_backward(columns, grad_offset, grad_mask, chunk)
            if need_input:
                grad_input = self._gather(chunk, grad_input, columns=columns)
        grad_weight = None
        if grad_matrix is not None:
            grad_weight = matrices.weight_from_matrix(grad_matrix, g).to(self.weight.dtype)
        return None if grad_input is None else grad_input.to(self.input.dtype), grad_weight

    def _columns_backward(
        self, columns: Tensor, grad_offset: Tensor | None, grad_mask: Tensor | None, chunk: Chunk
    ) -> None:
        ids = chunk.voxels * self.g.offset_groups * self.g.taps
        self.runtime.launch(
            self.input.device,
            kernel(
                "columns",
                "deform_columns_backward",
                self.input.dtype,
                vector_of(self.g.sampled_together, self.input, columns),
                False,
            ),
            blocks_for(ids * _WARP, COLUMN_THREADS),
            (COLUMN_THREADS, 1),
            0,
            (
                *column_arguments(self.input, self.shifts, self.factors, chunk, self.g),
                *pointers(columns, grad_offset, grad_mask),
            ),
        )

    # ---------------------------------------------------------------------------------- the gradient of the input

    def _chunks(self, more_bytes: int) -> list[Chunk]:
        per_sample = record_bytes(self.input.dtype) + torch.int32.itemsize
        return list(chunks(self.g, self.g.offset_groups * self.g.taps * per_sample + more_bytes, self.runtime.tuning))

    def _gather(
        self, chunk: Chunk, grad_input: Tensor | None, *, taps: Tensor | None = None, columns: Tensor | None = None
    ) -> Tensor:
        """Add the gradients from one chunk; `grad_input` is None before the first."""
        g, tuning, real = self.g, self.runtime.tuning, compute_dtype(self.input.dtype)
        if grad_input is None:
            # A chunk of whole samples writes theirs; parts of a sample add to it, in the type of the sums.
            kind = self.input.dtype if chunk.whole else real
            grad_input = torch.empty(self.input.shape, dtype=kind, device=self.input.device, memory_format=LAST)
            if not chunk.whole:
                grad_input.zero_()
        starts, records = self._sorted(chunk)
        own = grad_input[chunk.first_sample : chunk.first_sample + chunk.samples].permute(0, 2, 3, 4, 1)
        slice_bytes = 4 * chunk.samples * g.size[1] * g.size[2] * g.in_channels * real.itemsize
        most = max(1, tuning.chunk_bytes // slice_bytes)
        for first in range(0, g.size[0], most):
            part = own[:, first : first + most]
            edges = torch.empty((4, *part.shape), dtype=real, device=part.device)
            self._gather_slab(chunk, edges, first, starts, records, taps, columns)
            if chunk.whole:
                part.copy_(edges.sum(0))
            else:
                part += edges.sum(0)
        return grad_input

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
        """Write the parts of the input's gradient, (4, samples, slices, H, W, C), of the slices from first_d on."""
        g, tuning, dtype = self.g, self.runtime.tuning, self.input.dtype
        read = (columns,) if taps is None else (self.grad, taps)
        vector = vector_of(g.sampled_together, *read, most=GATHER_VECTOR)
        lanes = min(g.in_channels // vector, tuning.gather_threads)
        at_once = tuning.gather_threads // lanes
        depth = edges.shape[2]
        rows = chunk.samples * (depth + 1) * (g.size[1] + 1)
        segment = tuning.gather_segment
        # Shorter segments repeat more cells, but leave no multiprocessor idle where there are few rows.
        wanted = tuning.gather_blocks * self.runtime.multiprocessors(self.input.device) * at_once
        while segment > 1 and rows * -(-g.size[2] // segment) < wanted:
            segment //= 2
        rows *= -(-g.size[2] // segment)
        self.runtime.launch(
            self.input.device,
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
                *pointers(records, starts, taps, self.grad, columns, self.factors.tensor, edges),
                *sizes(g),
                *(g.in_channels, chunk.first_voxel, g.offset_groups, *self.factors.strides),
                *(chunk.samples, first_d, depth, segment),
            ),
        )

    def _sorted(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """Return where each cell's samples start, and the samples' records in that order."""
        g, dtype, device = self.g, self.input.dtype, self.input.device
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
        g = self.g
        count = chunk.voxels * g.offset_groups * g.taps
        self.runtime.launch(
            self.input.device,
            sort_kernel(name, self.input.dtype, is_cube(g) and g.depthwise),
            blocks_for(count, _SORT_THREADS),
            (_SORT_THREADS, 1),
            0,
            (
                *pointers(self.shifts.tensor),
                *sizes(g),
                *(*self.shifts.strides, chunk.first_sample, chunk.first_voxel, chunk.voxels, g.offset_groups, cells),
                *more,
            ),
        )


def _lanes(vectors: int) -> int:
    """Return how many lanes, a power of two, share a voxel's channels so that few are idle in their last round."""
    for lanes in (32, 16, 8, 4, 2):
        rounds = -(-vectors // lanes)
        if vectors / (rounds * lanes) >= 0.9:
            return lanes
    return 1
