"""Speedup by ``deformux.networks.fast_cpu_conv`` in float32: training steps and segmentations of `tiny`.

    python -m benchmarks.operator.convolution [--threads 1]

Both ways alternate within one run, and the medians of these pairs are compared. Writes data/convolution.json and the
section convolution of training_speed.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import torch
from benchmarks.common.machine import machine_lines
from benchmarks.common.report import Section, add_results, bullets, markdown_table, measure_and_write
from benchmarks.common.steps import training_step
from benchmarks.common.turns import in_turns
from torch import nn

from deformux.networks.deformux_net import DeformUXNet
from deformux.networks.fast_cpu_conv import Conv3d, InstanceNorm3d

PLAIN = {Conv3d: nn.Conv3d, InstanceNorm3d: nn.InstanceNorm3d}
OURS = {plain: own for own, plain in PLAIN.items()}
# Patch sizes of the benchmarks on the hippocampus data, at 1.5 and 1 mm, and of a CT.
PROBLEMS = [(1, (32, 48, 32)), (2, (32, 48, 32)), (1, (48, 64, 48)), (1, (96, 96, 96))]


def main() -> None:
    """Measure, print, and keep the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=5)
    add_results(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    measure_and_write(arguments, "convolution", lambda: measured(arguments.pairs), section)


def measured(pairs: int) -> dict[str, Any]:
    """Time both implementations on all problems."""
    rows = []
    for batch, size in PROBLEMS:
        network = DeformUXNet(1, 3, "tiny")
        runs = {"training step": training_step(network, batch, size)}
        if batch == 1:
            runs["segmentation"] = _call(network, size)
        for name, run in runs.items():
            rows.append({"what": name, "batch": batch, "size": size, **_both_ways(network, run, pairs)})
            print(rows[-1], flush=True)
    return {"rows": rows, "machine": machine_lines()}


def section(data: Mapping[str, Any]) -> Section:
    """Write the seconds of both implementations as a table."""
    rows = [
        (
            *(row["what"], row["batch"], "×".join(map(str, row["size"]))),
            *(f"{row['plain_s']:.2f}", f"{row['ours_s']:.2f}", f"{row['ratio']:.2f}"),
        )
        for row in data["rows"]
    ]
    return Section(
        "training_speed",
        "convolution",
        "Float32 convolutions and instance norms on the CPU",
        [
            "`tiny`, float32, seconds; PyTorch's own choice of implementation and",
            "`deformux.networks.fast_cpu_conv`, in turns; a training step is forward, loss, backward and AdamW.",
            "",
            *markdown_table(
                ("", "batch", "voxels", "PyTorch's choice", "deformux.networks.fast_cpu_conv", "ratio"), rows
            ),
            *bullets(data["machine"]),
        ],
    )


def _call(network: DeformUXNet, size: tuple[int, ...]) -> Callable[[], None]:
    image = torch.randn(1, 1, *size)

    @torch.inference_mode()
    def run() -> None:
        network.eval()
        network(image)

    return run


def _both_ways(network: nn.Module, run: Callable[[], None], pairs: int) -> dict[str, float]:
    def with_classes(classes: dict[type[nn.Module], type[nn.Module]]) -> None:
        for module in network.modules():
            module.__class__ = classes.get(type(module), type(module))
        run()

    plain, ours, ratio = in_turns(lambda: with_classes(PLAIN), lambda: with_classes(OURS), pairs)
    return {"plain_s": plain, "ours_s": ours, "ratio": ratio}


if __name__ == "__main__":
    main()
