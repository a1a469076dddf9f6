"""The training task in its own process: stopped, continued, failed, and the status that it reports."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
import uuid
from pathlib import Path
from typing import Any

import psutil
import pytest
from live import LABELS, Volume, write_volume

from deformux.publishing.model_versions import ModelVersions
from deformux_label.lib.store.datastore import CheckedDatastore
from deformux_label.lib.trainers.status import TrainingStatus
from preloaded import PreloadedProcess

# A network of a hundredth of the size, under the name of an ordinary one: the tests are about what is around it. The
# further processes of a training on several devices know the ordinary one only.
PROGRAM = """
import json, logging, sys
from pathlib import Path
import torch
from deformux.networks import deformux_net
if sys.argv[5] == "one":
    deformux_net.PRESETS = {"tiny": deformux_net.Preset((4, 8, 16, 32), 32, (1, 1, 1, 1))}
from fastapi import HTTPException
from deformux.data.choices import Choices
from deformux.publishing.project_plan import ProjectPlanner
from deformux_label.lib.configs.project import Project
from deformux_label.lib.store.datastore import CheckedDatastore
from deformux_label.lib.infers.model_loader import ServedModels
from deformux_label.lib.trainers.finetune import FineTune
logging.basicConfig(level=logging.INFO)
torch.set_num_threads(1)
folder, state, labels, request = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].split(","), json.loads(sys.argv[4])
choices = Choices("ct", spacing_mm=(3.0, 3.0, 3.0), patch_size=(16, 16, 16), preset="tiny")
project = Project(tuple(labels), choices, train_devices=sys.argv[5])
datastore = CheckedDatastore(str(folder), labels=labels)
scans = lambda: [Path(datastore.get_image_uri(image)) for image in datastore.list_images()]
planner = ProjectPlanner(state / "plan", labels=labels, choices=choices, scans=scans)
task = FineTune(project, ServedModels(project, state), state, planner)
try:
    task(request, datastore)
except HTTPException as error:
    sys.exit(f"{error.status_code} {error.detail}")
