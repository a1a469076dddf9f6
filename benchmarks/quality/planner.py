"""Spacing, patch and strides of the plan beside those of nnU-Net v2's own planner, on every folder of real scans.

    pip install --target runs/nnunet --no-deps nnunetv2 acvl-utils batchgenerators batchgeneratorsv2 \\
        'dynamic-network-architectures<0.5' connected-components-3d fft-conv-pytorch imagecodecs yacs \\
        graphviz seaborn blosc2 ndindex msgpack numexpr
    PYTHONPATH=runs/nnunet python -m benchmarks.quality.planner
    PYTHONPATH=runs/nnunet python -m benchmarks.quality.planner --sets spine_mr abdomen_mr

nnU-Net reads links to the same files in its raw layout, extracts its fingerprint and plans ``3d_fullres`` for 8 GB. The
plan is that of 10 minutes on a CPU at an assumed speed, so that it does not depend on the machine. Sets that were
measured before are kept. Writes data/planner.json and the page planner.md.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.common.command import run_command
from benchmarks.common.machine import software_lines
from benchmarks.common.places import HIPPOCAMPUS
from benchmarks.common.report import (
    Section,
    add_results,
    bullets,
    data_file,
    markdown_table,
    measure_and_write,
    read_data,
)

from deformux.data.cases import Case, volume_id
from deformux.data.fingerprint import Fingerprint, read_fingerprint
from deformux.data.frame import frame_axes
from deformux.data.planning import Plan, make_plan

# Largest difference of spacings that counts as none.
SAME = 0.05
_GIGABYTES = 8


@dataclass(frozen=True)
class Labelled:
    """A set of labelled scans: where they are, and nnU-Net's name of their intensities."""

    folder: str
    channel: str
    image: str = "images"
    label: str = "labels"

    def cases(self, data: Path) -> list[tuple[str, list[Path], Path]]:
        """Return id, sequences and label of each case."""
        images, labels = data / self.folder / self.image, data / self.folder / self.label
        if images.is_file():
            return [(volume_id(images), [images], labels)] if labels.is_file() else []
        found = []
        for label in sorted(labels.glob("*.nii.gz")) if labels.is_dir() else ():
            name = volume_id(label)
            sequences = sorted(images.glob(f"{name}_????.nii.gz")) or [images / label.name]
            if sequences[0].is_file():
                found.append((name, sequences, label))
        return found


