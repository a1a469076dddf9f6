"""Scribbles as Slicer sends them, on live servers with and without a model, and limits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import nibabel as nib
import nrrd
import numpy as np
import pytest
import requests
from fastapi import HTTPException
from live import CONF, LABELS, LiveServer, Volume, slicer, write, write_volume
from scipy import ndimage

from deformux_label.lib.configs.project import Project
from deformux_label.lib.infers import scribbles as module
from deformux_label.lib.infers.model_loader import ServedModels
from deformux_label.lib.infers.scribbles import GraphCut, all_scribble_tasks
from deformux_label.lib.requests.inference import InferenceOptions, InferenceRequest, RequestedScan

TASKS = ["network+graphcut", "histogram+graphcut", "gmm+graphcut"]
GEOMETRIES = ["axial", "anisotropic", "permuted", "oblique", "oblique_nrrd"]
# Slicer's order of segments: what it segments, then its two for scribbles.
SEGMENTS = [*LABELS, "background", "background_scribbles", "foreground_scribbles"]
BACKGROUND, FOREGROUND = 4, 5
LABEL_INFO = [{"name": name, "id": number} for number, name in enumerate(SEGMENTS, start=1)]


def draw(truth: np.ndarray, value: int, *, background: bool = True) -> np.ndarray:
    """Return Slicer's label map: the true segments, and strokes on one and around it in three slices."""
    organ = truth == value
    drawn = truth.copy()
    where = np.flatnonzero(organ.any(axis=(0, 1)))
    for k in {int(where[int(part * (len(where) - 1))]) for part in (0.25, 0.5, 0.75)}:
        depth, distance = (ndimage.distance_transform_edt(side[..., k]) for side in (organ, ~organ))
        drawn[..., k][depth >= max(1, 0.6 * depth.max())] = FOREGROUND
        if background:
            drawn[..., k][(distance > 2) & (distance <= 3)] = BACKGROUND
    return drawn


def infer(server: LiveServer, model: str, image: str, drawn: Path | None, /, **params: Any) -> requests.Response:
    """Send a raw request with scribbles."""
    files: dict[str, Any] = {"params": (None, json.dumps({"label_info": LABEL_INFO, **params}))}
    if drawn is not None:
        files["label"] = (drawn.name, drawn.read_bytes())
    url = f"{server.url}/infer/{requests.utils.quote(model, safe='')}"
    return requests.post(url, params={"image": image, "output": "image"}, files=files, timeout=120)


def mask_of(answer: requests.Response) -> nib.Nifti1Image:
    assert answer.status_code == 200, answer.text
    return nib.Nifti1Image.from_bytes(answer.content)


def dice(mask: np.ndarray, truth: np.ndarray) -> float:
    return 2 * np.count_nonzero((mask == 1) & truth) / (np.count_nonzero(mask) + np.count_nonzero(truth))


def agrees(mask: np.ndarray, drawn: np.ndarray) -> bool:
    """Return whether the reply is binary and follows every scribbled voxel."""
    binary = set(np.unique(mask)) == {0, 1}
    return binary and bool((mask[drawn == FOREGROUND] == 1).all() and (mask[drawn == BACKGROUND] == 0).all())


@pytest.mark.parametrize("model", TASKS)
def test_a_segment_lies_on_its_scan(
    server: LiveServer, volumes: dict[str, Volume], trainings: list, model: str, tmp_path: Path
) -> None:
    for number, name in enumerate(GEOMETRIES):
        volume = volumes[name]
        value = number % 2 + 1
        drawn = draw(volume.truth, value)
        label = write(tmp_path / f"{name}.nrrd", drawn, volume.affine)
        answer = infer(server, model, name, label, selected_label_name=LABELS[value - 1], result_extension=".nii")
        found = mask_of(answer)
        np.testing.assert_allclose(found.affine, volume.affine, atol=1e-3)
        mask = np.asarray(found.dataobj)
        assert mask.shape == volume.truth.shape
        assert agrees(mask, drawn)
        assert dice(mask, volume.truth == value) > 0.75, name


def test_the_extension_finds_the_tasks(server: LiveServer) -> None:
    models = requests.get(f"{server.url}/info/", timeout=60).json()["models"]
    assert list(models)[2:] == TASKS
    assert all(models[name]["type"] == "scribbles" and list(models[name]["labels"]) == list(LABELS) for name in TASKS)


