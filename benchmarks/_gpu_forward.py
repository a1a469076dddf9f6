"""The forward's kernels side by side: one block per tile, and blocks that stay with each arithmetic that they have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from _gpu_timing import Stopwatch, gather_floor_ms
from torch import Tensor

from deform3d import _launch, deform_conv3d
from deform3d._checks import Geometry, check
from deform3d._launch import Tuning
from deform3d._launch.walk import ARITHMETICS, Walk
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
# More blocks than any card has: no call is large enough for blocks that stay.
_NEVER = 2**31


@dataclass(frozen=True)
class Timing:
    """One kernel on one shape; `tiles` is the number per multiprocessor, which `Tuning.walk_tiles` is compared with."""

    shape: tuple[int, ...]
    dtype: str
    kernel: str
    tiles: float
    ms: float
    floor_ms: float
    error: float

    def __str__(self) -> str:
        size = "×".join(map(str, self.shape))
        return (
            f"{size:16} {self.dtype:9} {self.kernel:22} {self.tiles:6.1f} tiles per multiprocessor, {self.ms:.4f} ms, "
            f"{self.ms / self.floor_ms:5.2f} of the computed floor, relative error {self.error:.2e}"
        )


def compare(watch: Stopwatch) -> Iterator[Timing]:
    """Time every kernel on every shape, and print one line for each."""
    runtime = CupyRuntime()
    count = torch.cuda.get_device_properties().multi_processor_count
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16) if shape == SHAPES[0] else _NETWORK_DTYPES:
            tensors = _tensors(shape, dtype)
            g = check(*tensors, None, (1, 1, 1), (1, 1, 1), (1, 1, 1))
            expected = deform_conv3d(*(t.double() for t in tensors), padding=1, backend="reference")
            floor = gather_floor_ms(shape[1], 1, g.batch * g.voxels, dtype.itemsize, count, watch.clock_hz)
            for name, tuning in _variants(dtype, shape):
                runtime.tuning = tuning
                try:
                    actual = _forward(runtime, tensors, g)
                    ms = watch.milliseconds(lambda tensors=tensors, g=g: _forward(runtime, tensors, g))
                except Exception as error:  # what this card, or its compiler, does not take
                    print(f"{shape} {dtype} {name}: refused ({error})", flush=True)
                    continue
                error = float((actual.double() - expected).norm() / expected.norm())
                timing = Timing(
                    shape, str(dtype).removeprefix("torch."), name, _tiles(g, dtype, tuning) / count, ms, floor, error
                )
                print(timing, flush=True)
                yield timing


def _variants(dtype: torch.dtype, shape: tuple[int, ...]) -> Iterator[tuple[str, Tuning]]:
    """Every arithmetic on the first shape, and on the others the most different: each takes a second to build."""
    yield "block per tile", Tuning(walk_tiles=_NEVER)
    first = shape == SHAPES[0]
    for arithmetic in ARITHMETICS[dtype]:
        walk = Walk(shape[1], dtype, arithmetic)
        if arithmetic and not first and not walk.tensor_cores:
            continue
        tuning = replace(Tuning(), walk_tiles=0, walk_float16=arithmetic, walk_bfloat16=arithmetic)
        yield f"staying, arithmetic {arithmetic}", tuning


def _tiles(g: Geometry, dtype: torch.dtype, tuning: Tuning) -> int:
    arithmetic = tuning.walk_bfloat16 if dtype == torch.bfloat16 else tuning.walk_float16
    return Walk(g.in_channels, dtype, 0 if dtype == torch.float32 else arithmetic).tiles(g)


def _tensors(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Input, offset, weight, bias; channels-last."""
    batch, channels, *size = shape
    generator = torch.Generator().manual_seed(0)
    volumes = (torch.randn(batch, n, *size, generator=generator) for n in (channels, 81))
    others = (torch.randn(channels, 1, 3, 3, 3, generator=generator), torch.randn(channels, generator=generator))
    placed = [t.to("cuda", dtype, memory_format=torch.channels_last_3d) for t in volumes]
    return [*placed, *(t.to("cuda", dtype) for t in others)]


def _forward(runtime: CupyRuntime, tensors: list[Tensor], g: Geometry) -> Tensor:
    input, offset, weight, bias = tensors
    return _launch.forward(runtime, input, offset, weight, bias, None, g)
