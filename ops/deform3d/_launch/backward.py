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
from .backward_input import InputGradient
from .backward_taps import TapsPlan, plan_taps
from .forward import COLUMN_THREADS, column_arguments, write_columns
from .plan import (
    CHANNELS_LAST,
    LOAD_BYTES,
    SHARED_BYTES,
    Chunk,
    Field,
    Runtime,
    Tile,
    blocks_for,
    check_sizes,
    is_cube,
    kernel,
    pointers,
    real_bytes,
    samples_bytes,
    sizes,
    taps_at_once,
    taps_first,
    vector_of,
)

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
        grad.contiguous(memory_format=CHANNELS_LAST),
        input.contiguous(memory_format=CHANNELS_LAST),
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
    """Return the gradients for an empty output: every sum is empty."""
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
    """One backward pass: the tensors of the forward in the layout that the kernels read."""

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
        """Return the gradient of the bias: the sum of the output's gradient over all voxels."""
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
        grad_input = torch.empty(self.input.shape, dtype=taps.dtype, device=taps.device, memory_format=CHANNELS_LAST)
        gather(self.runtime, plan, ids, starts, offset, taps, self.grad, self.factors.tensor, grad_input)
        return grad_input

    def _samples(
        self, taps: Tensor, grad_offset: Tensor | None, grad_mask: Tensor | None, need_weight: bool
    ) -> Tensor | None:
        """Write the gradients of offset and mask; return that of the weight."""
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
        """Return the gradient of the input, gathered from samples sorted by cell."""
        gradient = self._empty_input_gradient()
        for chunk in gradient.chunks(0):
            gradient.add(chunk, taps=taps)
        return gradient.total

    def _empty_input_gradient(self) -> InputGradient:
        return InputGradient(self.runtime, self.grad, self.input, self.shifts, self.factors, self.g)

    # --------------------------------------------------------------------------------- convolutions that mix channels

    def by_columns(
        self, grad_offset: Tensor | None, grad_mask: Tensor | None, need_input: bool, need_weight: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Write the gradients of offset and mask; return those of input and weight."""
        g, real = self.g, compute_dtype(self.input.dtype)
        matrix = matrices.weight_matrix(self.weight, g)
        grad_matrix = torch.zeros(matrix.shape, dtype=real, device=matrix.device) if need_weight else None
        rows = self.grad.permute(0, 2, 3, 4, 1).view(-1, g.out_channels)
        gradient = self._empty_input_gradient()
        for chunk in gradient.chunks(2 * g.in_channels * g.taps * self.input.element_size()):
            part = matrices.group_rows(rows[chunk.first_voxel : chunk.first_voxel + chunk.voxels], g)
            if grad_matrix is not None:
                columns = write_columns(self.runtime, self.input, self.shifts, self.factors, chunk, g)
                grad_matrix += torch.bmm(matrices.group_columns(columns, g).transpose(1, 2), part)
                del columns
            columns = matrices.ungroup_columns(torch.bmm(part, matrix.transpose(1, 2)), g)
            if grad_offset is not None or grad_mask is not None:
                self._columns_backward(columns, grad_offset, grad_mask, chunk)
            if need_input:
                gradient.add(chunk, columns=columns)
        grad_weight = None
        if grad_matrix is not None:
            grad_weight = matrices.weight_from_matrix(grad_matrix, g).to(self.weight.dtype)
        return gradient.total if need_input else None, grad_weight

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


def _lanes(vectors: int) -> int:
    """Return the number of lanes, a power of two, for the channels of a voxel: few idle in the last round."""
    for lanes in (32, 16, 8, 4, 2):
        rounds = -(-vectors // lanes)
        if vectors / (rounds * lanes) >= 0.9:
            return lanes
    return 1
