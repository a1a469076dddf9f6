"""A CT of clinical size through the server: coarse to fine against all windows, memory, clicks.

    python -m benchmarks.server.large_scan
    python -m benchmarks.server.large_scan --labels 2 --minutes 1 --size 256 256 150 --spacing 1.6 1.6 3
    python -m benchmarks.server.large_scan --networks plan --labels 41

The scan is the example CT, resampled to the wanted voxels, mirrored at its upper end and surrounded by air; its labels
are those of the example's labelled slices, and unlabelled elsewhere. A model is planned for variants of it (zoomed and
shifted) and trained on them, and the server then segments the scan twice: with the model's locator, and in all windows.
If all windows would take longer than ``--patience``, the request is ended there, and its time is that of the windows
done, times their number.
Writes data/large_scan.json and the section large_scan of inference.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import psutil
import requests
import torch
from benchmarks.common.machine import machine_lines
from benchmarks.common.places import CT, WORK
from benchmarks.common.report import Section, add_results, bullets, markdown_table, measure_and_write
from benchmarks.server.running import Running, serving, state_of
from scipy import ndimage

from deformux.data.cases import Case
from deformux.data.fingerprint import read_fingerprint
from deformux.data.label_values import UNLABELLED
from deformux.fitting.fit import fit
from deformux.fitting.locator_training import fit_locator
from deformux.fitting.minutes import in_minutes
from deformux.fitting.recipe import RECIPES
from deformux.fitting.speed import plan_on
from deformux.inference.metrics import dice_per_label, mean_dice
from deformux.networks.model_file import ModelCard, network_options, planned_network
from deformux.publishing.model_versions import ModelVersions
from deformux_label.lib.configs.project import Project

# Targets of the page: share of the time of all windows, gigabytes beyond the start, seconds of a click, loss of Dice.
LIMITS = {"share": 0.2, "peak_gb": 4.0, "median_s": 1.0, "p95_s": 2.0, "dice": 0.005}
_TWO = ("liver", "spleen")
# Zoom, and shift in voxels of the example, of the scans to train on; the scan to segment has neither.
_VARIANTS = ((0.95, (2, -1, 0)), (1.05, (-2, 2, 0)), (1.0, (3, 3, 0)))
_AIR_HU = -1000.0


@dataclass
class Sampled:
    """Most bytes of a process beyond those at the start."""

    beyond: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)


def main() -> None:
    """Measure, print, and keep the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=CT, help="folder of the example CT")
    parser.add_argument("--work", type=Path, default=WORK / "large_scan", help="folder for scans and models")
    parser.add_argument("--size", type=int, nargs=3, default=(512, 512, 300), help="voxels of the scan")
    parser.add_argument("--spacing", type=float, nargs=3, default=(0.8, 0.8, 1.5), help="its voxels in mm")
    parser.add_argument("--labels", type=int, nargs="+", default=(2, 41), help="numbers of labels")
    parser.add_argument(
        "--networks", nargs="+", default=("plan", "1.6,1.6,3"), help="spacings of the network in mm, or what is planned"
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="of the training, which is planned for them")
    parser.add_argument("--locator-seconds", type=float, default=60.0, help="time for the locator's training")
    parser.add_argument("--clicks", type=int, default=20, help="number of clicks to time")
    parser.add_argument("--patience", type=float, default=600.0, help="seconds before all windows are extrapolated")
    add_results(parser)
    args = parser.parse_args()
    measure_and_write(args, "large_scan", lambda: measured(args), section)


