"""The forward by blocks that stay: which calls it runs, and the sizes that `kernels/forward_walk.cu` computes too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .._checks import Geometry
from .plan import CUBE_TAPS, INT32_MAX, Kernel, Tuning, is_cube, kernel

# What the network's presets have: each is an instance of its own, compiled when it is first used.
CHANNELS = (16, 24, 32, 48, 64, 96, 128, 192, 384)
# In what the corners of a sample are summed: ARITHMETIC of the kernel.
ARITHMETICS = {torch.float16: (0, 1), torch.bfloat16: (0, 2), torch.float32: (0,)}
DTYPES = tuple(ARITHMETICS)
THREADS = 768
_LOAD_BYTES = 16
_CELL_BYTES = 16 + 4


@dataclass(frozen=True)
class Walk:
    """How a block's threads share the voxels and channels of its tiles."""

    channels: int
    dtype: torch.dtype

    @property
    def vector(self) -> int:
        return _LOAD_BYTES // self.dtype.itemsize

    @property
    def lanes(self) -> int:
        return self.channels // self.vector

    @property
    def group(self) -> int:
        """Threads that work on one tile."""
        return 128 if self.lanes % 3 else 192

    @property
    def tile(self) -> tuple[int, int, int]:
        """Voxels along d, h, w."""
        log = (self.group // self.lanes).bit_length() - 1
        log_w = 2 if log > 2 else (log + 1) // 2
        log_h = 2 if log > 3 else log - log_w
        return 1 << (log - log_w - log_h), 1 << log_h, 1 << log_w

    @property
    def shared_bytes(self) -> int:
        """The copies of the weights, a cell per voxel and tap of those at once, and a number per group."""
        voxel = self.channels * self.dtype.itemsize
        weights = CUBE_TAPS * voxel
        if voxel > 128 and voxel % 128 == 64:
            weights = 2 * (-(-weights // 128) * 128 + 64)
        cells = THREADS // self.lanes * (3 if self.lanes < 6 else 9)
        return -(-weights // 128) * 128 + cells * _CELL_BYTES + 4 * (1 + THREADS // self.group)

    def tiles(self, g: Geometry) -> int:
        """Return how many tiles cover the output."""
        count = g.batch
        for length, side in zip(g.out, self.tile, strict=True):
            count *= -(-length // side)
        return count

    def kernel(self, tuning: Tuning) -> Kernel:
        """Return the instance that sums corners as the tuning says."""
        arithmetic = {torch.float16: tuning.walk_float16, torch.bfloat16: tuning.walk_bfloat16}
        return _instance(self, arithmetic.get(self.dtype, 0))


def walk_of(g: Geometry, dtype: torch.dtype, vector: int, tuning: Tuning, multiprocessors: int) -> Walk | None:
    """Return how blocks walk, or None where the call is too small for that, or another kernel's.

    Args:
        g: sizes of the call.
        dtype: of the input.
        vector: channels that alignment allows to load at once.
        tuning: its `walk_tiles` is the least number of tiles per multiprocessor.
        multiprocessors: of the device.
    """
    if not (is_cube(g) and g.depthwise and dtype in DTYPES and g.in_channels in CHANNELS):
        return None
    walk = Walk(g.in_channels, dtype)
    fits = g.voxels * g.in_channels * dtype.itemsize < 2**32  # bytes of a sample are counted in 32 bits
    busy = max(1, tuning.walk_tiles * multiprocessors) <= walk.tiles(g) <= INT32_MAX
    return walk if vector == walk.vector and fits and busy else None


def instances() -> Iterator[Kernel]:
    """Yield every instance that can be asked for."""
    for dtype in DTYPES:
        for channels in CHANNELS:
            for arithmetic in ARITHMETICS[dtype]:
                yield _instance(Walk(channels, dtype), arithmetic)


def _instance(walk: Walk, arithmetic: int) -> Kernel:
    more = {"CHANNELS": walk.channels, "ARITHMETIC": arithmetic}
    return kernel("forward_walk", "deform_forward_walk", walk.dtype, walk.vector, True, **more)
