"""Launches of the CUDA kernels: instances, grids, shared memory and arguments, without CuPy or CUDA.

A `Runtime` compiles and starts kernels: CuPy's on a GPU, or the tests' own, which runs the same source on the CPU.
Depthwise convolution with one offset group takes one fused kernel forward and a few backward. Everything else writes
its samples out as rows of a matrix, in chunks of bounded size, and leaves the sums to PyTorch's matrix product.
"""

from collections.abc import Iterator

from . import backward_cells, backward_taps, plan, walk
from .backward import backward
from .forward import can_fuse_offset, forward, forward_fused_offset
from .plan import Kernel, Runtime, Tuning, source

__all__ = [
    "Kernel",
    "Runtime",
    "Tuning",
    "all_kernels",
    "backward",
    "can_fuse_offset",
    "forward",
    "forward_fused_offset",
    "source",
]


def all_kernels() -> Iterator[Kernel]:
    """Yield every kernel that a call can launch."""
    yield from plan.general_kernels()
    yield from walk.walk_kernels()
    yield from backward_taps.taps_kernels()
    yield from backward_cells.cells_kernels()
