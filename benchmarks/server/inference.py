"""What the app's segmentation task costs beyond the network itself, on a whole CT.

``python -m benchmarks.server.inference`` writes ``results/inference.md`` and ``results/inference.json``. The weights
are untrained: their values change nothing about the time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from benchmarks.common.machine import machine_lines

from deformux.data.preprocessing import Preprocessing
from deformux.networks.deformux_net import DeformUXNet
from deformux.networks.model_file import ModelCard
from deformux.networks.precision import mixed_precision
from deformux_label.lib.configs.project import Project
from deformux_label.lib.infers.click_cache import ClickCache
from deformux_label.lib.infers.model_loader import ServedModels
from deformux_label.lib.infers.segmentation import Segmentation
from deformux_label.lib.requests.inference import InferenceOptions, InferenceRequest, RequestedScan

HERE = Path(__file__).resolve().parents[1]
SCAN = HERE.parent.parent / "shared" / "data" / "ct" / "example_ct.nii.gz"
LIMIT = 1.15


def main() -> None:
    """Measure, print, and keep the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scan", type=Path, default=SCAN)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--labels", type=int, default=13)
    parser.add_argument("--patch", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    project = Project(
        labels=tuple(f"organ_{n}" for n in range(1, args.labels + 1)),
        preset=args.preset,
        preprocessing=Preprocessing(patch_size=(args.patch,) * 3),
    )
    with tempfile.TemporaryDirectory() as state:
        task = Segmentation(project, _published(project, Path(state)), ClickCache(0))
        runs = [_run(task, args.scan, device) for _ in range(args.repeats + 1)][1:]  # the first one compiles
    ratio = statistics.median(run["seconds"] / (run["windows"] * run["call_s"]) for run in runs)
    result = {
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
    text = _table(result)
    print(text)
    (HERE / "results" / "inference.md").write_text(text)
    (HERE / "results" / "inference.json").write_text(json.dumps(result, indent=2) + "\n")


def _published(project: Project, state: Path) -> ServedModels:
    models = ServedModels(project, state)
    network = DeformUXNet(1, len(project.labels) + 1, project.preset)
    card = ModelCard(labels=project.labels, preprocessing=project.preprocessing, preset=project.preset)
    models.versions.publish(models.versions.write(network, card))
    return models


def _run(task: Segmentation, scan: Path, device: str) -> dict[str, Any]:
    """One request; single calls of the network on one window are timed before and after it, under the same load."""
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


def _table(result: dict[str, Any]) -> str:
    parts = result["parts_s"]
    lines = [
        "# Inference: the whole task against the network alone",
        "",
        f"`{result['scan']}`, preset `{result['preset']}`, {result['labels']} labels, windows of {result['window']}³,",
        f"{result['device']}; medians. The task as served: read, prepare, segment, restore the grid, write.",
        "",
        "| windows | one network call | windows × call | whole task | ratio | limit |",
        "|---|---|---|---|---|---|",
        f"| {result['windows']} | {result['call_s']:.3f} s | {result['windows'] * result['call_s']:.2f} s "
        f"| {result['task_s']:.2f} s | **{result['ratio']:.3f}** | {result['limit']} |",
        "",
        f"Of the task: prepare {parts['pre']:.2f} s, windows {parts['infer']:.2f} s, restore {parts['post']:.2f} s, "
        f"write {parts['write']:.2f} s.",
        "",
        *[f"- {line}" for line in result["machine"]],
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
