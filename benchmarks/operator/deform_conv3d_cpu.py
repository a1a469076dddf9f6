"""The CPU operator and what PyTorch offers without it: the sum of 27 `grid_sample` calls.

    python -m benchmarks.operator.deform_conv3d_cpu

Writes data/deform_conv3d_cpu.json and the section deform_conv3d_cpu of operator_cpu.md.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks.common.machine import machine_lines
from benchmarks.common.report import Section, add_results, bullets, markdown_table, measure_and_write
from torch import Tensor
from torch.nn import functional as F

from deform3d import deform_conv3d

SHAPES = ((48, 48), (96, 24), (192, 12), (384, 6))
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last_3d}
TARGETS = {"forward": 25.0, "training": 12.0, "memory": 2.0}
HOW = """\
The operator and the sum of 27 `grid_sample` calls, which is what PyTorch offers without it.

The shapes are DeformUX-Net's four stages at a patch of 96 x 96 x 96; 3 x 3 x 3 depthwise, padding 1, offsets
normal(0, 1), float32. Both sides get the same contiguous tensors; a second line per shape has channels-last ones, which
the operator prefers and the network gives it. Times are medians.

Memory is the peak of the resident set over a forward and backward, less the resident set before and the output: all
gradients and all that is temporary. It is given as a multiple of the bytes of the operator's inputs and output, at as
many samples as bring these to 64 MB, because the system counts resident pages only roughly.
"""


@dataclass(frozen=True)
class Row:
    """Times in milliseconds; `training` is forward and backward."""

    shape: tuple[int, ...]
    layout: str
    forward_ms: float
    training_ms: float
    composite_forward_ms: float
    composite_training_ms: float
    memory_ratio: float

    @property
    def forward_ratio(self) -> float:
        return self.composite_forward_ms / self.forward_ms

    @property
    def training_ratio(self) -> float:
        return self.composite_training_ms / self.training_ms


def composite(input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute a 3 x 3 x 3 depthwise deformable convolution, padding 1, from one `grid_sample` per tap."""
    batch, _, *size = input.shape
    axes = [torch.arange(n, dtype=input.dtype) for n in size]
    centre = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
    scale = input.new_tensor([2 / (n - 1) for n in size])
    shifts = offset.view(batch, 27, 3, *size).permute(1, 0, 3, 4, 5, 2)
    output = bias.view(1, -1, 1, 1, 1)
    for tap in range(27):
        reach = centre + input.new_tensor([tap // 9 - 1, tap // 3 % 3 - 1, tap % 3 - 1])
        grid = ((reach + shifts[tap]) * scale - 1).flip(-1)
        sampled = F.grid_sample(input, grid, mode="bilinear", padding_mode="zeros", align_corners=True)
        output = output + sampled * weight[:, 0, tap // 9, tap // 3 % 3, tap % 3].view(1, -1, 1, 1, 1)
    return output


def operator(input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return deform_conv3d(input, offset, weight, bias, padding=1, backend="cpu")


def arguments(channels: int, size: int, layout: str, *, batch: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    volumes = [torch.randn(batch, n, size, size, size, generator=generator) for n in (channels, 81)]
    volumes = [volume.contiguous(memory_format=LAYOUTS[layout]) for volume in volumes]
    weight = torch.randn(channels, 1, 3, 3, 3, generator=generator)
    return [t.requires_grad_() for t in (*volumes, weight, torch.randn(channels, generator=generator))]


def train(function: Callable[..., Tensor], tensors: list[Tensor], direction: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(function(*tensors), tensors, direction)


def milliseconds(run: Callable[[], object], seconds: float) -> float:
    """Return the median over as many runs as fit, at least three, after one to warm up."""
    run()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < seconds and len(times) < 200):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def check_agreement() -> None:
    """Check that both sides and the oracle give the same output and gradients."""
    tensors = arguments(16, 7, "contiguous")
    tensors = [t.detach().double().requires_grad_() for t in tensors]
    direction = torch.randn(tensors[0].shape, dtype=torch.float64)

    def oracle(*tensors: Tensor) -> Tensor:
        return deform_conv3d(*tensors, padding=1, backend="reference")

    results = [(f(*tensors), *train(f, tensors, direction)) for f in (oracle, operator, composite)]
    for expected, ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(theirs, expected)


def timed_shape(channels: int, size: int, seconds: float) -> list[Row]:
    tensors = arguments(channels, size, "contiguous")
    direction = torch.randn_like(tensors[0])
    with torch.no_grad():
        torch.testing.assert_close(operator(*tensors), composite(*tensors), rtol=1e-3, atol=1e-3)
        base_forward = milliseconds(lambda: composite(*tensors), seconds)
    base_training = milliseconds(lambda: train(composite, tensors, direction), seconds)
    rows = []
    for layout in LAYOUTS:
        tensors = arguments(channels, size, layout)
        direction = direction.contiguous(memory_format=LAYOUTS[layout])
        with torch.no_grad():
            forward = milliseconds(lambda tensors=tensors: operator(*tensors), seconds)
        training = milliseconds(lambda tensors=tensors, d=direction: train(operator, tensors, d), seconds)
        memory = memory_ratio(channels, size, layout)
        rows.append(Row((1, channels, *(size,) * 3), layout, forward, training, base_forward, base_training, memory))
    return rows


def memory_ratio(channels: int, size: int, layout: str) -> float:
    """Measure in a fresh process, whose memory nothing else has shaped."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.operator.deform_conv3d_cpu",
        "--memory",
        str(channels),
        str(size),
        layout,
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout)


def print_memory_ratio(channels: int, size: int, layout: str) -> None:
    small = arguments(channels, 4, layout)
    train(operator, small, torch.ones_like(small[0]))  # load the kernels
    batch = max(1, 2**26 // (4 * (2 * channels + 81) * size**3))
    tensors = arguments(channels, size, layout, batch=batch)
    direction = torch.randn_like(tensors[0])
    counted = sum(t.nbytes for t in tensors) + direction.nbytes  # the output is as large as its gradient
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    train(operator, tensors, direction)
    # The output itself is counted among the inputs and outputs, all gradients beyond them.
    print((_resident("VmHWM") - before - direction.nbytes) / counted)


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"{field} not in /proc/self/status: memory can only be measured on Linux")


def summary(rows: list[Row]) -> dict[str, dict[str, float]]:
    return {
        layout: {
            "forward_ratio": statistics.geometric_mean(r.forward_ratio for r in rows if r.layout == layout),
            "training_ratio": statistics.geometric_mean(r.training_ratio for r in rows if r.layout == layout),
            "memory_ratio": max(r.memory_ratio for r in rows if r.layout == layout),
        }
        for layout in LAYOUTS
    }


def measured(seconds: float) -> dict[str, Any]:
    """Check and measure all shapes."""
    check_agreement()
    rows = [row for channels, size in SHAPES for row in timed_shape(channels, size, seconds)]
    means = summary(rows)
    assert all(math.isfinite(value) for mean in means.values() for value in mean.values())
    return {"machine": machine_lines(), "targets": TARGETS, "means": means, "rows": [asdict(row) for row in rows]}


def section(data: Mapping[str, Any]) -> Section:
    """Write times, ratios and memory as a table."""
    heads = ("input", "layout", "forward ms", "composite ms", "ratio", "training ms", "composite ms", "ratio", "memory")
    rows = []
    for values in data["rows"]:
        row = Row(**values)
        rows.append(
            (
                *("×".join(map(str, row.shape)), row.layout),
                *(f"{row.forward_ms:.2f}", f"{row.composite_forward_ms:.1f}", f"{row.forward_ratio:.1f}"),
                *(f"{row.training_ms:.2f}", f"{row.composite_training_ms:.1f}", f"{row.training_ratio:.1f}"),
                f"{row.memory_ratio:.2f}",
            )
        )
    for layout, mean in data["means"].items():
        ratios = (f"**{mean['forward_ratio']:.1f}**", f"**{mean['training_ratio']:.1f}**")
        what = "**geometric mean, worst memory**"
        rows.append((what, layout, "", "", ratios[0], "", "", ratios[1], f"**{mean['memory_ratio']:.2f}**"))
    limits = {name: f"{limit:.0f}" for name, limit in data["targets"].items()}
    rows.append(("target", "", "", "", limits["forward"], "", "", limits["training"], limits["memory"]))
    lines = [HOW, *bullets(data["machine"]), "", *markdown_table(heads, rows)]
    return Section("operator_cpu", "deform_conv3d_cpu", "Depthwise convolution of each stage", lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each measurement")
    parser.add_argument("--memory", nargs=3, metavar=("CHANNELS", "SIZE", "LAYOUT"), help=argparse.SUPPRESS)
    add_results(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory:
        channels, size, layout = options.memory
        print_memory_ratio(int(channels), int(size), layout)
    else:
        measure_and_write(options, "deform_conv3d_cpu", lambda: measured(options.seconds), section)


if __name__ == "__main__":
    main()