def test_scribbles_drawn_in_slicer(
    server: LiveServer, volumes: dict[str, Volume], slicer_client: ModuleType, tmp_path: Path
) -> None:
    """Slicer saves label maps, and counts the bounds of a region, in an order of voxels of its own."""
    client = slicer_client.MONAILabelClient(server.url, str(tmp_path), "radiologist-1")
    config = client.info()["models"]["gmm+graphcut"]["config"]
    names = ["permuted", "oblique_nrrd", "left"]
    left = write_volume(
        tmp_path / "left.nii.gz", tmp_path / "left_label.nii.gz", axes=np.diag([-1.0, 1, 1]), spacing=(2.0, 1.6, 3.2)
    )
    client.upload_image(str(left.image), "left")
    scans = {**volumes, "left": left}
    jobs = []
    for name in names:
        organ = np.argwhere(scans[name].truth == 2)
        corners = nib.affines.apply_affine(scans[name].affine, organ)
        jobs.append(
            {
                "image": str(scans[name].image),
                "result": str(write(tmp_path / f"{name}.nii.gz", draw(scans[name].truth, 2), scans[name].affine)),
                "labels": SEGMENTS,
                "roi": [((corners.max(0) + corners.min(0)) / 2).tolist(), (np.ptp(corners, axis=0) + 6).tolist()],
                "export": str(tmp_path / f"{name}_saved.nrrd"),
            }
        )
    try:
        for name, job, seen in zip(names, jobs, slicer(jobs), strict=True):
            # As the extension's onUpdateScribbles does.
            params = {key: value[0] if isinstance(value, list) else value for key, value in config.items()}
            params |= {"roi": seen["roi"], "selected_label_name": "spleen"}
            params["label_info"] = [{"name": item["name"], "id": item["idx"]} for item in seen["label_info"]]
            params |= {"result_extension": ".nrrd", "result_dtype": "uint8"}
            file, reply = client.infer("gmm+graphcut", name, params, job["export"])
            assert reply["label_names"] == {"spleen": 1}
            # In the voxel order of the file, not in Slicer's.
            mask, header = nrrd.read(file)
            np.testing.assert_allclose(header["space origin"] * (-1, -1, 1), scans[name].affine[:3, 3], atol=1e-3)
            assert dice(mask, scans[name].truth == 2) > 0.7, name
    finally:
        requests.delete(f"{server.url}/datastore/image", params={"id": "left"}, timeout=30)


@pytest.mark.parametrize("model", TASKS)
def test_a_first_object_on_a_new_project(
    fresh: tuple[LiveServer, Path], volumes: dict[str, Volume], model: str, tmp_path: Path
) -> None:
    server, _ = fresh
    volume = volumes["oblique"]
    with volume.image.open("rb") as file:
        files = {"file": ("a.nii.gz", file)}
        requests.put(f"{server.url}/datastore/", params={"image": "first"}, files=files, timeout=60)
    try:
        drawn = draw(volume.truth, 1, background=False)
        label = write(tmp_path / "scribbles.nrrd", drawn, volume.affine)
        options = {"selected_label_name": "liver", "result_extension": ".nii"}
        mask = np.asarray(mask_of(infer(server, model, "first", label, **options)).dataobj)
        assert agrees(mask, drawn)
        assert dice(mask, volume.truth == 1) > 0.8
        query = {"image": "first", "output": "json"}
        files = {"params": (None, json.dumps({"label_info": LABEL_INFO, **options})), "label": label.open("rb")}
        url = f"{server.url}/infer/{requests.utils.quote(model, safe='')}"
        warning = requests.post(url, params=query, files=files, timeout=60).json()["warning"]
        assert "No background was scribbled" in warning
        assert ("no trained model" in warning) == model.startswith("network")
    finally:
        requests.delete(f"{server.url}/datastore/image", params={"id": "first"}, timeout=30)


