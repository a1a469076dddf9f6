"""Explicit SIMD for the Numba backend: vector values, and the few operations the kernels need on them.

Numba leaves vectorising to LLVM, which here gives up at run-time alias checks and keeps accumulators in memory. These
intrinsics emit LLVM's own vector types instead: the code is vector code on every processor (LLVM splits vectors wider
than the machine's), accumulators stay in registers, and the compiler has no loop to analyse, which makes compilation
short. Every operation also accepts plain floats, so that one kernel body serves both vectors and the tail.

Only the other ``_cpu_*`` modules import this one.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model


class SimdVector(types.Type):
    """A SIMD vector of `lanes` floats of type `dtype`."""

    def __init__(self, dtype: types.Float, lanes: int) -> None:
        self.dtype = dtype
        self.lanes = lanes
        super().__init__(name=f"SimdVector({dtype}, {lanes})")


@register_model(SimdVector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: SimdVector) -> None:
        super().__init__(dmm, fe_type, _llvm_type(fe_type))


def _llvm_type(numba_type: Any) -> ir.Type:
    if isinstance(numba_type, SimdVector):
        return ir.VectorType(_llvm_type(numba_type.dtype), numba_type.lanes)
    return {types.float32: ir.FloatType(), types.float64: ir.DoubleType(), types.int64: ir.IntType(64)}[numba_type]


def _alignment(numba_type: Any) -> int:
    """Return the alignment of one float, in bytes: the channels of a voxel can start anywhere."""
    return 4 if getattr(numba_type, "dtype", numba_type) == types.float32 else 8


def _address(context: Any, builder: Any, array_type: Any, array: Any, index: Any, value_type: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    pointer = builder.gep(data, [index])
    return builder.bitcast(pointer, _llvm_type(value_type).as_pointer())


@intrinsic(prefer_literal=True)
def vector(typingctx: Any, array: Any, registers: Any) -> Any:
    """vector(array, registers): zeros of the array's dtype that fill a literal number of 64-byte registers."""
    result = SimdVector(array.dtype, registers.literal_value * 64 // (array.dtype.bitwidth // 8))

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return cgutils.get_null_value(_llvm_type(result))

    return result(array, registers), codegen


def _spread(builder: Any, scalar: Any, vector_type: SimdVector) -> Any:
    llvm_type = _llvm_type(vector_type)
    undefined = ir.Constant(llvm_type, ir.Undefined)
    single = builder.insert_element(undefined, scalar, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), vector_type.lanes), None)
    return builder.shuffle_vector(single, undefined, zeros)


@intrinsic
def load(typingctx: Any, array: Any, index: Any, like: Any) -> Any:
    """load(array, index, like): a value of `like`'s type from the flat array, without bounds check."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _address(context, builder, array, args[0], args[1], like)
        return builder.load(pointer, align=_alignment(like))

    return like(array, index, like), codegen


@intrinsic
def store(typingctx: Any, array: Any, index: Any, value: Any) -> Any:
    """store(array, index, value): write a value to the flat array, without bounds check."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _address(context, builder, array, args[0], args[1], value)
        builder.store(args[2], pointer, align=_alignment(value))
        return context.get_dummy_value()

    return types.void(array, index, value), codegen


@intrinsic
def zero(typingctx: Any, like: Any) -> Any:
    """zero(like): a zero of `like`'s type."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return cgutils.get_null_value(_llvm_type(like))

    return like(like), codegen


@intrinsic
def floor(typingctx: Any, scalar: Any) -> Any:
    """floor(x): the largest integer up to x, as a float; Numba's own calls the C library."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        function = builder.module.declare_intrinsic("llvm.floor", [_llvm_type(scalar)])
        return builder.call(function, args)

    return scalar(scalar), codegen


@intrinsic
def corner_weights(typingctx: Any, d: Any, h: Any, w: Any) -> Any:
    """corner_weights(d, h, w): the eight products of (1 - d, d), (1 - h, h) and (1 - w, w), w changing fastest."""
    result = SimdVector(d, 8)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        llvm_type = _llvm_type(result)
        factors = []
        for scalar, bit in zip(args, (4, 2, 1), strict=True):
            sign = ir.Constant(llvm_type, [1.0 if corner & bit else -1.0 for corner in range(8)])
            start = ir.Constant(llvm_type, [0.0 if corner & bit else 1.0 for corner in range(8)])
            product = builder.fmul(_spread(builder, scalar, result), sign, flags=("contract",))
            factors.append(builder.fadd(product, start, flags=("contract",)))
        return builder.fmul(builder.fmul(factors[0], factors[1]), factors[2])

    return result(d, h, w), codegen


@intrinsic
def mul(typingctx: Any, value: Any, factor: Any) -> Any:
    """mul(value, factor): value * factor; `factor` is a scalar or of value's type."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fmul(args[0], _widen(builder, args[1], factor, value))

    return value(value, factor), codegen


@intrinsic
def mul_add(typingctx: Any, value: Any, factor: Any, total: Any) -> Any:
    """mul_add(value, factor, total): value * factor + total, fused where the processor can; `factor` as in `mul`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        product = builder.fmul(args[0], _widen(builder, args[1], factor, value), flags=("contract",))
        return builder.fadd(product, args[2], flags=("contract",))

    return value(value, factor, total), codegen


def _widen(builder: Any, value: Any, value_type: Any, target: Any) -> Any:
    if isinstance(target, SimdVector) and not isinstance(value_type, SimdVector):
        return _spread(builder, value, target)
    return value


@intrinsic
def store_sums(
    typingctx: Any, array: Any, index: Any, v0: Any, v1: Any, v2: Any, v3: Any, v4: Any, v5: Any, v6: Any, v7: Any
) -> Any:
    """store_sums(array, index, v0, ..., v7): array[index + i] = the sum of the lanes of vi."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        merged = list(args[2:])
        lanes = v0.lanes
        while len(merged) > 1:  # two vectors into one, each value keeping half as many lanes
            lanes //= 2
            merged = [_add_halves(builder, a, b, lanes) for a, b in zip(merged[::2], merged[1::2], strict=True)]
        sums = merged[0]
        while lanes > 1:
            lanes //= 2
            sums = _add_halves(builder, sums, None, lanes)
        pointer = _address(context, builder, array, args[0], args[1], SimdVector(v0.dtype, 8))
        builder.store(sums, pointer, align=_alignment(v0))
        return context.get_dummy_value()

    return types.void(array, index, v0, v1, v2, v3, v4, v5, v6, v7), codegen


def _add_halves(builder: Any, first: Any, second: Any, half: int) -> Any:
    """Add the two halves of every run of 2 * half lanes of `first`, then of `second`."""
    count = first.type.count * (1 if second is None else 2)
    lower = [run + lane for run in range(0, count, 2 * half) for lane in range(half)]
    mask_type = ir.VectorType(ir.IntType(32), len(lower))
    other = ir.Constant(first.type, ir.Undefined) if second is None else second
    low, high = (
        builder.shuffle_vector(first, other, ir.Constant(mask_type, [lane + shift for lane in lower]))
        for shift in (0, half)
    )
    return builder.fadd(low, high)
