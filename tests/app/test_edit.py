"""Clicks through live servers: their positions, their effects, and refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import requests
from live import CONF, LABELS, LiveServer, Volume, publish_untrained, serve_command, slicer, write, write_volume

from deformux_label.lib.requests.clicks import MAX_POINTS

VALUES = {"liver": 1, "spleen": 2, "background": 0}
GEOMETRIES = ["axial", "anisotropic", "permuted", "oblique", "oblique_nrrd", "plain_nii"]
# Less than two volumes with their editors, so that sessions evict each other.
EDIT_CONF = {**CONF, "cache_gb": "0.001"}


def edit(
    server: LiveServer, image: str, points: Mapping[str, Any], *, mask: Path | None = None, **params: Any
) -> requests.Response:
    """Send a raw request to edit."""
    files: dict[str, Any] = {"params": (None, json.dumps({"result_extension": ".nii", **points, **params}))}
    if mask is not None:
        files["label"] = (mask.name, mask.read_bytes())
    query = {"image": image, "output": "image"}
    return requests.post(f"{server.url}/infer/edit", params=query, files=files, timeout=120)


def array_of(answer: requests.Response) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    return np.asarray(nib.Nifti1Image.from_bytes(answer.content).dataobj)


def automatic(server: LiveServer, image: str) -> np.ndarray:
    return array_of(server.infer(image, query={"output": "image"}, result_extension=".nii"))


def refused(answer: requests.Response, *words: str) -> None:
    assert 400 <= answer.status_code < 500, f"{answer.status_code}: {answer.text[:500]}"
    detail = answer.json()["detail"]
    assert "\n" not in detail
    for word in words:
        assert word in detail


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("edits")


@pytest.fixture(scope="module")
def scans(folder: Path) -> dict[str, Volume]:
    """Make small scans: left-handed, as most NIfTI files are, and as thin as possible."""
    left = np.diag([-1.0, 1.0, 1.0])
    made = {}
    for name, axes in {"one": None, "two": None, "three": None, "left": left}.items():
        image, label = folder / "studies" / f"{name}.nii.gz", folder / "labels" / f"{name}.nii.gz"
        made[name] = write_volume(image, label, axes=axes, seed=len(made), spacing=(2.0, 2.0, 2.5))
    scan, truth = (np.asarray(nib.load(path).dataobj) for path in (made["one"].image, made["one"].label))
    middle = truth.shape[1] // 2
    for name, part in {
        "flat": np.s_[:, middle],
        "slice": np.s_[:, middle, :, None],
        "thin": np.s_[:, None, middle],
    }.items():
        image, label = folder / "studies" / f"{name}.nii.gz", folder / "labels" / f"{name}.nii.gz"
        write(image, scan[part], made["one"].affine)
        write(label, truth[part], made["one"].affine)
        made[name] = Volume(image, label, made["one"].affine, truth[part])
    return made


@pytest.fixture(scope="module")
def running(
    start_here: Callable[..., LiveServer], folder: Path, scans: dict[str, Volume], volumes: dict[str, Volume]
) -> list[LiveServer]:
    """Start a server whose untrained model reacts to clicks; a test that ends it puts the next one in its place."""
    for name in GEOMETRIES:
        shutil.copy(volumes[name].image, folder / "studies")
    publish_untrained(folder / "studies", EDIT_CONF, guidance=0.3)
    return [start_here(folder / "studies", EDIT_CONF, serve_command)]


@pytest.fixture
def editing(running: list[LiveServer]) -> LiveServer:
    return running[0]


def away_from(labels: np.ndarray, value: int, number: int, seed: int = 0, margin: int = 3) -> list[list[int]]:
    """Return voxels of another value, none at the same distance from both ends of an axis."""
    rng = np.random.default_rng(seed)
    found = rng.permutation(np.argwhere(labels != value))
    last = np.array(labels.shape) - 1
    return found[(abs(2 * found - last) >= margin).all(1)][:number].tolist()


def test_markups_placed_in_slicer_land_on_their_voxels(
    editing: LiveServer, volumes: dict[str, Volume], slicer_client: ModuleType, tmp_path: Path
) -> None:
    client = slicer_client.MONAILabelClient(editing.url, str(tmp_path), "radiologist-1")
    info = client.info()
    config = {k: v[0] if isinstance(v, list) else v for k, v in info["models"]["edit"]["config"].items()}
    assert info["models"]["edit"]["type"] == "deepedit"
    assert list(info["models"])[:2] == ["segmentation", "edit"], "the extension runs the first one automatically"
    placed: dict[str, dict[str, list[list[int]]]] = {}
    jobs = []
    for number, name in enumerate(GEOMETRIES):
        found = automatic(editing, name)
        placed[name] = {label: away_from(found, value, 2, 7 * number + value) for label, value in VALUES.items()}
        markups = {
            label: nib.affines.apply_affine(volumes[name].affine, voxels).tolist()
            for label, voxels in placed[name].items()
        }
        jobs.append({"image": str(volumes[name].image), "markups": markups})
    overlays = []
    for name, job, seen in zip(GEOMETRIES, jobs, slicer(jobs), strict=True):
        # As the extension does: points of every label of the app, the active one, then the options of the task.
        assert set(seen["points"]) == set(info["labels"])
        params = {**seen["points"], "label": "spleen", **config}
        params |= {"result_extension": ".nrrd", "result_dtype": "uint8"}
        file, reply = client.infer("edit", name, params)
        assert reply["label_names"] == {"liver": 1, "spleen": 2}
        overlays.append({"image": job["image"], "result": file, "labels": list(LABELS)})
        overlays[-1]["probes"] = [position for positions in job["markups"].values() for position in positions]
        answer = edit(editing, name, placed[name], label="spleen")
        labels = array_of(answer)
        for label, voxels in placed[name].items():
            assert (labels[tuple(np.transpose(voxels))] == VALUES[label]).all(), (name, label)
    for seen in slicer(overlays):
        assert seen["at_probes"] == ["liver"] * 2 + ["spleen"] * 2 + [None] * 2
        assert seen["result_dimensions"] == seen["dimensions"]


def test_an_edit_depends_only_on_its_clicks(editing: LiveServer) -> None:
    found = automatic(editing, "one")
    voxels = away_from(found, 1, 3)
    assert (array_of(edit(editing, "one", {})) == found).all(), "no click, no change"
    first = edit(editing, "one", {"liver": voxels[:2], "spleen": [], "background": []}, client_id="a").content
    more = edit(editing, "one", {"liver": voxels, "background": [[1, 2, 3]]}, client_id="a")
    assert (array_of(more) != found).any()
    assert edit(editing, "one", {"liver": voxels[:2]}, client_id="a").content == first, "two clicks taken back"
    assert edit(editing, "one", {"liver": voxels[1::-1]}, client_id="b").content == first, "in another order"
    as_floats = [[float(index) for index in voxel] for voxel in voxels[:2]]
    assert edit(editing, "one", {"foreground": as_floats, "label": "liver"}).content == first, "as deepgrow sends them"
    # The same voxel twice: the active label wins.
    for label in ("liver", "spleen", "background"):
        both = array_of(edit(editing, "one", dict.fromkeys(VALUES, voxels[:1]), label=label))
        assert both[tuple(voxels[0])] == VALUES[label]


def test_evicting_sessions_does_not_change_answers(editing: LiveServer, scans: dict[str, Volume]) -> None:
    requested = [(name, [[n, 5, 20]], f"client {n % 2}") for n in range(4) for name in ("one", "two", "three")]

    def ask(what: tuple[str, list, str]) -> bytes:
        name, voxels, client = what
        answer = edit(editing, name, {"spleen": voxels}, client_id=client)
        assert answer.status_code == 200, answer.text
        return answer.content

    alone = [ask(what) for what in requested]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, requested)) == alone
    kept = requests.get(f"{editing.url}/deformux/sessions", timeout=60).json()
    assert 0 < kept["bytes"] <= kept["most_bytes"] == 1_000_000
    assert kept["volumes"] < 3
    assert kept["evictions"] > 0


def test_an_edit_starts_from_the_clients_mask(editing: LiveServer, scans: dict[str, Volume], tmp_path: Path) -> None:
    scan = scans["left"]
    for params in ({}, {"label": "spleen"}):
        assert (array_of(edit(editing, "left", {}, mask=scan.label, **params)) == scan.truth).all()
    voxel = away_from(scan.truth, 2, 1)[0]
    # SmartEdit sends the active label's name and the file under the same key.
    changed = array_of(edit(editing, "left", {"spleen": [voxel]}, mask=scan.label, label="spleen", client_id="a"))
    assert changed[tuple(voxel)] == 2
    assert (changed != automatic(editing, "left")).any()
    # In Slicer's order of voxels and with its numbers.
    mirrored = scan.affine @ np.diag([1.0, 1.0, -1.0, 1.0])
    mirrored[:3, 3] = nib.affines.apply_affine(scan.affine, (0, 0, scan.truth.shape[2] - 1))
    sent = write(tmp_path / "mask.nrrd", np.array([0, 2, 1], dtype=np.uint8)[scan.truth[:, :, ::-1]], mirrored)
    names = [{"name": "spleen", "id": 1}, {"name": "liver", "id": 2}]
    in_slicer = [*voxel[:2], scan.truth.shape[2] - 1 - voxel[2]]
    points = {"spleen": [in_slicer], "voxel_order": "slicer"}
    same = array_of(edit(editing, "left", points, mask=sent, label="spleen", label_info=names, client_id="b"))
    assert (same == changed).all()
    # Back to the automatic segmentation as soon as no mask comes.
    assert (array_of(edit(editing, "left", {}, client_id="a")) == automatic(editing, "left")).all()


def test_the_stock_server_keeps_mask_and_active_label_too(server: LiveServer, volumes: dict[str, Volume]) -> None:
    """With or without a model, as other tests left the server."""
    volume = volumes["axial"]
    voxel = away_from(volume.truth, 1, 1)[0]
    answer = edit(server, "axial", {"liver": [voxel], "spleen": [voxel]}, mask=volume.label, label="spleen")
    labels = array_of(answer)
    assert labels[tuple(voxel)] == 2
    # Without the mask the rest would be empty, or the model's own.
    with_mask = array_of(edit(server, "axial", {}, mask=volume.label, label="spleen"))
    assert (with_mask == volume.truth).all()


BAD_POINTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "outside": ({"liver": [[1, 2, 26]]}, ("[1, 2, 26]", "32 x 32 x 26")),
    "negative": ({"liver": [[1, -2, 3]]}, ("[1, -2, 3]", "outside")),
    "outside as Slicer counts": ({"liver": [[1, 2, -1]], "voxel_order": "slicer"}, ("outside",)),
    "not whole": ({"background": [[1, 2, 3.5]]}, ("background", "3.5", "whole")),
    "NaN": ({"liver": [[1, 2, float("nan")]]}, ("finite",)),
    "text": ({"liver": [["1", "2", "3"]]}, ("whole",)),
    "a boolean": ({"liver": [[True, 2, 3]]}, ("whole",)),
    "two indices": ({"liver": [[1, 2]]}, ("three",)),
    "one point": ({"liver": [1, 2, 3]}, ("[i, j, k]",)),
    "an object": ({"liver": {"x": 1}}, ("list",)),
    "too many": ({"liver": [[1, 2, 3]] * MAX_POINTS, "spleen": [[1, 2, 3]]}, (str(MAX_POINTS), "1001")),
    "very many": ({"liver": [[1, 2, 3]] * 20_000}, (str(MAX_POINTS), "20000")),
    "unknown label": ({"gallbladder": [[1, 2, 3]]}, ("gallbladder", "liver, spleen, background")),
    "unknown active label": ({"label": "gallbladder"}, ("gallbladder", "liver, spleen, background")),
    "a list as active label": ({"label": ["liver"]}, ("label",)),
    "foreground of nothing": ({"foreground": [[1, 2, 3]]}, ("label", "liver, spleen")),
    "foreground of the background": ({"foreground": [[1, 2, 3]], "label": "background"}, ("liver, spleen",)),
    "unknown order": ({"voxel_order": "itk"}, ("slicer, file", "itk")),
    "a path as active label": ({"label": "/etc/passwd"}, ("label",)),
}


def test_an_image_of_two_dimensions_and_volumes_of_one_slice(editing: LiveServer, scans: dict[str, Volume]) -> None:
    for name in ("flat", "slice", "thin"):
        truth = scans[name].truth
        found = automatic(editing, name)
        assert found.shape == (truth.shape if truth.ndim == 3 else (*truth.shape, 1))
        voxel = away_from(found, 2, 1, margin=0)[0]
        for mask in (None, scans[name].label):
            assert array_of(edit(editing, name, {"spleen": [voxel]}, mask=mask))[tuple(voxel)] == 2
        refused(edit(editing, name, {"spleen": [[5, 5, 5]]}), "outside")


@pytest.mark.parametrize("kind", BAD_POINTS)
def test_bad_points(editing: LiveServer, kind: str) -> None:
    points, words = BAD_POINTS[kind]
    refused(edit(editing, "one", points), *words)
    assert editing.process.poll() is None


def test_bad_masks(editing: LiveServer, scans: dict[str, Volume], tmp_path: Path) -> None:
    scan = scans["one"]
    other = write(tmp_path / "other.nii.gz", scan.truth[:-1], scan.affine)
    refused(edit(editing, "one", {}, mask=other), "grid")
    other = write(tmp_path / "moved.nii.gz", scan.truth, scans["two"].affine)
    refused(edit(editing, "one", {"liver": [[1, 2, 3]]}, mask=other), "grid")
    other = write(tmp_path / "values.nii.gz", scan.truth + 1, scan.affine)
    refused(edit(editing, "one", {}, mask=other), "1 liver, 2 spleen")
    other = tmp_path / "text.nii.gz"
    other.write_text("this is not an image")
    refused(edit(editing, "one", {}, mask=other), "cannot be read")
    # A path on the server's disk is not an upload.
    refused(edit(editing, "one", {}, label=str(scan.label)), "label")


def test_a_project_without_a_model(fresh: tuple[LiveServer, Path], volumes: dict[str, Volume]) -> None:
    server, _ = fresh
    volume = volumes["oblique"]
    with volume.image.open("rb") as file:
        params = {"liver": [[1, 2, 3], [4, 5, 6]], "result_extension": ".nii"}
        files = {"file": (volume.image.name, file), "params": (None, json.dumps(params))}
        answer = requests.post(f"{server.url}/infer/edit", params={"output": "image"}, files=files, timeout=120)
    expected = np.zeros(volume.truth.shape, dtype=np.uint8)
    expected[[1, 4], [2, 5], [3, 6]] = 1
    assert (array_of(answer) == expected).all()


def test_another_version_is_used_at_once(editing: LiveServer, folder: Path) -> None:
    points = {"liver": [[3, 4, 5], [20, 21, 22]], "background": [[10, 20, 6]]}
    before = edit(editing, "two", points).content
    publish_untrained(folder / "studies", EDIT_CONF, guidance=0.3, bias=0.1)
    after = array_of(edit(editing, "two", points))
    assert (array_of(edit(editing, "two", {})) == automatic(editing, "two")).all()
    assert (after != nib.Nifti1Image.from_bytes(before).dataobj).any(), "both versions have weights of their own"
    assert requests.post(f"{editing.url}/deformux/versions/rollback", timeout=60).ok
    assert edit(editing, "two", points).content == before


def test_after_a_restart_the_answer_is_the_same(
    editing: LiveServer,
    running: list[LiveServer],
    start_here: Callable[..., LiveServer],
    folder: Path,
    scans: dict[str, Volume],
) -> None:
    points = {"liver": [[3, 4, 5], [20, 21, 22]], "background": [[10, 20, 6]]}
    before = edit(editing, "two", points).content
    editing.stop()
    again = running[0] = start_here(folder / "studies", EDIT_CONF, serve_command)
    assert edit(again, "two", points).content == before
    for name in ("flat", "slice", "thin"):
        assert again.submit(name, scans[name].label).status_code == 200
