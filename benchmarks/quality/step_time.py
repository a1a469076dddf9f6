"""Milliseconds of a training step on a GPU: launch by launch, from CUDA graphs, and compiled besides.

    python -m benchmarks.quality.step_time                                    # all rows
    python -m benchmarks.quality.step_time --rows "DeformUX-Net tiny" --no-compile
    python -m benchmarks.quality.step_time --prepare                          # only compile, for the next call

Whole steps of ``deformux.fitting.training_step`` on random patches in pinned memory: copy, forward, loss, backward,
clipping, AdamW, moving average, reading the loss. Writes quality_step_time.md, .csv and .png after each row.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks.common.command import RECIPE, RESULTS, run
from benchmarks.common.machine import machine_lines
from benchmarks.common.networks import OURS, build
from benchmarks.common.report import figure, table, write_report
from matplotlib.figure import Figure
from monai.utils import set_determinism

from deformux.fitting.compilation import Compilation
from deformux.fitting.optimizer import make_average, make_optimizer
from deformux.fitting.training_step import LossReader, TrainingStep

CLASSES, BATCH = 3, 2
SMALL, LARGE = (32, 48, 32), (96, 96, 96)
LAUNCHES, GRAPHS, COMPILED = "launches", "graphs", "compiled and graphs"


@dataclass(frozen=True)
class Row:
    """A network on one shape of batch."""

    network: str
    size: str
    patch: tuple[int, int, int]

    @property
    def title(self) -> str:
        return f"{self.network} {self.size}"


ROWS = {
    row.title: row
    for row in (
        Row(OURS, "tiny", SMALL),
        Row("DynUNet", "tiny", SMALL),
        Row(OURS, "small", SMALL),
        Row("DynUNet", "small", SMALL),
        Row(OURS, "base", LARGE),
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.step_time",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), help="what to measure")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each time")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--cache", type=Path, help="folder of compiled networks, for later calls")
    parser.add_argument("--prepare", action="store_true", help="fill the cache and measure nothing")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise ValueError("got no CUDA device, expected one; run it on a machine with an NVIDIA GPU")
    ways = [LAUNCHES, GRAPHS, *([COMPILED] if arguments.compile else [])]
    results: list[tuple[Row, dict[str, dict[str, float]]]] = []
    for number, title in enumerate(arguments.rows):
        row = ROWS[title]
        measured = {}
        for way in [COMPILED] if arguments.prepare else ways:
            print(f"{number + 1} of {len(arguments.rows)}: {title}, {way} ...", flush=True)
            measured[way] = milliseconds(row, way, seconds=arguments.seconds, cache=arguments.cache)
            print(f"  {measured[way]}", flush=True)
        results.append((row, measured))
        if not arguments.prepare:
            _write(arguments.results, results, ways)


def milliseconds(row: Row, way: str, *, seconds: float, cache: Path | None) -> dict[str, float]:
    """Times per step: whole, what the host takes for it, and the first one's seconds."""
    set_determinism(0)
    network = build(row.network, row.size, classes=CLASSES, patch=row.patch).cuda()
    recipe = RECIPE.replace(steps=10_000, batch_size=BATCH)
    optimizer, average = make_optimizer(network, recipe), make_average(network, recipe)
    device = torch.device("cuda", torch.cuda.current_device())
    step = TrainingStep(network, optimizer, average, recipe, clicks=None, device=device, capture=way != LAUNCHES)
    shape = (BATCH, 1, *row.patch)
    image, label = torch.randn(shape).pin_memory(), torch.randint(0, CLASSES, shape, dtype=torch.uint8).pin_memory()
    annotated = torch.ones(BATCH, CLASSES, dtype=torch.bool)
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    if way == COMPILED:
        compiler = Compilation({"row": row.title}, cache=cache)
        compiler.begin()
        step.compile()
    for number in range(1, 6):
        step(number, image, label, annotated)
    torch.cuda.synchronize()
    first = time.perf_counter() - began
    if way == COMPILED:
        compiler.end()
    reader = LossReader(device)
    taken, host = 0, 0.0
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        before = time.perf_counter()
        loss = step(taken + 6, image, label, annotated)
        host += time.perf_counter() - before
        reader.add(loss)
        taken += 1
    reader.rest()
    whole = time.perf_counter() - began
    return {
        "ms": 1e3 * whole / taken,
        "host_ms": 1e3 * host / taken,
        "first_s": first,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
    }


def _write(folder: Path, results: Sequence[tuple[Row, dict[str, dict[str, float]]]], ways: Sequence[str]) -> None:
    heads = ("network", "batch", "how", "ms per step", "of it the host", "first five steps s", "peak memory GB")
    rows: list[list[Any]] = [
        [
            *(row.title, "×".join(map(str, (BATCH, *row.patch))), way, f"{own['ms']:.2f}", f"{own['host_ms']:.2f}"),
            *(f"{own['first_s']:.1f}", f"{own['peak_gb']:.2f}"),
        ]
        for row, measured in results
        for way, own in measured.items()
    ]
    write_report(
        folder,
        "step_time",
        title="Milliseconds of a training step on a GPU",
        lines=[
            *(f"- {line}" for line in machine_lines()),
            f"- bfloat16, {CLASSES} classes, every class annotated; a step is copy, forward, loss, backward, clipping, "
            "AdamW and moving average, and its loss is read one step later",
            "- the host's time is that of the call, in which it may wait for the GPU",
            "",
            *table(heads, rows),
        ],
        rows=[tuple(heads), *map(tuple, rows)],
        plot=_plot(results, ways),
    )


def _plot(results: Sequence[tuple[Row, dict[str, dict[str, float]]]], ways: Sequence[str]) -> Figure:
    plot = figure(height=1.6 + 0.6 * len(results))
    axes = plot.add_subplot()
    height = 0.8 / len(ways)
    for i, way in enumerate(ways):
        at = [len(results) - index - i * height for index in range(len(results))]
        axes.barh(at, [measured[way]["ms"] for _, measured in results], height, label=way)
    axes.set_yticks([len(results) - index for index in range(len(results))], [row.title for row, _ in results])
    axes.set_xscale("log")
    axes.set_xlabel("milliseconds per step")
    axes.legend(frameon=False, fontsize=8)
    return plot


if __name__ == "__main__":
    run(main)
