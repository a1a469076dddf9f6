"""What ``deformux.networks.fast_cpu_conv`` saves in float32: training steps and segmentations of `tiny`.

``python -m benchmarks.operator.convolution [--threads 1]`` writes ``convolution.md`` and ``convolution.json``.
Both ways alternate within one run, and the medians of these pairs are compared.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from benchmarks.common.machine import machine_lines
from benchmarks.common.turns import in_turns
from torch import nn

from deformux.fitting.losses import PartialDiceCELoss
from deformux.networks.deformux_net import DeformUXNet
from deformux.networks.fast_cpu_conv import Conv3d, InstanceNorm3d

PLAIN = {Conv3d: nn.Conv3d, InstanceNorm3d: nn.InstanceNorm3d}
OURS = {plain: own for own, plain in PLAIN.items()}
RESULTS = Path(__file__).parents[1] / "results"
# Patch sizes of the benchmarks on the hippocampus data, at 1.5 and 1 mm, and of a CT.
PROBLEMS = [(1, (32, 48, 32)), (2, (32, 48, 32)), (1, (48, 64, 48)), (1, (96, 96, 96))]


def main() -> None:
    """Measure, print, and keep the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for batch, size in PROBLEMS:
        network = DeformUXNet(1, 3, "tiny")
        runs = {"training step": training_step(network, batch, size)}
        if batch == 1:
            runs["segmentation"] = _call(network, size)
        for name, run in runs.items():
            rows.append({"what": name, "batch": batch, "size": size, **_compare(network, run, arguments.pairs)})
            print(rows[-1], flush=True)
    lines = [
        "# Float32 convolutions and instance norms on the CPU",
        "",
        "`tiny`, float32, seconds; PyTorch's own choice of implementation against",
        "`deformux.networks.fast_cpu_conv`, in turns; a training step is forward, loss, backward and AdamW.",
        "",
        "| | batch | voxels | PyTorch's choice | deformux.networks.fast_cpu_conv | ratio |",
        "|---|---|---|---|---|---|",
        *(
            f"| {row['what']} | {row['batch']} | {'×'.join(map(str, row['size']))} | {row['plain_s']:.2f} "
            f"| {row['ours_s']:.2f} | {row['ratio']:.2f} |"
            for row in rows
        ),
        "",
        *(f"- {line}" for line in machine_lines()),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    (RESULTS / "convolution.md").write_text(text)
    (RESULTS / "convolution.json").write_text(json.dumps({"rows": rows, "machine": machine_lines()}, indent=1) + "\n")


def training_step(network: nn.Module, batch: int, size: tuple[int, ...]) -> Callable[[], None]:
    """One step on random patches of ``size`` voxels: forward, loss, backward and AdamW."""
    image, label = torch.randn(batch, 1, *size), torch.randint(0, 3, (batch, 1, *size))
    annotated, loss = torch.ones(batch, 3), PartialDiceCELoss()
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)

    def run() -> None:
        network.train()
        optimizer.zero_grad()
        loss(network(image), label, annotated).backward()
        optimizer.step()

    return run


def _call(network: DeformUXNet, size: tuple[int, ...]) -> Callable[[], None]:
    image = torch.randn(1, 1, *size)

    @torch.inference_mode()
    def run() -> None:
        network.eval()
        network(image)

    return run


def _compare(network: nn.Module, run: Callable[[], None], pairs: int) -> dict[str, float]:
    def with_classes(classes: dict[type[nn.Module], type[nn.Module]]) -> None:
        for module in network.modules():
            module.__class__ = classes.get(type(module), type(module))
        run()

    plain, ours, ratio = in_turns(lambda: with_classes(PLAIN), lambda: with_classes(OURS), pairs)
    return {"plain_s": plain, "ours_s": ours, "ratio": ratio}


if __name__ == "__main__":
    main()