"""


@pytest.fixture
def studies(tmp_path: Path) -> tuple[Path, CheckedDatastore, list[Volume]]:
    folder = tmp_path / "studies"
    volumes = [
        write_volume(folder / f"case_{number}.nii.gz", tmp_path / "labels" / f"case_{number}.nii.gz", seed=number)
        for number in range(2)
    ]
    return folder, CheckedDatastore(str(folder), labels=LABELS), volumes


def train(folder: Path, state: Path, devices: str = "one", **request: Any) -> PreloadedProcess:
    arguments = (folder, state, ",".join(LABELS), json.dumps(request), devices)
    log = folder.parent / f"{uuid.uuid4().hex[:8]}.log"
    return PreloadedProcess(PROGRAM, arguments, output=log, environment={**os.environ, "OMP_NUM_THREADS": "1"})


def status(state: Path) -> dict[str, Any]:
    try:
        values = json.loads((state / "training.json").read_text())
    except FileNotFoundError:
        return {}
    # The Slicer extension computes with these, whatever has happened.
    assert 0 <= values["epoch"] / values["total_epochs"] <= 1
    assert 0 <= values["best_metric"] <= 1
    assert math.isfinite(values["total_time"])
    return values


def test_a_training_stopped_by_sigterm_continues(
    studies: tuple[Path, CheckedDatastore, list[Volume]], tmp_path: Path
) -> None:
    folder, datastore, volumes = studies
    state = tmp_path / "state"
    nothing = train(folder, state)
    assert "409 training needs at least 1 submitted label" in nothing.ended()
    datastore.save_label(volumes[0].id, str(volumes[0].label), "final", {})
    # More steps than the test waits for; their order is drawn at the start.
    request = {"steps": 100_000, "batch_size": 1, "task_id": "t1"}
    steps = 0
    for attempt in ("first", "second"):
        process = train(folder, state, **request)
        while not (told := status(state)).get("step", 0) > steps or told["status"] != "running":
            assert process.poll() is None, process.ended()
            time.sleep(0.1)
        steps = told["step"]
        process.send_signal(signal.SIGTERM)
        log = process.ended()
        assert process.returncode == 128 + signal.SIGTERM, log
        assert ("resuming after" in log) == (attempt == "second")
        told = status(state)
        assert (told["status"], told["task_id"], told["total_time"]) == ("stopped", "t1", 0)
        assert "can be continued" in told["error"]
        assert ModelVersions(state / "versions").names() == []

    other = train(folder, state, steps=2, batch_size=1)
    log = other.ended()
    assert other.returncode == 0, log
    assert "had other labels or options; starting over" in log
    told = status(state)
    assert (told["status"], told["version"], told["published"]) == ("done", "v0001", True)
    assert told["provisional"]
    assert told["epoch"] == told["total_epochs"]
    assert told["total_time"] > 0
    assert "too few labelled cases" in told["reason"]
    # A pinned version stays published, and the status says why.
    versions = ModelVersions(state / "versions")
    versions.pin()
    datastore.save_label(volumes[1].id, str(volumes[1].label), "final", {"annotated": [LABELS[0]]})
    third = train(folder, state, steps=1, batch_size=1)
    assert third.wait() == 0
    told = status(state)
    assert (told["status"], told["version"], told["published"]) == ("rejected", "v0002", False)
    assert "v0001 is pinned" in told["reason"]
    assert versions.published() == "v0001"


def test_two_devices_stop_fail_and_continue_as_one_does(
    studies: tuple[Path, CheckedDatastore, list[Volume]], tmp_path: Path
) -> None:
    folder, datastore, volumes = studies
    state = tmp_path / "state"
    datastore.save_label(volumes[0].id, str(volumes[0].label), "final", {})
    request = {"steps": 100_000, "batch_size": 2}

    def started(after: int) -> tuple[PreloadedProcess, list[psutil.Process], int]:
        process = train(folder, state, "cpu,cpu,cpu", **request)
        while not (told := status(state)).get("step", 0) > after or told["status"] != "running":
            assert process.poll() is None, process.ended()
            time.sleep(0.1)
        others = [p for p in psutil.Process(process.pid).children() if "deformux.fitting.rank_processes" in p.cmdline()]
        assert len(others) == 1, "three devices cannot share two volumes of a step, two can"
        return process, others, told["step"]

    # Stopped as the queue does it.
    process, others, steps = started(0)
    process.send_signal(signal.SIGTERM)
    assert "Training on 2 of 3 devices" in process.ended()
    assert process.returncode == 128 + signal.SIGTERM
    assert status(state)["status"] == "stopped"
    psutil.wait_procs(others, timeout=20)
    assert not any(other.is_running() for other in others)
    # One of the two is killed: the other does not wait for ever.
    process, others, steps = started(steps)
    others[0].kill()
    log = process.ended(timeout=60)
    assert "resuming after" in log
    assert "422 the process that trained on cpu was killed (SIGKILL)" in log
    told = status(state)
    assert told["status"] == "failed"
    assert "resumes from the last checkpoint" in told["error"]
    # The first process, which the queue started, is killed: the other ends, and the status says so when it is read.
    process, others, steps = started(steps)
    process.kill()
    assert "resuming after" in process.ended(timeout=60)
    psutil.wait_procs(others, timeout=20)
    assert not any(other.is_running() for other in others)
    assert TrainingStatus(state / "training.json").read()["status"] == "stopped"
    assert ModelVersions(state / "versions").names() == []
    done = train(folder, state, "cpu,cpu", steps=2, batch_size=2)
    assert done.wait() == 0
    assert (status(state)["status"], status(state)["version"]) == ("done", "v0001")
    assert ModelVersions(state / "versions").card("v0001").device == "cpu, cpu"


def test_a_failed_training_says_why(studies: tuple[Path, CheckedDatastore, list[Volume]], tmp_path: Path) -> None:
    folder, datastore, volumes = studies
    state = tmp_path / "state"
    datastore.save_label(volumes[0].id, str(volumes[0].label), "final", {})
    # The scan is damaged after its label was accepted; a damaged label is restored from its revision.
    shutil.copy(Path(__file__), folder / volumes[0].image.name)
    failed = train(folder, state, steps=1)
    assert f"422 no label can be learnt from; {volumes[0].id}" in failed.ended()
    told = status(state)
    assert told["status"] == "failed"
    assert "cannot be read: it is damaged" in told["error"]
    assert ModelVersions(state / "versions").published() is None


def test_a_damaged_label_is_learned_from_its_revision(
    studies: tuple[Path, CheckedDatastore, list[Volume]], tmp_path: Path
) -> None:
    folder, datastore, volumes = studies
    state = tmp_path / "state"
    datastore.save_label(volumes[0].id, str(volumes[0].label), "final", {})
    label = folder / "labels" / "final" / f"{volumes[0].id}.nii.gz"
    accepted = label.read_bytes()
    shutil.copy(Path(__file__), label)
    done = train(folder, state, steps=1)
    said = done.ended()
    assert done.returncode == 0, said
    assert ModelVersions(state / "versions").published() == "v0001"
    assert label.read_bytes() == accepted
