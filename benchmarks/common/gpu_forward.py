"""The forward's kernels side by side: one block per tile, and blocks that stay."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from benchmarks.common.gpu_timing import Stopwatch, gather_floor_ms
from torch import Tensor

from deform3d import _launch, deform_conv3d
from deform3d._checks import Geometry, check
from deform3d._launch import Tuning
from deform3d.cuda import CupyRuntime

# The stages of `base` at two patches of 96 x 96 x 96, and the first two of `tiny` at two of 32 x 48 x 32.
SHAPES = (
    (2, 48, 48, 48, 48),
    (2, 96, 24, 24, 24),
    (2, 192, 12, 12, 12),
    (2, 384, 6, 6, 6),
    (2, 16, 16, 24, 16),
    (2, 32, 8, 12, 8),
)
_NETWORK_DTYPES = (torch.float32, torch.bfloat16)
_VARIANTS = (("block per tile", Tuning(fast_forward=False)), ("staying", Tuning()))


@dataclass(frozen=True)
class Timing:
    """One kernel on one shape."""

    shape: tuple[int, ...]
    dtype: str
    kernel: str
    ms: float
    floor_ms: float
    error: float

    def __str__(self) -> str:
        size = "×".join(map(str, self.shape))
        return (
            f"{size:16} {self.dtype:9} {self.kernel:14} {self.ms:.4f} ms, "
            f"{self.ms / self.floor_ms:5.2f} of the computed floor, relative error {self.error:.2e}"
        )


def time_forward(watch: Stopwatch) -> Iterator[Timing]:
    """Time every kernel on every shape, and print one line for each."""
    runtime = CupyRuntime()
    count = torch.cuda.get_device_properties().multi_processor_count
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16) if shape == SHAPES[0] else _NETWORK_DTYPES:
            tensors = _tensors(shape, dtype)
            g = check(*tensors, None, (1, 1, 1), (1, 1, 1), (1, 1, 1))
            expected = deform_conv3d(*(t.double() for t in tensors), padding=1, backend="reference")
            floor = gather_floor_ms(shape[1], 1, g.batch * g.voxels, dtype.itemsize, count, watch.clock_hz)
            for name, tuning in _VARIANTS:
                runtime.tuning = tuning
                try:
                    actual = _forward(runtime, tensors, g)
                    ms = watch.milliseconds(lambda tensors=tensors, g=g: _forward(runtime, tensors, g))
                except Exception as error:  # what this card, or its compiler, does not take
                    print(f"{shape} {dtype} {name}: refused ({error})", flush=True)
                    continue
                error = float((actual.double() - expected).norm() / expected.norm())
                timing = Timing(shape, str(dtype).removeprefix("torch."), name, ms, floor, error)
                print(timing, flush=True)
                yield timing


def _tensors(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Return input, offset, weight, bias; channels-last."""
    batch, channels, *size = shape
    generator = torch.Generator().manual_seed(0)
    volumes = (torch.randn(batch, n, *size, generator=generator) for n in (channels, 81))
    others = (torch.randn(channels, 1, 3, 3, 3, generator=generator), torch.randn(channels, generator=generator))
    placed = [t.to("cuda", dtype, memory_format=torch.channels_last_3d) for t in volumes]
    return [*placed, *(t.to("cuda", dtype) for t in others)]


def _forward(runtime: CupyRuntime, tensors: list[Tensor], g: Geometry) -> Tensor:
    input, offset, weight, bias = tensors
    return _launch.forward(runtime, input, offset, weight, bias, None, g)
