"""What a click costs in the process that edits, on a GPU: the published `base` network on an abdominal CT.

    python benchmarks/clicks_gpu.py
    python benchmarks/clicks_gpu.py --device cpu --preset tiny --steps 1 --clicks 5    # to try it

A network that learns a few organs of one scan for some steps, so that its answers look like answers; then a robot
annotator clicks into its errors. What HTTP and the session add is in `clicks_server.md`. Writes
results/clicks_gpu.md and .json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from _machine import machine_lines
from torch import Tensor

from deformux.annotator import ClickAnnotator, dense_labels
from deformux.cases import Case
from deformux.editing import Editor, open_study
from deformux.engine import fit
from deformux.network import PRESETS, DeformUXNet
from deformux.recipe import RECIPES
from deformux.transforms import Preprocessing

HERE = Path(__file__).resolve().parent
LABELS = ("liver", "spleen", "stomach")
PREP = Preprocessing("ct", spacing_mm=(1.5, 1.5, 1.5), patch_size=(96, 96, 96))
LIMIT_MS = 150
# Clicks of one session; then another begins.
SESSION = 10


def main() -> None:
    """Measure, print, and keep the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HERE.parents[1] / "shared" / "data" / "ct")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--preset", choices=tuple(PRESETS), default="base")
    parser.add_argument("--steps", type=int, default=60, help="of the training before")
    parser.add_argument("--clicks", type=int, default=50)
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder to write to")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args, scan(args.data, Path(folder))) | {"limit_ms": LIMIT_MS, "machine": machine_lines()}
    text = table(result)
    print(text)
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "clicks_gpu.md").write_text(text)
    (args.results / "clicks_gpu.json").write_text(json.dumps(result, indent=2) + "\n")


def scan(data: Path, folder: Path) -> Case:
    """The labelled CT with `LABELS` as 1, 2, …"""
    names = json.loads((data / "labels.json").read_text())["example_seg.nii.gz"]
    label = nib.load(data / "example_seg.nii.gz")
    dense = dense_labels(np.asarray(label.dataobj), [names[name] for name in LABELS])
    nib.save(nib.Nifti1Image(dense, label.affine), folder / "label.nii.gz")
    return Case("ct", data / "example_ct_sm.nii.gz", folder / "label.nii.gz")


class Timed:
    """A network whose answers are timed, the GPU's work included."""

    def __init__(self, network: DeformUXNet, device: str) -> None:
        self.network, self.device, self.seconds = network, torch.device(device), 0.0

    def __call__(self, image: Tensor, guidance: Tensor) -> Tensor:
        began = time.perf_counter()
        with torch.inference_mode():
            logits = self.network(image, guidance)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds += time.perf_counter() - began
        return logits


def measure(args: argparse.Namespace, case: Case) -> dict[str, Any]:
    """Train, segment, and click; seconds of each."""
    torch.manual_seed(0)
    network = DeformUXNet(1, len(LABELS) + 1, args.preset, guidance=True)
    recipe = RECIPES["finetune"].in_steps(args.steps, epochs=1)
    began = time.perf_counter()
    fit(network, [case], recipe=recipe, prep=PREP, labels=LABELS, device=args.device)
    trained_s = time.perf_counter() - began
    network.to(args.device).eval()
    open_study(network, case.image, PREP, device=args.device)  # compiles what training did not call
    began = time.perf_counter()
    study = open_study(network, case.image, PREP, device=args.device)
    automatic_s = time.perf_counter() - began
    timed = Timed(network, args.device)
    truth = np.asarray(nib.load(case.label).dataobj).astype(np.uint8)
    seconds, in_network = [], []
    for session in range(-1, -(-args.clicks // SESSION)):  # the first warms up
        editor = Editor(study, timed, PREP, device=args.device)
        annotator = ClickAnnotator(len(LABELS), jitter=1.0, seed=session + 1)
        points: dict[int, list[tuple[int, int, int]]] = {}
        shown = study.labels
        for _ in range(SESSION):
            (click,) = annotator.clicks(truth, shown)
            points.setdefault(click.label, []).append(click.voxel)
            timed.seconds, began = 0.0, time.perf_counter()
            shown = editor.apply(points)
            if session >= 0:
                seconds.append(time.perf_counter() - began)
                in_network.append(timed.seconds)
    seconds, in_network = seconds[: args.clicks], in_network[: args.clicks]
    return {
        "preset": args.preset,
        "steps": args.steps,
        "voxels": list(truth.shape),
        "network_voxels": list(study.logits.shape[1:]),
        "window": list(PREP.patch_size),
        "clicks": len(seconds),
        "trained_s": trained_s,
        "automatic_s": automatic_s,
        "median_ms": 1000 * statistics.median(seconds),
        "p95_ms": 1000 * float(np.percentile(seconds, 95)),
        "max_ms": 1000 * max(seconds),
        "network_median_ms": 1000 * statistics.median(in_network),
    }


def table(r: dict[str, Any]) -> str:
    """The results as Markdown."""
    size, inside, window = ("×".join(map(str, r[key])) for key in ("voxels", "network_voxels", "window"))
    lines = [
        "# A click on a GPU",
        "",
        f"Preset `{r['preset']}`, trained for {r['steps']} steps on the CT ({size} voxels, {inside} for the network, "
        f"windows of {window}); {r['clicks']} clicks of a robot into errors, in sessions of {SESSION}.",
        "",
        "| what | measured | target |",
        "|---|---|---|",
        f"| a click, median | **{r['median_ms']:.0f} ms** | {r['limit_ms']} ms |",
        f"| 95th percentile | {r['p95_ms']:.0f} ms (max {r['max_ms']:.0f} ms) | |",
        f"| of it the network, median | {r['network_median_ms']:.0f} ms | |",
        f"| the automatic segmentation | {r['automatic_s']:.2f} s | |",
        f"| the training | {r['trained_s']:.0f} s | |",
        "",
        *(f"- {line}" for line in r["machine"]),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