def measured(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the results of each number of labels as soon as they are there."""
    rows: list[dict[str, Any]] = []
    for spacing, number in itertools.product(args.networks, args.labels):
        rows.append(_measure(args, number, spacing))
        yield {
            "size": list(args.size),
            "spacing_mm": list(args.spacing),
            "minutes": args.minutes,
            "limits": LIMITS,
            "rows": rows,
            "load": [round(value, 1) for value in psutil.getloadavg()],
            "machine": machine_lines(),
        }


def _measure(args: argparse.Namespace, number: int, spacing: str) -> dict[str, Any]:
    folder = args.work / f"{number}_labels"
    names, scan, training = _scans(args, number, folder)
    conf = {"labels": ",".join(names), "modality": "ct", **({} if spacing == "plan" else {"spacing": spacing})}
    studies = folder / "studies"
    located, whole, facts = _model(args, conf, studies, training, folder, spacing.replace(",", "-"))
    versions = ModelVersions(state_of(studies, conf) / "versions")
    truth = np.asarray(nib.load(scan.label).dataobj)
    row: dict[str, Any] = {"labels": number, "network": spacing, "locator": facts}
    masks = {}
    with serving(studies, conf) as server:
        for name, version in (("coarse_to_fine", located), ("all_windows", whole)):
            if version is None:
                continue
            versions.publish(version)
            with _sampling(server.pid) as sampled:
                row[name], masks[name] = _segment(server, folder, args.patience)
            row[name]["peak_gb"] = round(sampled.beyond / 1e9, 3)
            if masks[name] is not None:
                known = truth != UNLABELLED
                dice = dice_per_label(masks[name] * known, truth * known, number)
                row[name]["mean_dice"] = round(mean_dice(dice), 4)
            if "clicks" not in row and masks[name] is not None:
                row["clicks"] = _click(server, names, truth, args.clicks)
    if len(masks) == 2 and all(mask is not None for mask in masks.values()):
        first, second = masks.values()
        row["same_voxels"] = float((first == second).mean())
    return row


def _scans(args: argparse.Namespace, number: int, folder: Path) -> tuple[list[str], Case, list[Case]]:
    """Return label names, the scan to segment, and those to train on; write what is missing."""
    values = json.loads((args.data / "labels.json").read_text())["example_seg.nii.gz"]
    names = list(values) if number > len(_TWO) else list(_TWO[:number])
    names = names[:number]
    image = nib.load(args.data / "example_ct.nii.gz")
    hu = np.asarray(image.dataobj, dtype=np.float32)
    label = np.full(hu.shape, UNLABELLED, dtype=np.uint8)
    source = np.asarray(nib.load(args.data / "example_seg.nii.gz").dataobj).astype(int)
    lookup = np.zeros(max(source.max(), *values.values()) + 1, dtype=np.uint8)
    lookup[[values[name] for name in names]] = np.arange(1, len(names) + 1)
    label[:, :, : source.shape[2]] = lookup[source]
    cases = []
    for index, (zoom, shift) in enumerate(((1.0, (0, 0, 0)), *_VARIANTS)):
        place = folder / ("studies" if index == 0 else "training")
        place.mkdir(parents=True, exist_ok=True)
        name = "scan" if index == 0 else f"variant_{index}"
        case = Case(name, place / f"{name}.nii", folder / f"{name}_label.nii")
        if not case.label.exists():
            geometry = tuple(args.size), tuple(args.spacing), image.header.get_zooms()[:3], zoom, shift
            _write(case.image, _enlarged(hu, *geometry, order=1, outside=_AIR_HU).round().astype(np.int16), args)
            _write(case.label, _enlarged(label, *geometry, order=0, outside=UNLABELLED).astype(np.uint8), args)
        cases.append(case)
    return names, cases[0], cases[1:]


def _enlarged(
    values: npt.NDArray[Any],
    size: tuple[int, int, int],
    spacing: tuple[float, float, float],
    own: tuple[float, float, float],
    zoom: float,
    shift: tuple[int, int, int],
    *,
    order: int,
    outside: float,
) -> npt.NDArray[Any]:
    """Resample a volume about the middle of its axial planes, from its first slice on, and mirror its last."""
    # Mirrored copies of labelled slices would be beyond: the example is longer than half of the scan.
    tall = np.concatenate([values, values[:, :, ::-1]], axis=2)
    scale = np.array(spacing) / np.array(own) / zoom
    offset = (np.array(values.shape) - 1) / 2 - scale * (np.array(size) - 1) / 2 + shift
    offset[2] = 0
    return ndimage.affine_transform(tall, scale, offset, output_shape=size, order=order, mode="constant", cval=outside)


def _write(path: Path, values: npt.NDArray[Any], args: argparse.Namespace) -> None:
    nib.save(nib.Nifti1Image(values, np.diag([*args.spacing, 1.0])), path)


def _model(
    args: argparse.Namespace,
    conf: Mapping[str, str],
    studies: Path,
    training: list[Case],
    folder: Path,
    name: str,
) -> tuple[str | None, str, dict[str, Any]]:
    """Train a model; return the versions with and without its locator, and what was found about that."""
    project = Project.from_conf(conf)
    kept = folder / f"versions_{name}.json"
    versions = ModelVersions(state_of(studies, conf) / "versions")
    if kept.exists():
        located, whole, facts = json.loads(kept.read_text())
        if whole in versions.names():
            return located, whole, facts
    facts = read_fingerprint([case.image for case in training], training, modality="ct")
    plan = plan_on("cpu", facts, labels=project.labels, given=project.choices, minutes=args.minutes)
    recipe, prep = RECIPES["finetune"].replace(**plan.recipe_changes), plan.preprocessing
    torch.manual_seed(0)
    network = planned_network(plan, len(project.labels), guidance=recipe.clicks > 0)
    recipe = in_minutes(args.minutes, network, training, recipe=recipe, prep=prep, labels=project.labels)
    fit(network, training, recipe=recipe, prep=prep, labels=project.labels, store=folder / "preprocessed")
    fitted = fit_locator(training, prep=prep, labels=project.labels, seconds=args.locator_seconds)
    card = ModelCard(
        labels=project.labels,
        preprocessing=prep,
        preset=plan.preset,
        plan=plan.for_card(),
        network_options=network_options(network),
    )
    whole = versions.write(network, card)
    located = None
    if fitted.locator is not None:
        located = versions.write(network, dataclasses.replace(card, locator=fitted.facts), locator=fitted.locator)
    versions.publish(whole)
    told = {**fitted.facts, "spacing_mm": prep.spacing_mm, "patch": prep.patch_size, "steps": recipe.steps}
    kept.write_text(json.dumps([located, whole, told]))
    return located, whole, told


def _segment(server: Running, folder: Path, patience_s: float) -> tuple[dict[str, Any], npt.NDArray[np.integer] | None]:
    """Segment the scan through HTTP; return times and windows, and the mask unless it was ended early."""
    shown: dict[str, Any] = {}
    result: dict[str, Any] = {}
    url = f"{server.client.url}/infer/segmentation"

    def ask() -> None:
        began = time.perf_counter()
        parameters = {"image": "scan", "output": "image"}
        try:
            answer = requests.post(
                url, params=parameters, data={"params": '{"result_extension": ".nii.gz"}'}, timeout=patience_s
            )
            result.update(seconds=time.perf_counter() - began, status=answer.status_code, content=answer.content)
        except requests.Timeout:
            # Closing the connection ends the inference.
            result["seconds"] = None

    thread = threading.Thread(target=ask)
    began = time.perf_counter()
    thread.start()
    first: tuple[float, int] | None = None
    while thread.is_alive():
        state = next(iter(server.client.get("deformux/inferences").json().values()), {})
        if "windows" in state:
            shown = state
            first = first or (time.perf_counter(), state["windows_done"])
            last = (time.perf_counter(), state["windows_done"])
        thread.join(0.5)
    row: dict[str, Any] = {"windows": shown.get("windows"), "seconds": result["seconds"], "extrapolated": False}
    if result["seconds"] is None:
        assert first is not None, "no window was done in time"
        each = (last[0] - first[0]) / max(1, last[1] - first[1])
        seconds = first[0] - began + each * (shown["windows"] - first[1])
        return row | {"seconds": round(seconds, 1), "extrapolated": True, "windows_done": last[1]}, None
    if result["status"] != 200:
        raise SystemExit(f"the segmentation failed: {result['status']} {result['content'][:300]!r}")
    path = folder / "answer.nii.gz"
    path.write_bytes(result["content"])
    return row | {"seconds": round(result["seconds"], 2)}, np.asarray(nib.load(path).dataobj).astype(np.uint8)


def _click(server: Running, names: list[str], truth: npt.NDArray[np.integer], number: int) -> dict[str, Any]:
    """Time clicks on labels of the segmented scan, each added to those before it."""
    rng = np.random.default_rng(0)
    labelled = np.argwhere((truth > 0) & (truth != UNLABELLED))
    clicks: dict[str, list[list[int]]] = {}
    times = []
    for _ in range(number):
        voxel = [int(at) for at in labelled[rng.integers(len(labelled))]]
        clicks.setdefault(names[int(truth[tuple(voxel)]) - 1], []).append(voxel)
        began = time.perf_counter()
        parameters = {"image": "scan", "output": "image"}
        answer = requests.post(
            f"{server.client.url}/infer/edit", params=parameters, data={"params": json.dumps(clicks)}, timeout=600
        )
        times.append(time.perf_counter() - began)
        if not answer.ok:
            raise SystemExit(f"a click failed: {answer.status_code} {answer.text[:300]}")
    return {
        "number": number,
        "median_s": round(statistics.median(times), 3),
        "p95_s": round(float(np.percentile(times, 95)), 3),
        "first_s": round(times[0], 3),
    }


@contextmanager
def _sampling(pid: int) -> Iterator[Sampled]:
    """Sample the memory of a server and its children until the block ends."""
    sampled = Sampled()
    start = _memory(pid)

    def watch() -> None:
        while not sampled._stop.wait(0.05):
            sampled.beyond = max(sampled.beyond, _memory(pid) - start)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield sampled
    finally:
        sampled._stop.set()
        thread.join()


def _memory(pid: int) -> int:
    total = 0
    for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def section(data: Mapping[str, Any]) -> Section:
    """Write times, memory and Dice as tables."""
    limits = data["limits"]
    heads = (
        "network mm",
        "labels",
        "windows",
        "seconds",
        "windows of all",
        "seconds of all",
        "share",
        "peak GB",
        "Dice",
        "Dice of all",
    )
    rows, clicks = [], []
    for row in data["rows"]:
        whole, located = row["all_windows"], row.get("coarse_to_fine")
        about = "about " if whole["extrapolated"] else ""
        shown = located or whole
        voxels = "×".join(f"{mm:.3g}" for mm in row["locator"]["spacing_mm"])
        network = f"{voxels} (planned)" if row["network"] == "plan" else voxels
        rows.append(
            (
                network,
                row["labels"],
                shown["windows"] if located else "no locator",
                f"{shown['seconds']:.1f}" if located else "",
                whole["windows"],
                f"{about}{whole['seconds']:.1f}",
                f"**{shown['seconds'] / whole['seconds']:.3f}**" if located else "",
                f"{max(part['peak_gb'] for part in (shown, whole)):.2f}",
                shown.get("mean_dice", "") if located else "",
                whole.get("mean_dice", "not finished"),
            )
        )
        if "clicks" in row:
            found = row["clicks"]
            clicks.append(
                (network, row["labels"], found["number"], found["median_s"], found["p95_s"], found["first_s"])
            )
    size, spacing = ("×".join(f"{n:g}" for n in data[key]) for key in ("size", "spacing_mm"))
    lines = [
        f"A CT of {size} voxels of {spacing} mm through the server's `segmentation`, after {data['minutes']:g} minutes",
        f"of training on variants of it, with the plan for them. Wanted: a share of at most {limits['share']}, at most",
        f"{limits['peak_gb']:g} GB beyond the server's start, and at most {limits['dice']} Dice less than in all",
        "windows. Times that begin with *about* are those of the windows done, times the number of all.",
        "",
        *markdown_table(heads, rows),
        f"Clicks, each added to those before; wanted: a median of {limits['median_s']:g} s and 95 % within "
        f"{limits['p95_s']:g} s.",
        "",
        *markdown_table(("network mm", "labels", "clicks", "median s", "95 % within s", "first s"), clicks),
        f"Load of the machine at the end, over 1, 5 and 15 minutes: {', '.join(map(str, data['load']))}.",
        "",
        *[f"- Locator of {row['labels']} labels: {json.dumps(row['locator'])}" for row in data["rows"]],
        *bullets(data["machine"]),
    ]
    return Section("inference", "large_scan", "A scan of clinical size", lines)


if __name__ == "__main__":
    main()