SETS = {
    "hippocampus": Labelled("hippocampus", "MRI"),
    "heart_mr_acdc": Labelled("heart_mr_acdc", "MRI"),
    "spine_mr": Labelled("spine_mr", "MRI"),
    "abdomen_mr": Labelled("abdomen_mr", "MRI"),
    "fetal_brain_mr": Labelled("fetal_brain_mr", "MRI"),
    "brain_tumour_mr": Labelled("brain_tumour_mr", "MRI"),
    "mouse_brain_mr": Labelled("mouse_brain_mr", "MRI"),
    "ct": Labelled("ct", "CT", "example_ct_sm.nii.gz", "example_seg.nii.gz"),
    "ct, the MR beside it": Labelled("ct", "MRI", "example_mr_sm.nii.gz", "example_seg_mr.nii.gz"),
    "odd/chest_ct": Labelled("odd/chest_ct", "CT"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.planner",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, default=HIPPOCAMPUS.parent, help="folder of the sets")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS), help="which to plan")
    parser.add_argument("--again", action="store_true", help="also plan sets that were planned before")
    add_results(parser)
    arguments = parser.parse_args()
    measure_and_write(arguments, "planner", lambda: measured(arguments), section)


def measured(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Plan set after set; yield all rows so far after each."""
    rows: dict[str, Any] = {}
    if data_file(arguments.results, "planner").is_file() and not arguments.again:
        rows = {row["set"]: row for row in read_data(arguments.results, "planner")["rows"]}
    for name in arguments.sets:
        cases = SETS[name].cases(arguments.data)
        if name in rows or not cases:
            print(f"{name}: {'kept' if name in rows else 'there are no labelled scans'}")
            continue
        rows[name] = _row(name, cases)
        version = importlib.metadata.version("nnunetv2")
        yield {
            "machine": [*software_lines(), f"nnunetv2 {version}"],
            "rows": [rows[key] for key in SETS if key in rows],
        }


def _row(name: str, cases: Sequence[tuple[str, list[Path], Path]]) -> dict[str, Any]:
    found = read_fingerprint([], [Case(case, images[0], label) for case, images, label in cases])
    n_labels = max(label for facts in found.labels.values() for label in facts.voxels)
    plan = make_plan(found, labels=[f"label {n}" for n in range(1, n_labels + 1)])
    order = _file_axes(found, plan)
    began = time.monotonic()
    theirs = nnunet_plan(cases, channel=SETS[name].channel, n_labels=n_labels)
    inverse = np.argsort(order)
    return {
        "set": name,
        "scans": len(found.scans),
        "seconds": round(time.monotonic() - began, 1),
        "nnunet": theirs,
        # Along the file's axes, as nnU-Net has them.
        "rule": [plan.facts["nnunet_spacing_mm"][axis] for axis in inverse],
        "trained": [plan.facts["spacing_mm"][axis] for axis in inverse],
        "patch": [plan.preprocessing.patch_size[axis] for axis in inverse],
        "strides": [[stride[axis] for axis in inverse] for stride in plan.strides],
        "frame": plan.preprocessing.frame,
        "modality": plan.preprocessing.modality,
        "window": list(plan.preprocessing.window_hu),
        "reason": plan.reasons["spacing_mm"],
    }


def _file_axes(found: Fingerprint, plan: Plan) -> tuple[int, int, int]:
    """Return the file's axis along each axis of the plan's frame, which must be the same in all scans of a set."""
    orders = {frame_axes(plan.preprocessing.frame, s.shape, s.affine)[0] for s in found.scans.values()}
    if len(orders) > 1:
        raise ValueError("the files of a set must have their axes in one order to be compared with nnU-Net's")
    return orders.pop()


def nnunet_plan(cases: Sequence[tuple[str, list[Path], Path]], *, channel: str, n_labels: int) -> dict[str, Any]:
    """Return spacing, patch and strides of nnU-Net's ``3d_fullres``, along the file's axes."""
    with tempfile.TemporaryDirectory() as folder:
        raw, preprocessed = Path(folder, "raw"), Path(folder, "preprocessed")
        data = raw / "Dataset001_Set"
        for place in (data / "imagesTr", data / "labelsTr", preprocessed, Path(folder, "results")):
            place.mkdir(parents=True)
        for name, images, label in cases:
            for number, image in enumerate(images):
                (data / "imagesTr" / f"{name}_{number:04d}.nii.gz").symlink_to(image.resolve())
            (data / "labelsTr" / f"{name}.nii.gz").symlink_to(label.resolve())
        description = {
            "channel_names": {str(number): channel for number in range(len(cases[0][1]))},
            "labels": {"background": 0, **{f"label {n}": n for n in range(1, n_labels + 1)}},
            "numTraining": len(cases),
            "file_ending": ".nii.gz",
        }
        (data / "dataset.json").write_text(json.dumps(description))
        return _planned(raw, preprocessed, Path(folder, "results"))


def _planned(raw: Path, preprocessed: Path, results: Path) -> dict[str, Any]:
    # nnU-Net reads these when it is imported, and in its processes.
    places = {"nnUNet_raw": raw, "nnUNet_preprocessed": preprocessed, "nnUNet_results": results}
    os.environ.update({name: str(place) for name, place in places.items()})
    planner = importlib.import_module("nnunetv2.experiment_planning.experiment_planners.default_experiment_planner")
    extractor = importlib.import_module("nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor")
    paths = importlib.import_module("nnunetv2.paths")
    for module in (planner, extractor, paths, importlib.import_module("nnunetv2.utilities.dataset_name_id_conversion")):
        for name, place in places.items():
            if hasattr(module, name):
                setattr(module, name, str(place))
    extractor.DatasetFingerprintExtractor("Dataset001_Set", num_processes=1).run()
    plans = planner.ExperimentPlanner("Dataset001_Set", gpu_memory_target_in_gb=_GIGABYTES).plan_experiment()
    full = plans["configurations"]["3d_fullres"]
    # Stored axes are those of SimpleITK, last first, then transposed.
    back = [int(axis) for axis in plans["transpose_backward"]]

    def along_file(values: Sequence[Any]) -> list[Any]:
        return [values[axis] for axis in back][::-1]

    intensities = plans["foreground_intensity_properties_per_channel"]["0"]
    return {
        "spacing": [float(value) for value in along_file(full["spacing"])],
        "patch": [int(value) for value in along_file(full["patch_size"])],
        "strides": [
            [int(step) for step in along_file(stride)] for stride in full["architecture"]["arch_kwargs"]["strides"]
        ],
        "window": [float(intensities["percentile_00_5"]), float(intensities["percentile_99_5"])],
    }


def section(data: Mapping[str, Any]) -> Section:
    """Write a row for each set."""
    heads = ("set", "scans", "nnU-Net's spacing", "the plan's median rule", "off by", "spacing of the training")
    spacing = [
        [
            *(row["set"], row["scans"], _sizes(row["nnunet"]["spacing"]), _sizes(row["rule"])),
            *(f"{100 * _off(row):.1f} %", _sizes(row["trained"])),
        ]
        for row in data["rows"]
    ]
    shapes = [
        [
            *(row["set"], _sizes(row["nnunet"]["patch"]), _sizes(row["patch"])),
            *(_halvings(row["nnunet"]["strides"]), _halvings(row["strides"]), row["frame"]),
        ]
        for row in data["rows"]
    ]
    windows = [
        [row["set"], *(_range(window) for window in (row["nnunet"]["window"], row["window"]))]
        for row in data["rows"]
        if row["modality"] == "ct"
    ]
    off = [row["set"] for row in data["rows"] if _off(row) > SAME]
    reasons = [f"{row['set']}: {row['reason']}" for row in data["rows"] if row["reason"].startswith("coarser")]
    lines = [
        *bullets(data["machine"]),
        f"- spacing and patch along the file's axes, in mm and voxels; nnU-Net plans 3d_fullres for {_GIGABYTES} GB, "
        "the plan is for 10 minutes of 100 thousand voxels a second, about two CPU cores",
        f"- {len(data['rows']) - len(off)} of {len(data['rows'])} spacings by the median rule are within "
        f"{100 * SAME:.0f} % of nnU-Net's" + (f"; not {', '.join(off)}" if off else ""),
        "",
        "### Spacing",
        "",
        *markdown_table(heads, spacing),
        "Where the training's spacing differs, the reason in the plan:",
        "",
        *bullets(reasons),
        "",
        "### Patch and strides",
        "",
        "Halvings are those of each axis over all stages: nnU-Net has as many as a patch allows, DeformUX-Net four.",
        "",
        *markdown_table(("set", "nnU-Net's patch", "the plan's", "nnU-Net's halvings", "the plan's", "frame"), shapes),
        "### Window of CT",
        "",
        *markdown_table(("set", "nnU-Net's, HU", "the plan's, HU"), windows),
    ]
    return Section("planner", "quality_planner", "Spacing, patch and strides beside nnU-Net's", lines)


def _off(row: Mapping[str, Any]) -> float:
    """Return the largest relative difference between the rule's spacing and nnU-Net's."""
    return float(np.abs(np.array(row["rule"]) / np.array(row["nnunet"]["spacing"]) - 1).max())


def _range(window: Sequence[float]) -> str:
    low, high = window
    return f"{low:.0f} to {high:.0f}"


def _halvings(strides: Sequence[Sequence[int]]) -> str:
    return _sizes(np.log2(np.prod(strides, axis=0)))


def _sizes(values: Sequence[float]) -> str:
    return "×".join(f"{value:.4g}" for value in values)


if __name__ == "__main__":
    run_command(main)
