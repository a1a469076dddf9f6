"""The building blocks of forward and backward launches: kernels, their sources and sizes."""

from __future__ import annotations

import functools
import importlib.resources
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .._checks import Geometry
from ..reference import compute_dtype

DTYPE_CODES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}
CHANNELS_LAST = torch.channels_last_3d
INT32_MAX = 2**31 - 1
Strides = tuple[int, int, int]  # sample, channel, voxel
# The shared memory that a block may use without opting in to a limit that differs between GPUs.
SHARED_BYTES = 48 * 1024
CUBE_TAPS = 27
LOAD_BYTES = 16
# The channels of the network's presets; each has an instance of its own per dtype, compiled on first use.
PRESET_CHANNELS = (16, 24, 32, 48, 64, 96, 128, 192, 384)
PRESET_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# The sums of eight corners for more channels would not fit into the registers of a thread.
GATHER_VECTOR = 4


@dataclass(frozen=True)
class Tuning:
    """Sizes of blocks and chunks. The kernels are compiled for at most these numbers of threads."""

    forward_threads: int = 384
    forward_voxels: int = 64
    fast_forward: bool = True  # use `forward_walk` if it has an instance
    samples_warps: int = 9  # divides the 27 taps evenly
    samples_voxels: int = 32
    samples_blocks: int = 2  # per multiprocessor, each with a row of partial weight gradients
    taps_warps: int = 16  # of a block; 8 make two blocks per multiprocessor
    taps_voxels: int = 64  # of a tile, at most
    fast_samples: bool = True  # use `backward_taps` if it has an instance
    count_in_taps: bool = True  # count samples per cell there, which otherwise takes a launch
    cells_threads: int = 512  # of the one block per multiprocessor
    cells_unroll: int = 4  # samples that a thread has in flight
    cells_band: int = 8  # neighbouring rows of cells that a block visits together
    cells_segment: int = 0  # voxels of a row that a thread visits; 0: enough to keep all threads busy
    cells_bytes: int = 2**30  # for sorting, at most
    fast_cells: bool = True  # use `backward_cells` if it has an instance
    gather_threads: int = 128
    gather_blocks: int = 4  # per multiprocessor, at least, if there are enough rows
    gather_segment: int = 8  # voxels of a row that a thread visits
    taps_at_once: int = 64  # taps with samples in shared memory together, unless the kernel is 3x3x3
    chunk_bytes: int = 2**29  # of sorted samples, of columns, and of parts of the input's gradient


@dataclass(frozen=True)
class Kernel:
    """An entry point of a unit compiled with these macros; with the device, the cache key of a compiled kernel."""

    unit: str
    name: str
    defines: tuple[tuple[str, int], ...]

    def __hash__(self) -> int:
        # Looked up at every launch.
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.unit, self.name, self.defines))

    @property
    def options(self) -> tuple[str, ...]:
        """Return the macros as compiler options."""
        return tuple(f"-D{name}={value}" for name, value in self.defines)


class Runtime(Protocol):
    """Compiles kernels, keeps them, and starts them on the device's current stream."""

    tuning: Tuning

    def launch(
        self,
        device: torch.device,
        kernel: Kernel,
        grid: int,
        block: tuple[int, int],
        shared_bytes: int,
        args: Sequence[int],
    ) -> None:
        """Start `grid` blocks; each argument is a 64-bit integer or the address of a tensor's first element."""

    def multiprocessors(self, device: torch.device) -> int:
        """Return the number of multiprocessors of the device."""


def source(unit: str) -> str:
    """Return the CUDA source of a unit: the part that all units share, then its own."""
    folder = importlib.resources.files("deform3d") / "kernels"
    return "\n".join((folder / f"{name}.cu").read_text(encoding="utf-8") for name in ("common", unit))


def general_kernels() -> Iterator[Kernel]:
    """Yield the kernels that run any convolution."""
    for dtype in DTYPE_CODES:
        for vector in vectors(dtype):
            for cube in (True, False):
                yield kernel("forward", "deform_forward", dtype, vector, cube, FUSED=0)
                yield kernel("backward_samples", "deform_backward_samples", dtype, vector, cube)
                if vector <= GATHER_VECTOR:
                    yield kernel("backward_input", "deform_gather", dtype, vector, cube, COLUMNS=0)
            yield kernel("forward", "deform_forward", dtype, vector, True, FUSED=1)
            if vector <= GATHER_VECTOR:
                yield kernel("backward_input", "deform_gather", dtype, vector, False, COLUMNS=1)
            for name in ("deform_columns", "deform_columns_backward"):
                yield kernel("columns", name, dtype, vector, False)
        for name in ("deform_count", "deform_place"):
            for cube in (True, False):
                yield sort_kernel(name, dtype, cube)