def test_scribbles_correct_the_network(
    server: LiveServer, volumes: dict[str, Volume], trainings: list, tmp_path: Path
) -> None:
    volume = volumes["axial"]
    automatic = np.asarray(mask_of(server.infer("axial", query={"output": "image"}, result_extension=".nii")).dataobj)
    truth = volume.truth == 2
    # One organ is removed, a different one is drawn where the network found none.
    drawn = np.zeros(truth.shape, np.uint8)
    drawn[(volume.truth == 1) & (ndimage.distance_transform_edt(volume.truth == 1) > 4)] = BACKGROUND
    drawn[ndimage.distance_transform_edt(truth) > 3] = FOREGROUND
    label = write(tmp_path / "scribbles.nrrd", drawn, volume.affine)
    options = {"selected_label_name": "spleen", "result_extension": ".nii"}
    mask = np.asarray(mask_of(infer(server, "network+graphcut", "axial", label, **options)).dataobj)
    assert agrees(mask, drawn)
    assert dice(mask, truth) > dice((automatic == 2).astype(np.uint8), truth) - 0.02
    # The cache changes nothing: an upload is segmented again.
    client_file = volume.image.open("rb")
    files = {
        "params": (None, json.dumps({"label_info": LABEL_INFO, **options})),
        "label": label.open("rb"),
        "file": client_file,
    }
    url = f"{server.url}/infer/network%2Bgraphcut"
    again = requests.post(url, params={"output": "image"}, files=files, timeout=120)
    assert (np.asarray(mask_of(again).dataobj) == mask).all()


BAD: Mapping[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "no list of segments": ({"label_info": None}, ("label_info",)),
    "no scribble segments": ({"label_info": LABEL_INFO[:3]}, ("foreground_scribbles",)),
    "no number": ({"label_info": [{"name": "foreground_scribbles", "id": "x"}]}, ("whole number",)),
    "no foreground": ({"label_info": LABEL_INFO[:4]}, ("foreground",)),
    "nothing drawn": ({"label_info": [{"name": "foreground_scribbles", "id": 77}]}, ("no scribbles",)),
    "unknown label": ({"selected_label_name": "kidney"}, ("liver, spleen", "kidney")),
    "five bounds": ({"roi": [1, 2, 3, 4, 5]}, ("roi",)),
    "no bounds": ({"roi": ["a"] * 6}, ("roi",)),
    "outside": ({"roi": [900, 950, 0, 5, 0, 5]}, ("outside", "voxels")),
    "nothing inside": ({"roi": [0, 1, 0, 1, 0, 1]}, ("no foreground", "region")),
    "lamda": ({"lamda": -1}, ("lamda",)),
    "sigma": ({"sigma": "wide"}, ("sigma",)),
    "half a bin": ({"num_bins": 2.5}, ("num_bins", "whole number")),
    "kept as a label": ({"save_label": True}, ("submit",)),
    "a file of the server": ({"label": "/etc/passwd"}, ("label",)),
}


def test_bad_requests_are_answered_with_a_sentence(
    server: LiveServer, volumes: dict[str, Volume], tmp_path: Path
) -> None:
    volume = volumes["axial"]
    label = write(tmp_path / "scribbles.nrrd", draw(volume.truth, 1), volume.affine)
    for case, (params, words) in BAD.items():
        sent = None if "label" in params else label
        refused(infer(server, "histogram+graphcut", "axial", sent, **params), case, *words)
    refused(infer(server, "network+graphcut", "axial", label), "no label named", "selected_label_name")
    refused(infer(server, "gmm+graphcut", "axial", None), "no file", "no scribbles")
    shifted = volume.affine.copy()
    shifted[0, 3] += 1
    other = write(tmp_path / "shifted.nrrd", draw(volume.truth, 1), shifted)
    refused(infer(server, "gmm+graphcut", "axial", other), "another grid", "grid")
    (tmp_path / "damaged.nrrd").write_bytes(b"NRRD0004\nno")
    refused(infer(server, "gmm+graphcut", "axial", tmp_path / "damaged.nrrd"), "damaged", "cannot be read")


def refused(answer: requests.Response, case: str, *words: str) -> None:
    assert 400 <= answer.status_code < 500, f"{case}: {answer.status_code} {answer.text[:500]}"
    detail = answer.json()["detail"]
    assert "\n" not in detail
    for word in words:
        assert word in detail, case


# Limits, without a server.


def asked(sent: Mapping[str, Any], image: str) -> InferenceRequest:
    return InferenceRequest(scan=RequestedScan(image, keep=False), options=InferenceOptions.model_validate(sent))


def run(task: GraphCut, volume: Volume, drawn: np.ndarray, folder: Path, **params: Any) -> np.ndarray:
    label = write(folder / "scribbles.nii.gz", drawn, volume.affine)
    sent = {"label": str(label), "label_info": LABEL_INFO, "result_extension": ".nii", **params}
    file, _ = task(task.parsed(sent, asked(sent, str(volume.image)), folder))
    return np.asarray(nib.load(file).dataobj)


