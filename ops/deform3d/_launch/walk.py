"""The forward by persistent blocks: the calls it can run, and the sizes that `kernels/forward_walk.cu` computes too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .._checks import Geometry
from .plan import (
    CUBE_TAPS,
    INT32_MAX,
    LOAD_BYTES,
    PRESET_CHANNELS,
    PRESET_DTYPES,
    Kernel,
    Tuning,
    covering,
    is_cube,
    kernel,
)

THREADS = 768
_CELL_BYTES = 16 + 4


@dataclass(frozen=True)
class Walk:
    """How the threads of a block share the voxels and channels of its tiles."""

    channels: int
    dtype: torch.dtype

    @property
    def vector(self) -> int:
        return LOAD_BYTES // self.dtype.itemsize

    @property
    def lanes(self) -> int:
        return self.channels // self.vector

    @property
    def group(self) -> int:
        """Return the number of threads that work on one tile."""
        return 128 if self.lanes % 3 else 192

    @property
    def tile(self) -> tuple[int, int, int]:
        """Return the number of voxels along d, h, w."""
        log = (self.group // self.lanes).bit_length() - 1
        log_w = 2 if log > 2 else (log + 1) // 2
        log_h = 2 if log > 3 else log - log_w
        return 1 << (log - log_w - log_h), 1 << log_h, 1 << log_w

    @property
    def voxel_bytes(self) -> int:
        return self.channels * self.dtype.itemsize

    @property
    def shared_bytes(self) -> int:
        """Return the size of the weights' copies, one cell per voxel and tap held at once, and a number per group."""
        voxel = self.voxel_bytes
        groups = THREADS // self.group
        weights = CUBE_TAPS * voxel
        if voxel > 128 and voxel % 128 == 64:
            weights = 2 * (-(-weights // 128) * 128 + 64)
        cells = THREADS // self.lanes * (3 if self.lanes < 6 else 9)
        return -(-weights // 128) * 128 + cells * _CELL_BYTES + 4 * (1 + groups)

    def tiles(self, g: Geometry) -> int:
        """Return the number of tiles that cover the output."""
        return covering(g.out, g.batch, self.tile)

    @property
    def kernel(self) -> Kernel:
        return kernel("forward_walk", "deform_forward_walk", self.dtype, self.vector, True, CHANNELS=self.channels)


def walk_of(g: Geometry, dtype: torch.dtype, vector: int, tuning: Tuning) -> Walk | None:
    """Return how blocks walk, or None if the call needs another kernel.

    It is the fastest for small calls, too: on an H200, down to 32 channels at two samples of 8 x 12 x 8.

    Args:
        g: sizes of the call.
        dtype: of the input.
        vector: channels per load that alignment allows.
        tuning: `fast_forward` enables it.
    """
    known = dtype in PRESET_DTYPES and g.in_channels in PRESET_CHANNELS
    if not (tuning.fast_forward and known and is_cube(g) and g.depthwise):
        return None
    walk = Walk(g.in_channels, dtype)
    fits = g.voxels * walk.voxel_bytes < 2**32  # bytes of a sample are counted in 32 bits
    return walk if vector == walk.vector and fits and walk.tiles(g) <= INT32_MAX else None


def walk_kernels() -> Iterator[Kernel]:
    """Yield every kernel of this module."""
    for dtype in PRESET_DTYPES:
        for channels in PRESET_CHANNELS:
            yield Walk(channels, dtype).kernel
