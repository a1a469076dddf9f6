"""The uncertainty map: requested as Slicer does, stored with the labels, never used as one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType

import nibabel as nib
import numpy as np
import pytest
import requests
from fastapi import HTTPException
from live import LABELS, LiveServer, Volume, slicer, write_volume

from deformux_label.lib.store.datastore import CheckedDatastore

GEOMETRIES = ["permuted", "oblique", "oblique_nrrd"]


def test_the_map_is_stored_beside_the_label(
    server: LiveServer, volumes: dict[str, Volume], trainings: list, slicer_client: ModuleType, tmp_path: Path
) -> None:
    client = slicer_client.MONAILabelClient(server.url, str(tmp_path), "radiologist-1")
    models = client.info()["models"]
    jobs = []
    for number, name in enumerate(GEOMETRIES):
        model = ("segmentation", "edit")[number % 2]
        assert models[model]["config"]["uncertainty"] == ["off", "on"]
        params = {"uncertainty": "on", "result_extension": ".nrrd", "result_dtype": "uint8"}
        _, reply = client.infer(model, name, params)
        found = reply["uncertainty"]
        assert set(found) == {"tag", "look_next", "mean"}
        assert found["tag"] == "uncertainty"
        assert 0 < found["mean"] <= 100
        unsure = nib.load(saved(server, name, tmp_path))
        values = np.asarray(unsure.dataobj)
        assert values.shape == volumes[name].truth.shape
        assert values.dtype == np.uint8
        assert 50 < values.max() <= 100
        np.testing.assert_allclose(unsure.affine, volumes[name].affine, atol=1e-3)
        assert values[tuple(found["look_next"])] >= values.max() / 3
        jobs += [{"image": str(volumes[name].image)}, {"image": unsure.get_filename()}]
    seen = slicer(jobs)
    for image, unsure in zip(seen[::2], seen[1::2], strict=True):
        assert image["dimensions"] == unsure["dimensions"]
        np.testing.assert_allclose(image["matrix"], unsure["matrix"], atol=1e-3)


def saved(server: LiveServer, name: str, folder: Path) -> Path:
    answer = requests.get(f"{server.url}/datastore/label", params={"label": name, "tag": "uncertainty"}, timeout=60)
    assert answer.status_code == 200, answer.text
    path = folder / f"{name}_uncertainty.nii.gz"
    path.write_bytes(answer.content)
    return path


def test_the_map_does_not_count_as_a_label(server: LiveServer, volumes: dict[str, Volume], trainings: list) -> None:
    name = "anisotropic"
    before = requests.get(f"{server.url}/info/", timeout=60).json()["datastore"]
    assert "uncertainty" not in server.infer(name, query={"output": "json"}).json(), "only where it is asked for"
    answer = server.infer(name, query={"output": "json"}, uncertainty=["on", "off"])
    assert answer.json()["uncertainty"]["tag"] == "uncertainty"
    info = requests.get(f"{server.url}/info/", timeout=60).json()
    assert info["datastore"] == before
    assert "final" not in server.objects()[name]["labels"]
    assert server.objects()[name]["labels"]["uncertainty"]["info"]["model_version"] == answer.json()["model_version"]
    revisions = requests.get(
        f"{server.url}/deformux/labels/revisions", params={"image": name, "tag": "uncertainty"}, timeout=60
    )
    assert revisions.status_code == 404
    # A test of another file may still lease the volume, as another annotator.
    requests.delete(f"{server.url}/deformux/leases", params={"image": name}, timeout=60)
    for _ in range(20):  # a skipped volume is offered again
        sample = requests.post(f"{server.url}/activelearning/first", json={"client_id": "looks"}, timeout=60).json()
        if sample["id"] == name:
            break
    assert sample["id"] == name, "a volume with a map is still to be labelled"
    requests.delete(f"{server.url}/deformux/leases", params={"image": name}, timeout=60)
    refused = server.submit(name, volumes[name].label, tag="uncertainty")
    assert refused.status_code == 400
    assert "under a different tag" in refused.json()["detail"]
    wrong = server.infer(name, uncertainty="maybe")
    assert wrong.status_code == 400
    assert "off, on" in wrong.json()["detail"]
    # An upload is not among the studies, so its map is not stored.
    with volumes[name].image.open("rb") as file:
        files = {"params": (None, json.dumps({"uncertainty": "on"})), "file": (volumes[name].image.name, file)}
        reply = requests.post(
            f"{server.url}/infer/segmentation", params={"output": "json"}, files=files, timeout=60
        ).json()
    assert reply["uncertainty"]["tag"] is None
    assert reply["uncertainty"]["mean"] == pytest.approx(answer.json()["uncertainty"]["mean"])


def test_a_project_without_a_model_has_no_map(fresh: tuple[LiveServer, Path], volumes: dict[str, Volume]) -> None:
    server, _ = fresh
    with volumes["axial"].image.open("rb") as file:
        requests.put(
            f"{server.url}/datastore/", params={"image": "unsure"}, files={"file": ("a.nii.gz", file)}, timeout=60
        )
    try:
        answer = server.infer("unsure", query={"output": "json"}, uncertainty="on")
        assert answer.status_code == 200
        assert "uncertainty" not in answer.json()
    finally:
        requests.delete(f"{server.url}/datastore/image", params={"id": "unsure"}, timeout=30)


def test_the_map_survives_a_lost_index_and_goes_with_its_volume(tmp_path: Path) -> None:
    studies = tmp_path / "studies"
    volume = write_volume(studies / "a.nii.gz", tmp_path / "labels" / "a.nii.gz")
    other = write_volume(tmp_path / "b.nii.gz", tmp_path / "labels" / "b.nii.gz", spacing=(2.0, 2.0, 4.0))
    datastore = CheckedDatastore(str(studies), labels=LABELS)
    for percent in (100, 37):
        unsure = tmp_path / "map.nii.gz"
        nib.save(nib.Nifti1Image(np.full(volume.truth.shape, percent, np.uint8), volume.affine), unsure)
        datastore.save_uncertainty("a", unsure, {"mean": percent})
    (studies / "datastore_v2.json").unlink()
    datastore = CheckedDatastore(str(studies), labels=LABELS)
    assert (np.asarray(nib.load(datastore.get_label_uri("a", "uncertainty")).dataobj) == 37).all()
    assert datastore.get_unlabeled_images() == ["a"]
    assert datastore.get_labeled_images() == []
    assert datastore.datalist() == []
    assert datastore.status()["label_tags"] == {}
    assert datastore.revisions.known() == {}
    with pytest.raises(HTTPException, match="under a different tag"):
        datastore.save_label("a", str(volume.label), "uncertainty", {})
    # The name is reused only after this volume is deleted; the new one has no map.
    with pytest.raises(HTTPException, match="a-2"):
        datastore.add_image("a", str(other.image), {})
    datastore.remove_image("a")
    datastore.add_image("a", str(shutil.copy(other.image, tmp_path / "a.nii.gz")), {})
    datastore.refresh()
    assert datastore.get_labels_by_image_id("a") == {}
    assert not (studies / "labels" / "uncertainty" / "a.nii.gz").exists()
