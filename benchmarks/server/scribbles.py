"""Organs from a few strokes, without a model: this app's scribble tasks and MONAI Label's own, and their CPU time.

    python -m benchmarks.server.scribbles [--data FOLDER]

A simulated reader draws in one or three slices of each organ of the example CT and MR: deep inside the organ, and
around it, two voxels off its border. MONAI Label's task runs with its presets, on the scan's own voxels, with the
intensities that the app prepares; its mixture of Gaussians needs a CUDA compiler and is left out. Writes
data/scribbles.json and the section scribbles of scribbles.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from benchmarks.common.machine import machine_lines
from benchmarks.common.places import CT
from benchmarks.common.report import Section, add_results, bullets, markdown_table, measure_and_write
from monailabel.scribbles.transforms import (
    ApplyGraphCutOptimisationd,
    MakeISegUnaryd,
    MakeLikelihoodFromScribblesHistogramd,
)
from nibabel.orientations import apply_orientation, io_orientation, ornt_transform
from scipy import ndimage

from deformux.data.choices import Choices
from deformux.data.preprocessing import Preprocessing
from deformux.data.transforms import inference_transforms, run_transforms
from deformux_label.lib.configs.project import Project
from deformux_label.lib.infers.model_loader import ServedModels
from deformux_label.lib.infers.scribbles import GraphCut
from deformux_label.lib.requests.inference import InferenceOptions, InferenceRequest, RequestedScan

ORGANS = {
    "ct": ("example_ct_sm", "example_seg", ("liver", "spleen", "kidney_left", "stomach", "aorta")),
    "mr": ("example_mr_sm", "example_seg_mr", ("liver", "spleen", "kidney_left", "kidney_right")),
}
_CAVEAT = (
    "The weight of nearness, `lamda` and `sigma` were chosen on these scans and three hippocampi, with the same "
    "simulated strokes. MONAI Label's presets were not, and by preset its task works on voxels of 2.5x2.5x5 mm."
)
INFO = [{"name": "background_scribbles", "id": 1}, {"name": "foreground_scribbles", "id": 2}]


def main() -> None:
    """Measure, print, and keep the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=CT, help="a folder of labelled NIfTI")
    add_results(parser)
    args = parser.parse_args()
    measure_and_write(args, "scribbles", lambda: measured(args.data), section)


def measured(data: Path) -> dict[str, Any]:
    """Segment each organ from strokes, and cut a whole scan."""
    torch.set_num_threads(1)
    names = json.loads((data / "labels.json").read_text())
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for modality, (scan, segmentation, organs) in ORGANS.items():
            image, truth = data / f"{scan}.nii.gz", nib.load(data / f"{segmentation}.nii.gz")
            values = np.asarray(truth.dataobj)
            for organ in organs:
                value = names[f"{segmentation}.nii.gz"].get(organ)
                if value is not None and (values == value).any():
                    rows += _organ(modality, organ, image, values == value, truth.affine, Path(folder))
        whole = _whole_scan(data / "example_ct.nii.gz", Path(folder))
    return {"rows": rows, "whole_scan": whole, "machine": machine_lines()}


def _organ(
    modality: str, organ: str, image: Path, truth: np.ndarray, affine: np.ndarray, folder: Path
) -> list[dict[str, Any]]:
    rows = []
    for slices in (3, 1):
        drawn = _strokes(truth, slices)
        row: dict[str, Any] = {"scan": modality, "organ": organ, "slices": slices}
        row["monailabel"], row["monailabel_s"] = _timed(lambda d=drawn: _stock(image, d, modality), truth)
        label = folder / "scribbles.nii.gz"
        nib.save(nib.Nifti1Image(drawn, affine), label)
        for evidence in ("histogram", "mixture"):
            row[evidence], row[f"{evidence}_s"] = _timed(lambda e=evidence, p=label: _own(image, p, modality, e), truth)
        rows.append(row)
    return rows


def _strokes(truth: np.ndarray, slices: int) -> np.ndarray:
    drawn = np.zeros(truth.shape, np.uint8)
    where = np.flatnonzero(truth.any(axis=(0, 1)))
    for part in np.linspace(0, 1, slices + 2)[1:-1]:
        k = where[int(part * (len(where) - 1))]
        depth, distance = (ndimage.distance_transform_edt(side) for side in (truth[..., k], ~truth[..., k]))
        drawn[..., k][depth >= max(1, 0.7 * depth.max())] = 2
        drawn[..., k][(distance > 2) & (distance <= 3)] = 1
    return drawn


