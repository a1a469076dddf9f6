"""Training through a live server: what clients see, what is stored, and which project sees it."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import requests
from live import APP, LABELS, TAUGHT_CONF, LiveServer, Training, Volume, preloaded_stock_command

from deformux.networks.model_file import load_model
from deformux.publishing.model_versions import ModelVersions
from deformux.publishing.validation_split import Assignment
from deformux_label.lib.configs.project import Project
from deformux_label.lib.store.leases import Leases


def state_of(studies: Path) -> Path:
    return Project.from_conf(TAUGHT_CONF).state_folder(APP, str(studies))


def test_both_trainings_succeed(trainings: list[Training]) -> None:
    for number, training in enumerate(trainings, start=1):
        assert training.task["status"] == "DONE", training.task
        assert training.final["status"] == "done"
        assert training.final["version"] == f"v000{number}"
        assert training.final["total_time"] > 0
        assert training.final["epoch"] == training.final["total_epochs"]


def test_statistics_are_live_and_safe_for_the_slicer_extension(trainings: list[Training]) -> None:
    running = [stats for stats in trainings[1].seen if stats.get("status") == "running"]
    steps = [stats["step"] for stats in running if "step" in stats]
    assert len(set(steps)) >= 3
    assert steps == sorted(steps)
    for stats in running:
        # The extension's monitorTraining and updateAccuracyBar compute this every five seconds.
        assert not stats["total_time"]
        assert 0 <= stats["epoch"] / stats["total_epochs"] <= 1
        assert isinstance(stats["best_metric"], float)
        assert 0 <= stats["best_metric"] <= 1
    losses = [stats["loss"] for stats in running if stats.get("loss") is not None]
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]
    assert any(stats.get("eta_seconds", 0) > 0 for stats in running)


def test_versions_are_published_with_their_cards(trainings: list[Training], studies: Path) -> None:
    versions = ModelVersions(state_of(studies) / "versions")
    assert versions.names() == ["v0001", "v0002"]
    assert versions.published() == "v0002"
    first, second = (load_model(versions.path(name))[1] for name in versions.names())
    assert first.labels == second.labels == LABELS
    assert first.parent is None
    assert second.parent == "v0001"
    assert first.training_cases == ("case_0", "case_1", "case_2")
    # The first four train and the fifth validates; among new ones the hash of the id decides.
    cases = {f"case_{number}" for number in range(6)}
    assignment = Assignment(state_of(studies) / "assignment.json")
    validation = {case for case in cases if assignment.validates(case)}
    assert validation
    assert not validation & set(first.training_cases)
    assert set(second.training_cases) == cases - validation
    assert set(second.validation["per_case"]) == validation
    assert trainings[1].final["best_metric"] == round(second.validation["mean_dice"], 5) > 0.5
    # Measured and unmeasured scores.
    assert (first.provisional, second.provisional) == (True, False)
    assert second.gate["candidate"] > (second.gate["incumbent"] or 0)
    assert trainings[1].final["reason"] == second.gate["reason"]
    labels = {case: hashlib.sha256((studies / "labels/final" / f"{case}.nii.gz").read_bytes()) for case in cases}
    assert second.training_labels == {case: labels[case].hexdigest() for case in cases - validation}


def test_dice_of_a_corrected_proposal(server: LiveServer, volumes: dict[str, Volume], trainings: list) -> None:
    volume = volumes["anisotropic"]
    try:
        assert server.infer(volume.id, save_label=True).status_code == 200
        assert "original" in server.objects()[volume.id]["labels"]
        assert server.submit(volume.id, volume.label).status_code == 200
        info = server.objects()[volume.id]["image"]["info"]
        original = requests.get(
            f"{server.url}/datastore/label", params={"label": volume.id, "tag": "original"}, timeout=30
        ).content
        proposal = np.asarray(nib.Nifti1Image.from_bytes(gzip.decompress(original)).dataobj)
        by_hand = {}
        for value, name in enumerate(LABELS, start=1):
            a, b = proposal == value, volume.truth == value
            by_hand[name] = 2 * (a & b).sum() / (a.sum() + b.sum())
            assert info["dice_per_label"][name] == round(by_hand[name], 4)
        assert info["dice"] == round(np.mean(list(by_hand.values())), 4)
    finally:
        for tag in ("original", "final"):
            requests.delete(f"{server.url}/datastore/label", params={"id": volume.id, "tag": tag}, timeout=30)


def test_uncertainty_scores_are_kept_with_the_version(
    server: LiveServer, studies: Path, trainings: list[Training]
) -> None:
    state = state_of(studies)
    unlabelled = {name for name, entry in server.objects().items() if "final" not in entry["labels"]}
    path = state / "selection" / "v0002.json"
    end = time.monotonic() + 240
    scores: dict[str, dict] = {}
    while not unlabelled <= set(scores):
        assert time.monotonic() < end, f"not scored in the background: {server.log.read_text()[-3000:]}"
        time.sleep(0.1)
        scores = json.loads(path.read_text())["scores"] if path.exists() else {}
    taken = set(Leases(state / "leases.json").active())
    best = max((scores[name]["uncertainty"], name) for name in unlabelled - taken if scores[name] is not None)
    sample = requests.post(f"{server.url}/activelearning/uncertainty", json={"client_id": "x"}, timeout=120).json()
    assert sample["id"] == best[1]
    assert 0 < sample["uncertainty"] == best[0] < 1
    assert sample["scored_with"] == "v0002"


def test_other_projects_do_not_see_these_weights(
    start: Callable[..., LiveServer],
    studies: Path,
    fresh: tuple[LiveServer, Path],
    trainings: list,
    volumes: dict[str, Volume],
) -> None:
    other_labels = start(studies, {**TAUGHT_CONF, "labels": "spleen,liver"}, preloaded_stock_command)
    answer = other_labels.infer("axial", query={"output": "json"}).json()
    assert answer["model_version"] is None
    assert answer["label_names"] == {"spleen": 1, "liver": 2}
    other_studies, _ = fresh
    assert requests.get(f"{other_studies.url}/info/", timeout=30).json()["train_stats"]["segmentation"] == {}
    with volumes["axial"].image.open("rb") as file:
        answer = requests.post(
            f"{other_studies.url}/infer/segmentation",
            params={"output": "json"},
            files={"file": ("a.nii.gz", file)},
            timeout=60,
        )
    assert answer.json()["model_version"] is None
    # The same project finds its weights again after a restart.
    again = start(studies, TAUGHT_CONF, preloaded_stock_command)
    assert again.infer("axial", query={"output": "json"}).json()["model_version"] == "v0002"
    other_labels.stop()
    again.stop()


def test_a_stopped_training_says_so_and_changes_nothing(
    server: LiveServer, studies: Path, trainings: list[Training]
) -> None:
    assert requests.post(f"{server.url}/train/segmentation", json={"steps": 5000}, timeout=30).status_code == 200
    for _ in range(600):
        stats = requests.get(f"{server.url}/info/", timeout=30).json()["train_stats"]["segmentation"]
        if stats["status"] == "running":
            break
        time.sleep(0.2)  # the process is starting; until then the last training is shown
    assert requests.post(f"{server.url}/train/segmentation", json={}, timeout=30).status_code == 429
    assert requests.delete(f"{server.url}/train/", timeout=30).json()["status"] == "STOPPED"
    for _ in range(100):
        stats = requests.get(f"{server.url}/info/", timeout=30).json()["train_stats"]["segmentation"]
        if stats["status"] != "running":
            break
        time.sleep(0.1)  # MONAI Label answers once the signal is sent; the process ends a moment later
    assert stats["status"] == "stopped"
    assert "stopped" in stats["error"]
    assert ModelVersions(state_of(studies) / "versions").published() == "v0002"
    assert server.infer("axial").status_code == 200
