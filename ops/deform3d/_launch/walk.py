"""The forward by blocks that stay: which calls it runs, and the sizes that `kernels/forward_walk.cu` computes too."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .._checks import Geometry
from .plan import CUBE_TAPS, INT32_MAX, Kernel, Tuning, is_cube, kernel

# What the network's presets have: each is an instance of its own, compiled when it is first used.
CHANNELS = (16, 24, 32, 48, 64, 96, 128, 192, 384)
# In what the corners of a sample are summed: ARITHMETIC of the kernel.
ARITHMETICS = {torch.float16: (0, 1, 3), torch.bfloat16: (0, 2, 3), torch.float32: (0,)}
TENSOR_CORES = 3
DTYPES = tuple(ARITHMETICS)
THREADS = 768
_LOAD_BYTES = 16
_CELL_BYTES = 16 + 4


class Margin(NamedTuple):
    """A copy of a volume with zeros around it: bytes from row to row and from plane to plane, and 16 bytes in all."""

    row: int
    plane: int
    units: int


@dataclass(frozen=True)
class Walk:
    """How a block's threads share the voxels and channels of its tiles."""

    channels: int
    dtype: torch.dtype
    arithmetic: int = 0

    @property
    def tensor_cores(self) -> bool:
        """By the kernel that reads a copy of the volume; two voxels at most have eight chunks of channels there."""
        return self.arithmetic == TENSOR_CORES and self.lanes >= 4

    @property
    def entry(self) -> str:
        """Name of the kernel."""
        return "deform_forward_tensor" if self.tensor_cores else "deform_forward_walk"

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
        threads = self.group // (2 if self.group == 192 else 4) if self.tensor_cores else self.group
        log = (threads // self.lanes).bit_length() - 1
        log_w = 2 if log > 2 else (log + 1) // 2
        log_h = 2 if log > 3 else log - log_w
        return 1 << (log - log_w - log_h), 1 << log_h, 1 << log_w

    @property
    def voxel_bytes(self) -> int:
        return self.channels * self.dtype.itemsize

    def margin(self, g: Geometry) -> Margin:
        """Return the sizes of the copy that the tensor cores' kernel reads: rows and planes of different banks."""
        row = _off((g.size[2] + 1) * self.voxel_bytes, 64)
        plane = _off((g.size[1] + 1) * row, 32)
        end = plane + row + self.voxel_bytes
        return Margin(row, plane, (g.batch * (g.size[0] + 1) * plane + end) // _LOAD_BYTES)

    @property
    def shared_bytes(self) -> int:
        """The copies of the weights, a cell per voxel and tap of those at once, and a number per group."""
        voxel = self.voxel_bytes
        groups = THREADS // self.group
        if self.tensor_cores:
            cells = groups * math.prod(self.tile) * (CUBE_TAPS + 1)
            return cells * _CELL_BYTES + (CUBE_TAPS + 1) * voxel + 4 * (1 + groups)
        weights = CUBE_TAPS * voxel
        if voxel > 128 and voxel % 128 == 64:
            weights = 2 * (-(-weights // 128) * 128 + 64)
        cells = THREADS // self.lanes * (3 if self.lanes < 6 else 9)
        return -(-weights // 128) * 128 + cells * _CELL_BYTES + 4 * (1 + groups)

    def tiles(self, g: Geometry) -> int:
        """Return how many tiles cover the output."""
        count = g.batch
        for length, side in zip(g.out, self.tile, strict=True):
            count *= -(-length // side)
        return count

    def kernel(self, name: str) -> Kernel:
        """Return an entry point of the instance."""
        arithmetic = self.arithmetic if self.tensor_cores else self.arithmetic % TENSOR_CORES
        more = {"CHANNELS": self.channels, "ARITHMETIC": arithmetic}
        return kernel("forward_walk", name, self.dtype, self.vector, True, **more)


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
    arithmetic = {torch.float16: tuning.walk_float16, torch.bfloat16: tuning.walk_bfloat16}.get(dtype, 0)
    walk = Walk(g.in_channels, dtype, arithmetic)
    margin = walk.margin(g)
    fits = (g.size[0] + 1) * margin.plane < 2**32  # bytes of a sample are counted in 32 bits
    busy = max(1, tuning.walk_tiles * multiprocessors) <= walk.tiles(g) <= INT32_MAX
    return walk if vector == walk.vector and fits and busy else None


def instances() -> Iterator[Kernel]:
    """Yield every instance that can be asked for."""
    for dtype in DTYPES:
        for channels in CHANNELS:
            for arithmetic in ARITHMETICS[dtype]:
                walk = Walk(channels, dtype, arithmetic)
                if walk.tensor_cores:
                    yield walk.kernel("deform_pad")
                if walk.tensor_cores or arithmetic != TENSOR_CORES:
                    yield walk.kernel(walk.entry)


def _off(size: int, remainder: int) -> int:
    """Return the least number from `size` on that is `remainder` more than a multiple of 128."""
    return size + (remainder - size) % 128
