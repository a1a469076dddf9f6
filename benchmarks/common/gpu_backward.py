"""The backward kernel by kernel, for one launch shape after the other, with the errors of its gradients."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from benchmarks.common.gpu_timing import Stopwatch, kernel_times, profiled
from torch import Tensor

from deform3d import _launch, reference
from deform3d._checks import check
from deform3d._launch import Kernel, Runtime, Tuning
from deform3d.cuda import CupyRuntime
from deform3d.reference import Gradients

LAST = torch.channels_last_3d
DTYPES = (torch.float32, torch.bfloat16)
# (batch, channels, size): the four stages of the base network at 96**3, and the first of tiny at 32 x 48 x 32.
SHAPES = (
    (2, 48, (48, 48, 48)),
    (2, 96, (24, 24, 24)),
    (2, 192, (12, 12, 12)),
    (2, 384, (6, 6, 6)),
    (2, 16, (16, 24, 16)),
)
BEFORE = {"fast_samples": False, "fast_cells": False}
# Of the first shape, in both dtypes: what is tried beside the default.
CHANGES: tuple[dict[str, Any], ...] = (
    {"fast_cells": False},
    {"count_in_taps": False},
    *({"taps_warps": warps, "taps_voxels": voxels} for warps, voxels in ((16, 32), (16, 128), (16, 256), (8, 64))),
    *(
        {"cells_threads": threads, "cells_unroll": unroll}
        for threads, unroll in ((512, 4), (512, 2), (640, 1), (768, 1))
    ),
    *({"cells_band": band} for band in (4, 16)),
    *({"cells_segment": segment} for segment in (6, 8, 16, 24, 48)),
)
_PROFILED = 5


def tune_backward(seconds: float) -> None:
    """Print times in microseconds and errors against float64.

    Args:
        seconds: of each measurement of the whole backward.
    """
    start = time.monotonic()
    tunings = [Tuning(), dataclasses.replace(Tuning(), **BEFORE)]
    tried = [dataclasses.replace(Tuning(), **change) for change in CHANGES]
    compiled = _compile([*tunings, *tried])
    print(f"compiled {compiled} kernels in {time.monotonic() - start:.0f} s", flush=True)
    _print_errors([*tunings, *tried])
    watch = Stopwatch(seconds)
    for shape in SHAPES:
        for dtype in DTYPES:
            runtime = CupyRuntime()
            call = _call(runtime, *shape, dtype)
            print(f"{shape[0]}x{shape[1]}x{shape[2]} {dtype}", flush=True)
            for tuning in (*tunings, *(tried if shape == SHAPES[0] else ())):
                runtime.tuning = tuning
                _print_times(watch, call, tuning, start)
            runtime.tuning = Tuning()
            torch.use_deterministic_algorithms(True)
            try:
                for tuning in tunings:
                    runtime.tuning = tuning
                    _print_times(watch, call, tuning, start, "deterministic, ")
            finally:
                torch.use_deterministic_algorithms(False)


def _print_times(watch: Stopwatch, call: Callable[[], object], tuning: Tuning, start: float, title: str = "") -> None:
    whole = 1e3 * watch.milliseconds(call)
    rows = kernel_times(profiled(call, _PROFILED).events(), _PROFILED)
    kernels = ", ".join(f"{_short(row['kernel'])} {row['us']:.0f}" for row in rows if row["us"] >= 1)
    print(f"  [{time.monotonic() - start:.0f} s] {whole:7.0f} us  {title}{_changes(tuning)}: {kernels}", flush=True)


def _changes(tuning: Tuning) -> str:
    values = {field.name: getattr(tuning, field.name) for field in dataclasses.fields(Tuning)}
    default = dataclasses.asdict(Tuning())
    return ", ".join(f"{name}={value}" for name, value in values.items() if value != default[name]) or "default"


def _short(kernel: str) -> str:
    """Return the name of a kernel without types and arguments."""
    name = kernel.removeprefix("void ").split("<")[0].split("(")[0]
    return name.split("::")[-1] if "reduce" not in kernel else "reduce"


def _tensors(batch: int, channels: int, size: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return the output's gradient, input, offset, weight and mask, channels-last."""
    generator = torch.Generator().manual_seed(0)

    def volume(n: int) -> Tensor:
        return torch.randn(batch, n, *size, generator=generator).to("cuda", dtype, memory_format=LAST)

    weight = torch.randn(channels, 1, 3, 3, 3, generator=generator).to("cuda", dtype)
    return volume(channels), volume(channels), volume(81), weight, volume(27)


