"""The cost of a click in the process that edits, on a GPU: the published `base` network on an abdominal CT.

    python -m benchmarks.server.clicks_gpu
    python -m benchmarks.server.clicks_gpu --device cpu --preset tiny --steps 1 --clicks 5    # to try it

A network first learns a few organs of one scan for some steps, so that its answers are plausible. Then a simulated
annotator clicks into its errors, with the network's calls captured in CUDA graphs and without. `clicks_server` has what
HTTP and the session add. Writes data/clicks_gpu.json and the section clicks_gpu of clicks_speed.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from benchmarks.common.machine import machine_lines
from benchmarks.common.places import CT
from benchmarks.common.report import Section, add_results, bullets, markdown_table, measure_and_write
from torch import Tensor

from deformux.data.cases import Case
from deformux.data.preprocessing import Preprocessing
from deformux.fitting.fit import fit
from deformux.fitting.recipe import RECIPES
from deformux.inference.captured_network import prepared
from deformux.interactive import editor as editing
from deformux.interactive.editor import Editor
from deformux.interactive.open_scan import OpenScan, open_scan
from deformux.interactive.simulated_annotator import ClickAnnotator, dense_labels
from deformux.networks.deformux_net import DeformUXNet
from deformux.networks.presets import PRESETS

LABELS = ("liver", "spleen", "stomach")
PREP = Preprocessing("ct", spacing_mm=(1.5, 1.5, 1.5), patch_size=(96, 96, 96))
LIMIT_MS = 40
CAPTURED, EAGER = "captured", "one kernel after another"
# Clicks of one session; then another begins.
SESSION = 10


def main() -> None:
    """Measure, print, and keep the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=CT, help="a folder of labelled NIfTI")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--preset", choices=tuple(PRESETS), default="base")
    parser.add_argument("--steps", type=int, default=60, help="of the training before")
    parser.add_argument("--clicks", type=int, default=50)
    add_results(parser)
    args = parser.parse_args()
    measure_and_write(args, "clicks_gpu", lambda: measured(args), section)


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Train a network on the scan, and click."""
    with tempfile.TemporaryDirectory() as folder:
        case = scan(args.data, Path(folder))
        return train_and_click(args, case) | {"limit_ms": LIMIT_MS, "machine": machine_lines()}


def scan(data: Path, folder: Path) -> Case:
    """Return the labelled CT with `LABELS` as 1, 2, …"""
    names = json.loads((data / "labels.json").read_text())["example_seg.nii.gz"]
    label = nib.load(data / "example_seg.nii.gz")
    dense = dense_labels(np.asarray(label.dataobj), [names[name] for name in LABELS])
    nib.save(nib.Nifti1Image(dense, label.affine), folder / "label.nii.gz")
    return Case("ct", data / "example_ct_sm.nii.gz", folder / "label.nii.gz")


class Stages:
    """Seconds of the parts of a click, the GPU's work included."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.seconds: dict[str, float] = {}

    def timed(self, stage: str, run: Callable[..., Any]) -> Callable[..., Any]:
        """Return the same function, whose time counts for a stage."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = run(*args, **kwargs)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - began
            return result

        return wrapped

    @contextmanager
    def of_every_editor(self) -> Iterator[None]:
        """Time the parts of every editor within the block."""
        parts = [
            (editing, "encode_guidance", "guidance"),
            (Editor, "_with_borders", "borders"),
            (editing, "find_changes", "region"),
            (Editor, "_edit", "answer"),
        ]
        originals = [getattr(owner, name) for owner, name, _ in parts]
        for (owner, name, stage), original in zip(parts, originals, strict=True):
            setattr(owner, name, self.timed(stage, original))
        try:
            yield
        finally:
            for (owner, name, _), original in zip(parts, originals, strict=True):
                setattr(owner, name, original)


def train_and_click(args: argparse.Namespace, case: Case) -> dict[str, Any]:
    """Train, segment and click; return the seconds of each."""
    torch.manual_seed(0)
    network = DeformUXNet(1, len(LABELS) + 1, args.preset, guidance=True)
    recipe = RECIPES["finetune"].in_steps(args.steps, epochs=1)
    began = time.perf_counter()
    fit(network, [case], recipe=recipe, prep=PREP, labels=LABELS, device=args.device)
    trained_s = time.perf_counter() - began
    network.to(args.device).eval()
    ready = prepared(network, args.device)
    open_scan(ready, case.image, PREP, device=args.device)  # compiles what training did not call
    began = time.perf_counter()
    study = open_scan(ready, case.image, PREP, device=args.device)
    automatic_s = time.perf_counter() - began
    truth = np.asarray(nib.load(case.label).dataobj).astype(np.uint8)
    ways = {EAGER: network} if ready is network else {CAPTURED: ready, EAGER: network}
    return {
        "preset": args.preset,
        "steps": args.steps,
        "voxels": list(truth.shape),
        "network_voxels": list(study.logits.shape[1:]),
        "window": list(PREP.patch_size),
        "clicks": args.clicks,
        "trained_s": trained_s,
        "automatic_s": automatic_s,
        "ways": {name: clicked(way, study, truth, args) for name, way in ways.items()},
    }


def clicked(
    network: Callable[..., Tensor], study: OpenScan, truth: np.ndarray, args: argparse.Namespace
) -> dict[str, Any]:
    """Return the milliseconds of simulated clicks with a network, whole and by part."""
    stages = Stages(args.device)
    timed = stages.timed("network", network)
    seconds: list[float] = []
    parts: list[dict[str, float]] = []
    windows: list[int] = []
    with stages.of_every_editor():
        for session in range(-1, -(-args.clicks // SESSION)):  # the first warms up
            editor = Editor(study, timed, PREP, device=args.device)
            annotator = ClickAnnotator(len(LABELS), jitter=1.0, seed=session + 1)
            points: dict[int, list[tuple[int, int, int]]] = {}
            shown = study.labels
            for _ in range(SESSION):
                (click,) = annotator.clicks(truth, shown)
                points.setdefault(click.label, []).append(click.voxel)
                stages.seconds, began = {}, time.perf_counter()
                shown = editor.apply(points)
                took = time.perf_counter() - began
                if session >= 0:
                    seconds.append(took)
                    parts.append(stages.seconds | {"other": took - sum(stages.seconds.values())})
                    windows.append(editor.windows_computed)
    seconds, parts, windows = seconds[: args.clicks], parts[: args.clicks], windows[: args.clicks]
    return {
        "median_ms": 1000 * statistics.median(seconds),
        "p95_ms": 1000 * float(np.percentile(seconds, 95)),
        "max_ms": 1000 * max(seconds),
        "windows": statistics.mean(windows),
        "parts_median_ms": {
            part: 1000 * statistics.median(each.get(part, 0.0) for each in parts)
            for part in ("guidance", "network", "borders", "region", "answer", "other")
        },
    }


def section(r: Mapping[str, Any]) -> Section:
    """Write the times as a table."""
    size, inside, window = ("×".join(map(str, r[key])) for key in ("voxels", "network_voxels", "window"))
    first = next(iter(r["ways"].values()))
    heads = ("", f"median (target {r['limit_ms']})", "95th percentile", "longest", *first["parts_median_ms"])
    rows = [
        (
            *(name, f"**{each['median_ms']:.1f} ms**", f"{each['p95_ms']:.1f} ms", f"{each['max_ms']:.1f} ms"),
            *(f"{ms:.1f}" for ms in each["parts_median_ms"].values()),
        )
        for name, each in r["ways"].items()
    ]
    # Data of earlier versions lack the number of windows.
    windows = f" A click computes {first['windows']:.1f} windows on average." if "windows" in first else ""
    lines = [
        f"Preset `{r['preset']}`, trained for {r['steps']} steps on the CT ({size} voxels, {inside} for the network, "
        f"windows of {window}); {r['clicks']} simulated clicks into errors, in sessions of {SESSION}.{windows} Parts "
        "are medians.",
        "",
        *markdown_table(heads, rows),
        f"The automatic segmentation takes {r['automatic_s']:.2f} s, the training {r['trained_s']:.0f} s.",
        "",
        *bullets(r["machine"]),
    ]
    return Section("clicks_speed", "clicks_gpu", "A click on a GPU", lines)


if __name__ == "__main__":
    main()
