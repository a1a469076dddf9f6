"""Milliseconds of a training step on a GPU: launch by launch, from CUDA graphs, and compiled too.

    python -m benchmarks.quality.step_time                                    # all rows
    python -m benchmarks.quality.step_time --rows "DeformUX-Net tiny" --no-compile
    python -m benchmarks.quality.step_time --prepare                          # only compile, for the next call

Whole steps of ``deformux.fitting.training_step`` on random patches in pinned memory: copy, forward, loss, backward,
clipping, AdamW, moving average, reading the loss. Writes data/step_time.json and the section quality_step_time of
training_speed.md after each network.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks.common.command import RECIPE, run_command
from benchmarks.common.machine import machine_lines
from benchmarks.common.networks import OURS, build
from benchmarks.common.plots import figure
from benchmarks.common.report import Section, add_results, bullets, markdown_table, measure_and_write
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
    add_results(parser)
    arguments = parser.parse_args()
    if arguments.prepare:
        for _ in measured(arguments, [COMPILED]):
            pass
    else:
        ways = [LAUNCHES, GRAPHS, *([COMPILED] if arguments.compile else [])]
        measure_and_write(arguments, "step_time", lambda: measured(arguments, ways), section)


def measured(arguments: argparse.Namespace, ways: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Time one network after the other; yield the data so far after each."""
    if not torch.cuda.is_available():
        raise ValueError("got no CUDA device, expected one; run it on a machine with an NVIDIA GPU")
    rows: list[dict[str, Any]] = []
    for number, title in enumerate(arguments.rows):
        row = ROWS[title]
        for way in ways:
            print(f"{number + 1} of {len(arguments.rows)}: {title}, {way} ...", flush=True)
            times = milliseconds(row, way, seconds=arguments.seconds, cache=arguments.cache)
            print(f"  {times}", flush=True)
            rows.append({"network": row.title, "batch": "×".join(map(str, (BATCH, *row.patch))), "way": way, **times})
        yield {"machine": machine_lines(), "rows": rows}


def milliseconds(row: Row, way: str, *, seconds: float, cache: Path | None) -> dict[str, float]:
    """Return the times of a step, of the host's part of it and of the first steps, and the peak memory."""
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


def section(data: Mapping[str, Any]) -> Section:
    """Write the times as a table and a plot."""
    heads = ("network", "batch", "how", "ms per step", "of it the host", "first five steps s", "peak memory GB")
    rows = [
        [
            *(row["network"], row["batch"], row["way"], f"{row['ms']:.2f}", f"{row['host_ms']:.2f}"),
            *(f"{row['first_s']:.1f}", f"{row['peak_gb']:.2f}"),
        ]
        for row in data["rows"]
    ]
    return Section(
        "training_speed",
        "quality_step_time",
        "Milliseconds of a training step on a GPU",
        [
            *bullets(data["machine"]),
            f"- bfloat16, {CLASSES} classes, every class annotated; a step is copy, forward, loss, backward, clipping, "
            "AdamW and moving average, and its loss is read one step later",
            "- the host's time is that of the call, in which it may wait for the GPU",
            "",
            *markdown_table(heads, rows),
        ],
        _plot(data["rows"]),
    )


def _plot(rows: Sequence[Mapping[str, Any]]) -> Figure:
    networks, ways = (list(dict.fromkeys(row[key] for row in rows)) for key in ("network", "way"))
    plot = figure(height=1.6 + 0.6 * len(networks))
    axes = plot.add_subplot()
    height = 0.8 / len(ways)
    for index, way in enumerate(ways):
        own = [row for row in rows if row["way"] == way]
        at = [len(networks) - networks.index(row["network"]) - index * height for row in own]
        axes.barh(at, [row["ms"] for row in own], height, label=way)
    axes.set_yticks([len(networks) - index for index in range(len(networks))], networks)
    axes.set_xscale("log")
    axes.set_xlabel("milliseconds per step")
    axes.legend(frameon=False, fontsize=8)
    return plot


if __name__ == "__main__":
    run_command(main)