def _call(
    runtime: Runtime, batch: int, channels: int, size: Sequence[int], dtype: torch.dtype
) -> Callable[[], Gradients]:
    """Return a backward without a mask."""
    grad, input, offset, weight, _ = _tensors(batch, channels, size, dtype)
    g = check(input, offset, weight, None, None, (1, 1, 1), (1, 1, 1), (1, 1, 1))
    needs = (True, True, True, True, False)
    return lambda: _launch.backward(runtime, grad, input, offset, weight, None, g, needs)


def _print_errors(tunings: Sequence[Tuning]) -> None:
    """Compare every gradient with the float64 reference, by norms, on crops with samples inside and outside."""
    for channels in (48, 96, 192, 384, 16):
        for dtype in DTYPES:
            for masked in (False, True):
                *given, last = _tensors(2, channels, (9, 14, 11), dtype)
                mask = last if masked else None
                g = check(*given[1:], None, mask, (1, 1, 1), (1, 1, 1), (1, 1, 1))
                needs = (True, True, True, True, masked)
                exact_mask = None if mask is None else mask.double()
                expected = reference.backward(*(t.double() for t in given), exact_mask, g, needs)
                worst: dict[str, float] = {}
                for tuning in tunings if channels == 48 else tunings[:2]:
                    actual = _launch.backward(CupyRuntime(tuning), *given, mask, g, needs)
                    for name, a, e in zip(expected._fields, actual, expected, strict=True):
                        if a is not None and e is not None:
                            error = float((a.double() - e).norm() / e.norm())
                            worst[name] = max(worst.get(name, 0.0), error)
                errors = ", ".join(f"{name} {error:.1e}" for name, error in worst.items())
                print(f"errors, {channels} channels {dtype}{', mask' if masked else ''}: {errors}", flush=True)


def _compile(tunings: Sequence[Tuning]) -> int:
    """Fill CuPy's cache on disk with all kernels, several at once; return their number."""
    import cupy

    recorder = _Recorder()
    for tuning in tunings:
        recorder.tuning = tuning
        for batch, channels, size in SHAPES if tuning in (tunings[0], tunings[1]) else SHAPES[:1]:
            for dtype in DTYPES:
                call = _call(recorder, batch, channels, size, dtype)
                for deterministic in (False, True):
                    torch.use_deterministic_algorithms(deterministic)
                    call()
                torch.use_deterministic_algorithms(False)

    def compile_one(kernel: Kernel) -> None:
        with cupy.cuda.Device(0):
            options = ("-std=c++17", *kernel.options)
            cupy.RawModule(code=_launch.source(kernel.unit), options=options).get_function(kernel.name)

    kernels = list({(kernel.unit, kernel.options): kernel for kernel in recorder.kernels}.values())
    with ThreadPoolExecutor() as pool:
        list(pool.map(compile_one, kernels))
    return len(kernels)


class _Recorder:
    """A runtime that starts nothing and records the requested kernels."""

    def __init__(self) -> None:
        self.tuning = Tuning()
        self.kernels: list[Kernel] = []

    def launch(
        self,
        _device: torch.device,
        kernel: Kernel,
        _grid: int,
        _block: tuple[int, int],
        _shared_bytes: int,
        _args: Sequence[int],
    ) -> None:
        self.kernels.append(kernel)

    def multiprocessors(self, _device: torch.device) -> int:
        return torch.cuda.get_device_properties(_device).multi_processor_count
