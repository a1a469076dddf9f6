"""A label keeps its meaning when the project's list of labels changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import requests
from fastapi import HTTPException
from live import CONF, LiveServer, Volume, refused_start, remove_state, serve_command, write

from deformux.publishing.project_plan import ProjectPlanner
from deformux_label.lib.configs.project import Project
from deformux_label.lib.infers.model_loader import ServedModels
from deformux_label.lib.scoring.dice import DiceScoring
from deformux_label.lib.store.datastore import CheckedDatastore, StudiesError
from deformux_label.lib.trainers.finetune import FineTune

pytestmark = pytest.mark.usefixtures("unwatched")


def opened(volume: Volume, *labels: str) -> CheckedDatastore:
    return CheckedDatastore(str(volume.image.parent), labels=labels)


def values(path: str) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def mapped(truth: np.ndarray, *to: int) -> np.ndarray:
    return np.array([0, *to], np.uint8)[truth]


@pytest.mark.parametrize(
    ("labels", "expected", "looked_for"),
    [
        (("liver", "spleen"), (1, 2), None),
        (("spleen", "liver"), (2, 1), None),
        (("liver", "kidney", "spleen"), (1, 3), ["liver", "spleen"]),
        (("spleen",), (0, 1), None),
        (("kidney", "liver"), (2, 0), ["liver"]),
    ],
)
def test_values_follow_the_names(
    volume: Volume, tmp_path: Path, labels: tuple[str, ...], expected: tuple[int, ...], looked_for: list[str] | None
) -> None:
    store = opened(volume, "liver", "spleen")
    store.save_label("scan", str(volume.label), "final", {"client_id": "anna"})
    stored = Path(store.get_label_uri("scan", "final")).read_bytes()
    again = opened(volume, *labels)
    wanted = mapped(volume.truth, *expected)
    assert (values(again.get_label_uri("scan", "final")) == wanted).all()
    np.testing.assert_allclose(nib.load(again.get_label_uri("scan", "final")).affine, volume.affine, atol=1e-4)
    assert again.get_label_info("scan", "final").get("annotated") == looked_for
    assert (values(again.datalist()[0]["label"]) == wanted).all()
    # A training gets the mapped label.
    project = Project.from_conf({**CONF, "labels": ",".join(labels)})
    state = tmp_path / "state"
    planner = ProjectPlanner(state / "plan", labels=project.labels)
    (case,) = FineTune(project, ServedModels(project, state), state, planner).cases(again)
    assert (values(str(case.label)) == wanted).all()
    assert case.annotates(labels, len(labels)).tolist() == [looked_for is None or name in looked_for for name in labels]
    # Restoring gives the mapped label.
    again.restore_label("scan", 1, "ben")
    assert (values(again.get_label_uri("scan", "final")) == wanted).all()
    assert again.revisions.newest("scan", "final").labels == list(labels)
    # Nothing is lost: with the former list the former label is back.
    first = opened(volume, "liver", "spleen")
    assert first.revisions.file(first.revisions.get("scan", "final", 1)).read_bytes() == stored
    first.restore_label("scan", 1, "anna")
    assert (values(first.get_label_uri("scan", "final")) == volume.truth).all()


def test_unlabelled_voxels_stay_unlabelled(volume: Volume, tmp_path: Path) -> None:
    sent = volume.truth.copy()
    sent[:4] = 255
    label = write(tmp_path / "partly.nii.gz", sent, volume.affine)
    opened(volume, "liver", "spleen").save_label("scan", str(label), "final", {"annotated": ["liver"]})
    again = opened(volume, "spleen", "liver", "kidney")
    table = np.arange(256, dtype=np.uint8)
    table[:3] = 0, 2, 1
    assert (values(again.get_label_uri("scan", "final")) == table[sent]).all()
    assert again.get_label_info("scan", "final")["annotated"] == ["liver"]
    only = opened(volume, "spleen")
    assert only.get_labeled_images() == [], "the spleen was not looked for"
    assert only.get_unlabeled_images() == ["scan"]
    assert "annotated" not in only.status()["unusable_labels"]["first"][0]["reason"]


def test_dice_of_another_list(volume: Volume) -> None:
    store = opened(volume, "liver", "spleen")
    for tag in ("final", "original"):
        store.save_label("scan", str(volume.label), tag, {})
    again = opened(volume, "spleen", "liver")
    again.save_label("scan", str(write_swapped(volume)), "original", {})
    score = DiceScoring(Project.from_conf({**CONF, "labels": "spleen,liver"})).score(again, "scan")
    assert score["dice_per_label"] == {"spleen": 1.0, "liver": 1.0}


def test_no_dice_for_labels_that_were_not_looked_for(volume: Volume, tmp_path: Path) -> None:
    store = opened(volume, "liver", "spleen")
    store.save_label("scan", str(volume.label), "original", {})
    sent = volume.truth.copy()
    sent[: len(sent) // 2] = 255
    sent[sent == 2] = 0
    label = write(tmp_path / "partly.nii.gz", sent, volume.affine)
    store.save_label("scan", str(label), "final", {"annotated": ["liver"]})
    score = DiceScoring(Project.from_conf({**CONF, "labels": "liver,spleen"})).score(store, "scan")
    assert score == {"dice": 1.0, "dice_per_label": {"liver": 1.0, "spleen": None}}
    # A proposal that was damaged meanwhile has no Dice, and raises no error.
    Path(store.get_label_uri("scan", "original")).write_bytes(b"x")
    assert DiceScoring(Project.from_conf({**CONF, "labels": "liver,spleen"})).score(store, "scan") is None


def write_swapped(volume: Volume) -> Path:
    return write(volume.label.with_name("swapped.nii.gz"), mapped(volume.truth, 2, 1), volume.affine)


def test_labels_stored_without_names(volume: Volume) -> None:
    store = opened(volume, "liver", "spleen")
    store.save_label("scan", str(volume.label), "final", {"client_id": "anna"})
    # As the previous version wrote it.
    folder = volume.image.parent
    (folder / ".deformux" / "project.json").unlink()
    record = folder / ".deformux" / "revisions" / "scan" / "final" / "0001.json"
    old = {key: item for key, item in json.loads(record.read_text()).items() if key not in ("labels", "image_file")}
    record.write_text(json.dumps({**old, "info": {"client_id": "anna"}}))
    index = json.loads((folder / "datastore_v2.json").read_text())
    index["objects"]["scan"]["labels"]["final"]["info"] = {"client_id": "anna", "revision": 1, "ts": 1, "name": "x"}
    index["objects"]["scan"]["image"]["info"] = {"ts": 1, "name": "scan.nii.gz"}
    (folder / "datastore_v2.json").write_text(json.dumps(index))
    assert (values(opened(volume, "liver", "spleen").get_label_uri("scan", "final")) == volume.truth).all()
    again = opened(volume, "spleen", "liver")
    assert (values(again.get_label_uri("scan", "final")) == mapped(volume.truth, 2, 1)).all()
    (folder / "datastore_v2.json").unlink()
    again = opened(volume, "spleen", "liver")
    assert (values(again.get_label_uri("scan", "final")) == mapped(volume.truth, 2, 1)).all()


def test_labels_of_another_project_end_the_start(volume: Volume, tmp_path: Path) -> None:
    opened(volume, "liver", "spleen").save_label("scan", str(volume.label), "final", {})
    record = volume.image.parent / ".deformux" / "project.json"
    before = record.read_bytes()
    with pytest.raises(StudiesError, match=r"liver, spleen, and none .* kidney"):
        opened(volume, "kidney")
    assert record.read_bytes() == before, "a refused start changes nothing"
    conf = {**CONF, "labels": "kidney"}
    for studies, sentence in (
        (volume.image.parent, "are of liver, spleen"),
        ("https://pacs.example/dicom-web", "studies must be a folder"),
    ):
        assert sentence in refused_start([*serve_command(studies, conf), "--port", "8999"], tmp_path)
    remove_state(volume.image.parent, conf)


def test_a_server_with_another_list(start_here: Callable[..., LiveServer], volume: Volume) -> None:
    opened(volume, "liver", "spleen").save_label("scan", str(volume.label), "final", {"client_id": "anna"})
    server = start_here(volume.image.parent, {**CONF, "labels": "spleen,liver"}, serve_command)
    answer = requests.get(f"{server.url}/datastore/label", params={"label": "scan", "tag": "final"}, timeout=60)
    (volume.label.with_name("got.nii.gz")).write_bytes(answer.content)
    assert (values(str(volume.label.with_name("got.nii.gz"))) == mapped(volume.truth, 2, 1)).all()
    info = requests.get(f"{server.url}/datastore/label/info", params={"label": "scan", "tag": "final"}, timeout=60)
    assert (info.json()["labels"], info.json()["stored_labels"]) == (["spleen", "liver"], ["liver", "spleen"])
    assert "stored labels are used by their names" in server.log.read_text()


def test_a_revision_without_common_labels(volume: Volume) -> None:
    store = opened(volume, "liver", "spleen")
    store.save_label("scan", str(volume.label), "final", {})
    both = opened(volume, "liver", "kidney")
    both.save_label("scan", str(write(volume.label.with_name("k.nii.gz"), volume.truth, volume.affine)), "final", {})
    kidney = opened(volume, "kidney")
    with pytest.raises(HTTPException, match="liver, spleen"):
        kidney.restore_label("scan", 1, "anna")
