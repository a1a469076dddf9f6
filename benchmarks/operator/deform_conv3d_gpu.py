"""The CUDA operator, the published algorithm, `grid_sample`, `tvdcn` and the L1 floor; the network's step.

    python -m benchmarks.operator.deform_conv3d_gpu [--parts operator peers ...] [--results FOLDER]
    python -m benchmarks.operator.deform_conv3d_gpu --tune
    python -m benchmarks.operator.deform_conv3d_gpu --compare-forward
    python -m benchmarks.operator.deform_conv3d_gpu --tune-backward

The shapes are DeformUX-Net's four stages at two patches of 96 x 96 x 96; 3 x 3 x 3 depthwise, padding 1. Each part is
added to data/deform_conv3d_gpu.json and the section deform_conv3d_gpu of operator_gpu.md as soon as it is measured;
parts of earlier runs on the same machine stay. `--tune` tries launch shapes instead; `--compare-forward` prints the
times and errors of the forward's kernels at every stage, large and small, and `--tune-backward` the backward's kernel
by kernel.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from benchmarks.common.gpu_peers import Operator, compiled_kernels, grid_samples, im2col_gemm, tvdcn_operator
from benchmarks.common.gpu_results import COMPILED, GRID, IM2COL, OURS, TVDCN, Results, Row
from benchmarks.common.gpu_timing import Progress, Stopwatch, gather_floor_ms, kernel_times, peak_bytes, profiled
from benchmarks.common.machine import machine_lines
from benchmarks.common.report import add_results
from torch import Tensor
from torch.nn import functional as F

from deform3d import deform_conv3d

BATCH = 2
STAGES = ((48, 48), (96, 24), (192, 12), (384, 6))
DTYPES = (torch.float32, torch.bfloat16)
LAYOUTS = {"channels-last": torch.channels_last_3d, "contiguous": torch.contiguous_format}
SIGMAS = (1.0, 0.3)


def operator(input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return deform_conv3d(input, offset, weight, bias, padding=1, backend="cuda")


def arguments(
    channels: int, size: int, dtype: torch.dtype, layout: str, sigma: float, device: str = "cuda"
) -> list[Tensor]:
    """Return the leaves input, offset, weight and bias."""
    generator = torch.Generator().manual_seed(0)
    volumes = [torch.randn(BATCH, n, *(size,) * 3, generator=generator) for n in (channels, 81)]
    volumes[1] *= sigma
    others = torch.randn(channels, 1, 3, 3, 3, generator=generator), torch.randn(channels, generator=generator)
    placed = [t.to(device, dtype, memory_format=LAYOUTS[layout]) for t in volumes]
    return [t.requires_grad_() for t in (*placed, *(t.to(device, dtype) for t in others))]


def train(function: Operator, tensors: list[Tensor], direction: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(function(*tensors), tensors, direction)


def check_agreement(functions: dict[str, Operator]) -> dict[str, float]:
    """Return the largest relative error of outputs and gradients on a small case; exit if one is wrong."""
    given = arguments(6, 7, torch.float32, "contiguous", 1.0)
    with torch.no_grad():
        given[1].mul_(16).floor_().add_(0.5).div_(16)  # no sample at a whole position, where there is no derivative
    direction = torch.randn_like(given[0])
    exact = [t.detach().cpu().double().requires_grad_() for t in given]

    def oracle(*tensors: Tensor) -> Tensor:
        return deform_conv3d(*tensors, padding=1, backend="reference")

    expected = (oracle(*exact), *train(oracle, exact, direction.cpu().double()))
    errors = {}
    for name, function in functions.items():
        actual = (function(*given), *train(function, given, direction))
        errors[name] = max(
            float((a.detach().cpu().double() - e.detach()).norm() / e.detach().norm())
            for a, e in zip(actual, expected, strict=True)
        )
        if not errors[name] < 1e-5:
            sys.exit(
                f"{name}: got a relative error of {errors[name]:.1e} against the float64 reference; below 1e-5 expected"
            )
    return errors


class Benchmark:
    """The parts of the benchmark; each method returns the results of one part."""

    def __init__(self, seconds: float, progress: Progress) -> None:
        self.watch, self.progress = Stopwatch(seconds), progress
        self.multiprocessors = torch.cuda.get_device_properties().multi_processor_count

    def row(
        self, name: str, function: Operator, channels: int, size: int, dtype: torch.dtype, layout: str, sigma: float
    ) -> dict[str, Any]:
        tensors = arguments(channels, size, dtype, layout, sigma)
        direction = torch.randn_like(tensors[0])
        with torch.no_grad():
            forward = self.watch.milliseconds(lambda: function(*tensors))
        training = self.watch.milliseconds(lambda: train(function, tensors, direction))
        floor = gather_floor_ms(channels, size, BATCH, dtype.itemsize, self.multiprocessors, self.watch.clock_hz)
        row = Row(name, BATCH, channels, size, _name(dtype), layout, sigma, forward, training, floor)
        self.progress.step(
            f"{name} {row.shape} {row.dtype} {layout} offsets {sigma:g}: {forward:.3f} ms, {training:.3f} ms"
        )
        return asdict(row)

    def operator(self) -> list[dict[str, Any]]:
        check_agreement({OURS: operator})
        return [
            self.row(OURS, operator, *stage, dtype, layout, sigma)
            for stage in STAGES
            for dtype in DTYPES
            for layout in LAYOUTS
            for sigma in SIGMAS
        ]

    def deterministic(self) -> list[dict[str, Any]]:
        torch.use_deterministic_algorithms(True)
        try:
            return [
                self.row(OURS, operator, *stage, dtype, "channels-last", 1.0) for stage in STAGES for dtype in DTYPES
            ]
        finally:
            torch.use_deterministic_algorithms(False)

    def _peers(self, functions: dict[str, Operator], dtypes: Sequence[torch.dtype] = DTYPES) -> list[dict[str, Any]]:
        check_agreement(functions)
        return [
            {**self.row(name, function, *stage, dtype, "contiguous", 1.0), "layout": ""}
            for dtype in dtypes
            for name, function in functions.items()
            for stage in STAGES
        ]

    def peers(self) -> list[dict[str, Any]]:
        return self._peers({IM2COL: im2col_gemm(), GRID: grid_samples})

    def tvdcn(self) -> dict[str, Any]:
        try:
            function = tvdcn_operator()
        except ImportError as error:
            return {"skipped": str(error)}
        return {"rows": self._peers({TVDCN: function}, [torch.float32])}

    def compiled_peers(self) -> list[dict[str, Any]]:
        fused = {IM2COL: im2col_gemm(compiled_kernels()), GRID: torch.compile(grid_samples, dynamic=True)}
        return self._peers({name + COMPILED: function for name, function in fused.items()})

    def fused(self) -> list[dict[str, Any]]:
        rows = []
        for channels, size in STAGES:
            for dtype in DTYPES:
                input, _, weight, bias = arguments(channels, size, dtype, "channels-last", 1.0)
                shape = (81, channels, 1, 1, 1)
                generator = torch.Generator().manual_seed(0)
                offset_weight = (torch.randn(shape, generator=generator) / channels**0.5).to(input)
                both, fused = _both_and_fused(input, offset_weight, weight, bias)
                with torch.inference_mode():
                    times = [self.watch.milliseconds(run) for run in (both, fused)]
                    peaks = [peak_bytes(run) / 1e6 for run in (both, fused)]
                row = {"shape": f"{BATCH}×{channels}×{size}³", "dtype": _name(dtype)}
                row |= dict(zip(("both_ms", "fused_ms", "both_mb", "fused_mb"), (*times, *peaks), strict=True))
                rows.append(row)
                self.progress.step(f"fused offsets {row['shape']} {row['dtype']}: {times[0]:.3f} -> {times[1]:.3f} ms")
        return rows

    def kernels(self) -> dict[str, list[dict[str, Any]]]:
        """Time one forward and backward of the first stage kernel by kernel."""
        tables = {}
        for dtype in DTYPES:
            for sigma in SIGMAS:
                for deterministic in (False, True):
                    tensors = arguments(*STAGES[0], dtype, "channels-last", sigma)
                    direction = torch.randn_like(tensors[0])
                    torch.use_deterministic_algorithms(deterministic)
                    try:
                        result = profiled(lambda t=tensors, d=direction: train(operator, t, d), 20)
                    finally:
                        torch.use_deterministic_algorithms(False)
                    title = f"{_name(dtype)}, offsets {sigma:g}{', deterministic' if deterministic else ''}"
                    tables[title] = kernel_times(result.events(), 20)
                    self.progress.step(f"kernels, {title}")
        return tables

    def network(self) -> dict[str, Any]:
        try:
            from benchmarks.common.gpu_network import training_steps
        except ImportError as error:
            return {"skipped": f"not measured: the network cannot be imported here ({error})"}
        return training_steps(self.progress)


def _both_and_fused(
    input: Tensor, offset_weight: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    offset_bias = torch.zeros(81).to(input)
    return (
        lambda: operator(input, F.conv3d(input, offset_weight, offset_bias), weight, bias),
        # The operator itself: the function in front takes it only where memory is short.
        lambda: torch.ops.deform3d.deform_conv3d_fused_offset(input, offset_weight, offset_bias, weight, bias),
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# The most valuable first, in case time runs out; with the number of progress lines of each.
PARTS = {
    "operator": 32,
    "deterministic": 8,
    "fused": 8,
    "kernels": 8,
    "network": 2,
    "peers": 16,
    "tvdcn": 4,
    "compiled-peers": 16,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    add_results(parser)
    parser.add_argument("--seconds", type=float, default=0.4, help="time for each measurement")
    parser.add_argument("--tune", action="store_true", help="try launch shapes instead")
    parser.add_argument(
        "--compare-forward", action="store_true", help="time the forward's kernels side by side instead"
    )
    parser.add_argument("--tune-backward", action="store_true", help="time the backward's kernels instead")
    options = parser.parse_args()
    if options.rewrite:
        Results.rewrite(options.results)
        return
    if not torch.cuda.is_available():
        sys.exit("deform_conv3d_gpu.py: got no CUDA device, expected one; run it on a machine with an NVIDIA GPU.")
    if options.compare_forward:
        from benchmarks.common.gpu_forward import time_forward

        print(*machine_lines(), sep="\n")
        list(time_forward(Stopwatch(options.seconds / 8)))
        return
    if options.tune_backward:
        from benchmarks.common.gpu_backward import tune_backward

        tune_backward(options.seconds / 8)
        return
    results = Results.resume(options.results, machine_lines())
    if options.tune:
        from benchmarks.common.gpu_tuning import tune

        cases = [arguments(*stage, dtype, "channels-last", 1.0) for stage in STAGES for dtype in DTYPES]
        results.keep("tuning", tune(Stopwatch(options.seconds / 4), cases))
        return
    benchmark = Benchmark(options.seconds, Progress(sum(PARTS[part] for part in options.parts)))
    for part in options.parts:
        results.keep(part, getattr(benchmark, part.replace("-", "_"))())
    print(results.text())


if __name__ == "__main__":
    main()