@pytest.fixture(params=["histogram", "mixture"])
def task(request: pytest.FixtureRequest, tmp_path: Path) -> GraphCut:
    project = Project.from_conf(CONF)
    return GraphCut(project, ServedModels(project, tmp_path / "state"), request.param, "")


def test_one_voxel_is_enough_to_draw(task: GraphCut, tmp_path: Path) -> None:
    volume = write_volume(tmp_path / "a.nii.gz", tmp_path / "b.nii.gz")
    drawn = np.zeros_like(volume.truth)
    centre = tuple(np.argwhere(volume.truth == 2).mean(0).astype(int))
    drawn[centre] = FOREGROUND
    mask = run(task, volume, drawn, tmp_path)
    assert mask[centre] == 1
    assert mask.sum() < mask.size / 2


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_single_slice(task: GraphCut, tmp_path: Path, axis: int) -> None:
    volume = write_volume(tmp_path / "a.nii.gz", tmp_path / "b.nii.gz", seed=3)
    value = 1
    where = int(np.argwhere(volume.truth == value).mean(0)[axis])
    part = tuple(slice(where, where + 1) if a == axis else slice(None) for a in range(3))
    truth = volume.truth[part]
    scan = np.asarray(nib.load(volume.image).dataobj)[part]
    volume = Volume(write(tmp_path / "c.nii.gz", scan, volume.affine), volume.label, volume.affine, truth)
    depth, distance = (ndimage.distance_transform_edt(side) for side in (truth == value, truth != value))
    drawn = np.where(depth >= 0.6 * depth.max(), FOREGROUND, np.where(distance > 3, BACKGROUND, 0)).astype(np.uint8)
    mask = run(task, volume, drawn, tmp_path)
    assert agrees(mask, drawn)
    assert dice(mask, truth == value) > 0.8


def test_a_scan_beyond_the_window_has_no_contrast(task: GraphCut, tmp_path: Path) -> None:
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    scan = np.random.default_rng(0).integers(1_000, 2_000, (20, 21, 22)).astype(np.int16)
    volume = Volume(write(tmp_path / "a.nii.gz", scan, affine), tmp_path, affine, scan)
    drawn = np.zeros(scan.shape, np.uint8)
    drawn[8:12, 8:12, 10], drawn[2, :, 10] = FOREGROUND, BACKGROUND
    assert agrees(run(task, volume, drawn, tmp_path), drawn)


def test_bounds_in_any_order_and_beyond_the_scan(task: GraphCut, tmp_path: Path) -> None:
    volume = write_volume(tmp_path / "a.nii.gz", tmp_path / "b.nii.gz")
    drawn = draw(volume.truth, 1, background=False)
    found = [
        run(task, volume, drawn, tmp_path, roi=bounds)
        for bounds in ([14, 31, 0, 31, 4, 31], [31, 14, 31, 0, 31, 4], [14, 99, -7, 80, 4, 31.4])
    ]
    assert (found[0] == found[1]).all()
    assert (found[0] == found[2]).all()
    assert found[0].any()
    assert not found[0][:14].any()
    assert not found[0][:, :, :4].any()


def test_a_large_region_is_cut_on_larger_voxels(
    task: GraphCut, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = write_volume(tmp_path / "a.nii.gz", tmp_path / "b.nii.gz", spacing=(1.0, 2.0, 1.5))
    drawn = draw(volume.truth, 1)
    fine = run(task, volume, drawn, tmp_path)
    monkeypatch.setattr(module, "_MAX_VOXELS", 4_000)
    coarse = run(task, volume, drawn, tmp_path)
    assert agrees(coarse, drawn)
    assert (coarse != fine).any()
    assert dice(coarse, volume.truth == 1) > 0.8


def test_tasks_of_one_label_need_no_name(tmp_path: Path) -> None:
    project = Project.from_conf({**CONF, "labels": "liver"})
    tasks = all_scribble_tasks(project, None, None)  # type: ignore[arg-type]
    label = write(tmp_path / "scribbles.nrrd", np.zeros((2, 2, 2), np.uint8), np.eye(4))
    for task in tasks.values():
        assert isinstance(task, GraphCut)
        sent = {"label": str(label), "label_info": LABEL_INFO}
        assert task.parsed(sent, asked(sent, ""), tmp_path).selected == "liver"
        with pytest.raises(HTTPException, match="liver"):
            task.parsed({**sent, "selected_label_name": "x"}, asked(sent, ""), tmp_path)