def _timed(run: Any, truth: np.ndarray) -> tuple[float, float]:
    start = time.process_time()
    mask = run() > 0
    seconds = time.process_time() - start
    return 2 * float((mask & truth).sum()) / float(mask.sum() + truth.sum()), seconds


def _own(image: Path, label: Path, modality: str, evidence: str) -> np.ndarray:
    project = Project(labels=("organ",), choices=Choices(modality))
    task = GraphCut(project, ServedModels(project, label.parent / "state"), evidence, "")
    asked = InferenceRequest(scan=RequestedScan(str(image), keep=False), options=InferenceOptions())
    file, _ = task(task.parsed({"label": str(label), "label_info": INFO}, asked, label.parent))
    try:
        return np.asarray(nib.load(file).dataobj)
    finally:
        Path(file).unlink()


def _stock(image: Path, drawn: np.ndarray, modality: str) -> np.ndarray:
    """Segment with MONAI Label's transforms, as its HistogramBasedGraphCut chains them."""
    volume = run_transforms(inference_transforms(Preprocessing(modality)), {"image": image})["image"]
    order = ornt_transform(*(io_orientation(np.asarray(a)) for a in (volume.affine, volume.meta["original_affine"])))
    array = apply_orientation(volume[0].numpy(), order)[None]
    array = np.ascontiguousarray((array - array.min()) / (array.max() - array.min()))
    keys = {"scribbles_bg_label": 1, "scribbles_fg_label": 2}
    data: dict[str, Any] = {"image": array, "label": drawn[None]}
    chain = (
        MakeLikelihoodFromScribblesHistogramd("image", "label", post_proc_label="prob", **keys),
        MakeISegUnaryd("image", "prob", "label", unary="unary", **keys),
        ApplyGraphCutOptimisationd("unary", "image", post_proc_label="pred", lamda=1.0, sigma=0.1),
    )
    for transform in chain:
        data = transform(data)
    return np.asarray(data["pred"][0])


def _whole_scan(image: Path, folder: Path) -> dict[str, Any]:
    """Time scribbles that are long enough to cut the whole CT."""
    scan = nib.load(image)
    drawn = np.zeros(scan.shape, np.uint8)
    x, y, z = scan.shape
    drawn[x // 4 : 3 * x // 4, y // 2, z // 6 : 5 * z // 6] = 2
    drawn[2:5, :, z // 2] = 1
    label = folder / "whole.nii.gz"
    nib.save(nib.Nifti1Image(drawn, scan.affine), label)
    times = {
        evidence: statistics.median(
            _timed(lambda e=evidence: _own(image, label, "ct", e), drawn == 2)[1] for _ in range(3)
        )
        for evidence in ("histogram", "mixture")
    }
    return {"voxels": list(scan.shape), "seconds": times}


def section(data: Mapping[str, Any]) -> Section:
    """Write Dice and seconds as a table."""
    kinds = ("monailabel", "histogram", "mixture")
    rows = []
    for row in data["rows"]:
        cells = (f"{row[kind]:.2f} ({row[f'{kind}_s']:.2f} s)" for kind in kinds)
        rows.append((row["scan"], row["organ"], row["slices"], *cells))
    for slices in (3, 1):
        chosen = [row for row in data["rows"] if row["slices"] == slices]
        means = (f"**{statistics.mean(row[kind] for row in chosen):.2f}**" for kind in kinds)
        rows.append(("mean", "", slices, *means))
    whole = data["whole_scan"]
    size = "x".join(map(str, whole["voxels"]))
    times = ", ".join(f"{kind} {seconds:.1f} s" for kind, seconds in whole["seconds"].items())
    heads = ("scan", "organ", "slices", "MONAI Label's histogram", "histogram+graphcut", "gmm+graphcut")
    lines = [
        *bullets(data["machine"]),
        "",
        "Dice of organs from simulated strokes in 3 slices or 1, and CPU seconds (one thread) from file to file.",
        "",
        _CAVEAT,
        "",
        *markdown_table(heads, rows),
        f"A cut of a whole CT of {size} voxels, median of 3: {times}.",
    ]
    return Section("scribbles", "scribbles", "Scribbles without a model", lines)


if __name__ == "__main__":
    main()