@functools.cache
def kernel(unit: str, name: str, dtype: torch.dtype, vector: int, cube: bool, **more: int) -> Kernel:
    """Return the instance of a kernel for a dtype, a number of channels per load, and 3x3x3 or any kernel size."""
    return Kernel(unit, name, (("DTYPE", DTYPE_CODES[dtype]), ("VECTOR", vector), ("CUBE", int(cube)), *more.items()))


def sort_kernel(name: str, dtype: torch.dtype, cube: bool) -> Kernel:
    """Return an instance of a kernel that reads no channels."""
    return kernel("backward_input", name, dtype, 1, cube, COLUMNS=0)


def vectors(dtype: torch.dtype) -> tuple[int, ...]:
    """Return the channels of a load of 16 bytes, of 8 bytes, and of one channel."""
    return tuple(n for n in (8, 4, 2, 1) if n == 1 or n * dtype.itemsize in (LOAD_BYTES, LOAD_BYTES // 2))


def blocks_for(items: int, per_block: int) -> int:
    """Return the number of blocks that cover the items, up to the limit of a grid: kernels loop over the rest."""
    return min(-(-items // per_block), INT32_MAX)


def cells_per_sample(g: Geometry) -> int:
    """Return the number of cells that samples are sorted into: the boxes between voxels, including the border."""
    return g.offset_groups * (g.size[0] + 1) * (g.size[1] + 1) * (g.size[2] + 1)


def vector_of(channels: int, *tensors: Tensor | None, most: int = LOAD_BYTES) -> int:
    """Return the number of channels per load: a divisor of `channels` to which every tensor is aligned."""
    given = [tensor for tensor in tensors if tensor is not None]
    addresses = functools.reduce(operator.or_, pointers(*given))
    return loaded_at_once(channels, given[0].dtype, addresses % LOAD_BYTES, most)


@functools.lru_cache(maxsize=1024)
def loaded_at_once(channels: int, dtype: torch.dtype, addresses: int, most: int = LOAD_BYTES) -> int:
    """Return the number of channels per load, at most `most`: a divisor of `channels`.

    Args:
        channels: of a voxel.
        dtype: of the tensors.
        addresses: the last four bits of the addresses of their first elements, or-ed together.
        most: the number that the kernel has registers for.
    """
    return next(n for n in vectors(dtype) if n <= most and channels % n == 0 and addresses % (n * dtype.itemsize) == 0)


def check_sizes(g: Geometry) -> None:
    """Raise ValueError if a number does not fit the kernels' 32 bits: the voxels of one sample, or an axis."""
    for name, voxels in (("input", g.voxels), ("output", g.out_voxels)):
        if voxels > INT32_MAX:
            raise ValueError(f"{name}: got {voxels} voxels in a sample, expected at most {INT32_MAX} on a GPU.")
    reach = max(
        p + d * k + s * o for p, d, k, s, o in zip(g.padding, g.dilation, g.kernel, g.stride, g.out, strict=True)
    )
    if max(reach, g.in_channels, g.out_channels) > 2**27:
        raise ValueError("padding, dilation, stride or channels: expected sizes of at most 2**27 on a GPU.")


def is_cube(g: Geometry) -> bool:
    """Return whether the 3x3x3 instances apply."""
    ones = (1, 1, 1)
    return g.kernel == (3, 3, 3) and (g.stride, g.padding, g.dilation) == (ones, ones, ones)


def taps_at_once(g: Geometry, tuning: Tuning) -> int:
    """Return the number of taps for which a block holds the samples of its voxels at once."""
    return CUBE_TAPS if is_cube(g) else min(g.taps, tuning.taps_at_once)


def real_bytes(dtype: torch.dtype) -> int:
    """Return the size of one element of a sum, in bytes."""
    return compute_dtype(dtype).itemsize


def record_bytes(dtype: torch.dtype) -> int:
    """Return the size of the kernels' `Sample` and `Record`: three distances and an index, aligned to 16 bytes."""
    return 16 if real_bytes(dtype) == 4 else 32


def samples_bytes(dtype: torch.dtype, count: int, with_factor: bool) -> int:
    """Return the shared memory of `count` samples, in the layout of the kernels' `samples_in`."""
    return count * (record_bytes(dtype) + with_factor * real_bytes(dtype)) + -(-count // 16) * 16


def taps_first(weight: Tensor) -> Tensor:
    """Return a depthwise weight (C, 1, kD, kH, kW) as (taps, C)."""
    return weight.reshape(weight.shape[0], -1).t().contiguous()


def sizes(g: Geometry) -> tuple[int, ...]:
    """Return the kernels' CONVOLUTION_ARGUMENTS."""
    return *g.size, *g.out, *g.kernel, *g.stride, *g.padding, *g.dilation


def pointers(*tensors: Tensor | None) -> tuple[int, ...]:
    """Return the address of each tensor's first element; 0 for none."""
    return tuple([0 if tensor is None else tensor.data_ptr() for tensor in tensors])


class Field(NamedTuple):
    """A tensor with values per output voxel, such as offset or mask, and its strides (sample, channel, voxel)."""

    tensor: Tensor | None
    strides: Strides

    @classmethod
    def of(cls, tensor: Tensor | None) -> Field:
        """Return a field of a contiguous or channels-last tensor itself, or of a contiguous copy of any other."""
        if tensor is None:
            return cls(None, (0, 0, 0))
        _, channels, d, h, w = tensor.shape
        voxels = d * h * w
        if tensor.is_contiguous():
            return cls(tensor, (channels * voxels, voxels, 1))
        if tensor.is_contiguous(memory_format=CHANNELS_LAST):
            return cls(tensor, (channels * voxels, 1, channels))
        return cls(tensor.contiguous(), (channels * voxels, voxels, 1))

    def like(self) -> Tensor | None:
        """Return an unwritten tensor with these strides."""
        if self.tensor is None:
            return None
        layout = CHANNELS_LAST if self.strides[1] == 1 and self.strides[2] != 1 else torch.contiguous_format
        return torch.empty_like(self.tensor, memory_format=layout)


def covering(size: Sequence[int], batch: int, sides: Sequence[int]) -> int:
    """Return the number of boxes with these sides that cover a batch of volumes."""
    count = batch
    for length, side in zip(size, sides, strict=True):
        count *= -(-length // side)
    return count


@dataclass(frozen=True)
class Tile:
    """A box of voxels whose sides are powers of two, and the number of boxes that cover the volumes."""

    logs: tuple[int, int, int]
    count: int

    @property
    def voxels(self) -> int:
        return 1 << sum(self.logs)

    @property
    def arguments(self) -> tuple[int, int, int, int]:
        """Return the kernels' arguments tiles, log_d, log_h, log_w."""
        return self.count, *self.logs

    @classmethod
    def of(cls, size: Sequence[int], batch: int, most: int, multiprocessors: int, fits: Callable[[int], bool]) -> Tile:
        """Return the largest nearly cubic box of at most `most` voxels that fits and leaves no multiprocessor idle.

        The last axis grows first: its voxels are neighbours in memory.
        """
        logs, best = [0, 0, 0], cls((0, 0, 0), covering(size, batch, (1, 1, 1)))
        growing = True
        while growing:
            growing = False
            for axis in (2, 1, 0):
                larger = tuple(log + (i == axis) for i, log in enumerate(logs))
                count = covering(size, batch, [1 << log for log in larger])
                idle = count < 2 * multiprocessors
                if 1 << logs[axis] < size[axis] and 1 << sum(larger) <= most and not idle and fits(1 << sum(larger)):
                    logs, best, growing = list(larger), cls((larger[0], larger[1], larger[2]), count), True
        return best


class Chunk(NamedTuple):
    """Output voxels that are processed together: whole samples, or a part of one."""

    first_sample: int
    samples: int
    first_voxel: int  # counted over the output voxels of all samples
    voxels: int
    whole: bool  # holds whole samples: no other chunk adds to their gradient of the input


def chunks(g: Geometry, bytes_per_voxel: int, tuning: Tuning) -> Iterator[Chunk]:
    """Divide the output voxels so that no chunk exceeds `tuning.chunk_bytes` or 32-bit indices."""
    cells = cells_per_sample(g)
    most = min(tuning.chunk_bytes // bytes_per_voxel, INT32_MAX // (g.offset_groups * g.taps))
    most = max(1, most)
    if cells > INT32_MAX:
        raise ValueError(f"input: got {cells} cells in a sample, expected at most {INT32_MAX} on a GPU.")
    if most >= g.out_voxels:
        at_once = min(most // g.out_voxels, INT32_MAX // cells)
        for n in range(0, g.batch, at_once):
            samples = min(at_once, g.batch - n)
            yield Chunk(n, samples, n * g.out_voxels, samples * g.out_voxels, True)
        return
    for n in range(g.batch):
        for first in range(0, g.out_voxels, most):
            yield Chunk(n, 1, n * g.out_voxels + first, min(most, g.out_voxels - first), False)
