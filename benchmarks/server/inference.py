"""The cost of the app's segmentation task beyond the network itself, on a whole CT.

    python -m benchmarks.server.inference

The weights are untrained: their values do not change the time. Writes data/inference.json and the section inference of
inference.md.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from benchmarks.common.machine import machine_lines
from benchmarks.common.places import CT
from benchmarks.common.report import Section, add_results, bullets, markdown_table, measure_and_write

from deformux.data.choices import Choices
from deformux.networks.deformux_net import DeformUXNet
from deformux.networks.model_file import ModelCard
from deformux.networks.precision import mixed_precision
from deformux_label.lib.configs.project import Project
from deformux_label.lib.infers.click_cache import ClickCache
from deformux_label.lib.infers.model_loader import ServedModels
from deformux_label.lib.infers.segmentation import Segmentation
from deformux_label.lib.requests.inference import InferenceOptions, InferenceRequest, RequestedScan

LIMIT = 1.15


def main() -> None:
    """Measure, print, and keep the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scan", type=Path, default=CT / "example_ct.nii.gz")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--labels", type=int, default=13)
    parser.add_argument("--patch", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    add_results(parser)
    args = parser.parse_args()
    measure_and_write(args, "inference", lambda: measured(args), section)


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Time the task and single calls of its network."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    project = Project(
        labels=tuple(f"organ_{n}" for n in range(1, args.labels + 1)),
        choices=Choices("ct", spacing_mm="native", patch_size=(args.patch,) * 3, preset=args.preset),
    )
    with tempfile.TemporaryDirectory() as state:
        task = Segmentation(project, _published(project, Path(state)), ClickCache(0))
        runs = [_run(task, args.scan, device) for _ in range(args.repeats + 1)][1:]  # the first one compiles
    ratio = statistics.median(run["seconds"] / (run["windows"] * run["call_s"]) for run in runs)
    return {
        "scan": args.scan.name,
        "preset": args.preset,
        "labels": args.labels,
        "window": args.patch,
        "device": device,
        "windows": runs[0]["windows"],
        "call_s": statistics.median(run["call_s"] for run in runs),
        "task_s": statistics.median(run["seconds"] for run in runs),
        "ratio": ratio,
        "limit": LIMIT,
        "parts_s": {key: statistics.median(run["parts"][key] for run in runs) for key in runs[0]["parts"]},
        "runs": runs,
        "machine": machine_lines(),
    }


def _published(project: Project, state: Path) -> ServedModels:
    models = ServedModels(project, state)
    network = DeformUXNet(1, len(project.labels) + 1, project.preset)
    card = ModelCard(labels=project.labels, preprocessing=project.preprocessing, preset=project.preset)
    models.versions.publish(models.versions.write(network, card))
    return models


def _run(task: Segmentation, scan: Path, device: str) -> dict[str, Any]:
    """Time one request, and before and after it, under the same load, single calls of the network on one window."""
    network, card = task.models.load("v0001", device)
    window = torch.rand(1, 1, *card.preprocessing.patch_size, device=device)
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    before = [_call(network, window) for _ in range(3)]
    hook = network.register_forward_pre_hook(count)
    start = time.perf_counter()
    options = InferenceOptions(device=device, result_extension=".nrrd", result_dtype="uint8")
    file, params = task(InferenceRequest(scan=RequestedScan(str(scan), keep=False), options=options))
    seconds = time.perf_counter() - start
    hook.remove()
    after = [_call(network, window) for _ in range(3)]
    Path(str(file)).unlink()
    parts = {key: params["latencies"][key] for key in ("pre", "infer", "post", "write")}
    return {"seconds": seconds, "windows": calls, "call_s": statistics.median(before + after), "parts": parts}


@torch.inference_mode()
def _call(network: DeformUXNet, window: torch.Tensor) -> float:
    start = time.perf_counter()
    with mixed_precision(window.device):
        network(window)
    if window.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def section(data: Mapping[str, Any]) -> Section:
    """Write the times as a table."""
    parts = data["parts_s"]
    row = (
        *(data["windows"], f"{data['call_s']:.3f} s", f"{data['windows'] * data['call_s']:.2f} s"),
        *(f"{data['task_s']:.2f} s", f"**{data['ratio']:.3f}**", data["limit"]),
    )
    heads = ("windows", "one network call", "windows × call", "whole task", "ratio", "limit")
    lines = [
        f"`{data['scan']}`, preset `{data['preset']}`, {data['labels']} labels, windows of {data['window']}³,",
        f"{data['device']}; medians. The task as served: read, prepare, segment, restore the grid, write.",
        "",
        *markdown_table(heads, [row]),
        f"Of the task: prepare {parts['pre']:.2f} s, windows {parts['infer']:.2f} s, restore {parts['post']:.2f} s, "
        f"write {parts['write']:.2f} s.",
        "",
        *bullets(data["machine"]),
    ]
    return Section("inference", "inference", "The whole task and the network alone", lines)


if __name__ == "__main__":
    main()
