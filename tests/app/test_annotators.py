"""Several annotators at once, with trainings that come and go, on a server that is killed on the way."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import psutil
import pytest
import requests
from live import LABELS, PATIENCE_S, LiveServer, Volume, publish_untrained, serve_command, wait_for, write, write_volume

from deformux_label.lib.store.leases import Leases

CONF = {"labels": ",".join(LABELS), "modality": "ct", "spacing": "4,4,4", "patch_size": "16,16,16", "auto_train": "3"}
N_CASES = 18


@dataclass
class Cohort:
    """Scans that a server serves, and what has been submitted: (case, voxels, annotator), in no order."""

    studies: Path
    cases: dict[str, Volume]
    submitted: list[tuple[str, int, str]] = field(default_factory=list)

    def label(self, case: str, voxels: int) -> Path:
        """A label that differs from all others in its number of voxels."""
        volume = self.cases[case]
        values = np.zeros(volume.truth.size, np.uint8)
        values[:voxels] = 1
        return write(
            self.studies.parent / "labels" / f"{case}-{voxels}.nii.gz",
            values.reshape(volume.truth.shape),
            volume.affine,
        )


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    root = tmp_path_factory.mktemp("cohort")
    cases = {
        f"case_{number:02d}": write_volume(
            root / "studies" / f"case_{number:02d}.nii.gz",
            root / "truth" / f"case_{number:02d}.nii.gz",
            spacing=(4, 4, 4),
            seed=number,
        )
        for number in range(N_CASES)
    }
    publish_untrained(root / "studies", CONF)
    return Cohort(root / "studies", cases)


@dataclass
class Session:
    """Results of six annotators at one server until no case was left, and the server that runs now."""

    server: LiveServer
    first_training: dict[str, Any]
    answers: list[int]
    handed_out: list[str]
    trainings: list[dict[str, Any]]
    leases: dict[str, Any]


@pytest.fixture(scope="module")
def session(start_here: Callable[..., LiveServer], cohort: Cohort, request: pytest.FixtureRequest) -> Session:
    """Each annotator asks, looks at the proposal, submits, and asks again, until nothing is left; a training runs."""
    server = start_here(cohort.studies, CONF, serve_command)
    assert training(server).status_code == 404
    submit_three(server, cohort)
    wait_for(
        lambda: training(server).json()["status"] not in ("SUBMITTED", "RUNNING") or stats(server).get("step"),
        "a first step",
    )
    first_training = training(server).json()
    lasting_until = time.monotonic() + (120 if request.config.getoption("--runslow") else 0)
    answers, handed_out = annotate_together(server, cohort, lasting_until)
    trainings = training(server, all="true").json()
    leases = requests.get(f"{server.url}/deformux/leases", timeout=60).json()
    return Session(server, first_training, answers, handed_out, trainings, leases)


@pytest.fixture
def server(session: Session) -> LiveServer:
    """The server of the session, without a training."""
    requests.delete(f"{session.server.url}/train/", timeout=PATIENCE_S)
    return session.server


def training(server: LiveServer, **query: Any) -> requests.Response:
    return requests.get(f"{server.url}/train/", params=query, timeout=60)


def stats(server: LiveServer) -> dict[str, Any]:
    return requests.get(f"{server.url}/info/", timeout=60).json()["train_stats"]["segmentation"]


def processes_of(task: str) -> list[psutil.Process]:
    """Trainings of this task, without the workers that they may have."""
    alive = (p for p in psutil.process_iter(["cmdline", "status", "ppid"]) if p.info["status"] != psutil.STATUS_ZOMBIE)
    found = [process for process in alive if any(task in part for part in process.info["cmdline"] or [])]
    return [process for process in found if process.info["ppid"] not in [other.pid for other in found]]


def train(server: LiveServer, steps: int, **query: str) -> requests.Response:
    return requests.post(f"{server.url}/train/segmentation", params=query, json={"steps": steps}, timeout=60)


def stop(server: LiveServer) -> Any:
    return requests.delete(f"{server.url}/train/", timeout=PATIENCE_S).json()


def wait_for_a_step(server: LiveServer, task: str) -> None:
    def under_way() -> bool:
        seen = stats(server)
        assert seen["queue"]["running"] in (None, task)
        assert not seen["total_time"], "nothing of the training before is shown"
        assert 0 <= seen["epoch"] <= seen["total_epochs"]
        return seen["status"] == "running" and seen.get("step", 0) > 0

    wait_for(under_way, "the training takes its first step")


def submit_three(server: LiveServer, cohort: Cohort) -> None:
    """Submit as many labels as ``--conf auto_train`` asks for."""
    for case in ("case_00", "case_01", "case_02"):
        voxels = len(cohort.submitted) + 1
        assert server.submit(case, cohort.label(case, voxels), client_id="early", model_version="v0001").ok
        cohort.submitted.append((case, voxels, "early"))


def annotate_together(server: LiveServer, cohort: Cohort, lasting_until: float) -> tuple[list[int], list[str]]:
    """Return the status of every answer that six annotators got, and the cases that they were handed."""
    handed_out: list[str] = []
    all_ready = threading.Barrier(6)
    counting = threading.Lock()

    def annotate(name: str) -> list[int]:
        answers = []

        def checked(answer: requests.Response) -> Any:
            answers.append(answer.status_code)
            return answer.json() if "json" in answer.headers["content-type"] else None

        all_ready.wait()
        while True:
            body = {"client_id": name}
            sample = checked(requests.post(f"{server.url}/activelearning/random", json=body, timeout=PATIENCE_S))
            if "id" in sample:
                handed_out.append(sample["id"])
            elif time.monotonic() > lasting_until:
                return answers
            case = sample["id"] if "id" in sample else next(iter(cohort.cases))
            checked(server.infer(case, client_id=name, result_extension=".nrrd", result_dtype="uint8"))
            with counting:
                voxels = len(cohort.submitted) + 1
                cohort.submitted.append((case, voxels, name))
            label = cohort.label(case, voxels % 4000)
            checked(server.submit(case, label, client_id=name, label_info=[{"name": n} for n in LABELS]))
            checked(requests.get(f"{server.url}/info/", timeout=PATIENCE_S))

    with ThreadPoolExecutor(6) as pool:
        answers = [status for result in pool.map(annotate, [f"annotator {n}" for n in range(6)]) for status in result]
    return answers, handed_out


def test_many_annotators_at_once(session: Session, cohort: Cohort) -> None:
    assert session.first_training["status"] == "RUNNING", session.first_training
    assert set(session.answers) == {200}
    # No annotator skipped a case, so each was handed out once.
    assert sorted(session.handed_out) == sorted(set(cohort.cases) - {"case_00", "case_01", "case_02"})
    # Newer labels are for the next training.
    tasks = {known["id"]: known["status"] for known in session.trainings}
    assert tasks.pop(session.first_training["id"]) in ("RUNNING", "DONE")
    automatic = [task for task in session.trainings if task["automatic"]]
    assert 2 <= len(automatic) <= 4, "the labels are six times what --conf auto_train asks for"
    check_labels(session.server, cohort)
    assert session.leases == {"leases": []}


def check_labels(server: LiveServer, cohort: Cohort) -> None:
    """Every submit is there, with its annotator; the newest is the current one."""
    kept: list[tuple[str, int, str]] = []
    for case in {case for case, _, _ in cohort.submitted}:
        query = {"image": case}
        listed = requests.get(f"{server.url}/deformux/labels/revisions", params=query, timeout=60).json()["revisions"]
        for revision in listed:
            query["revision"] = revision["number"]
            file = requests.get(f"{server.url}/deformux/labels/revision", params=query, timeout=60)
            kept.append((case, voxels_of(file.content), revision["annotator"]))
        query = {"label": case, "tag": "final"}
        current = requests.get(f"{server.url}/datastore/label", params=query, timeout=60)
        assert voxels_of(current.content) == kept[-1][1]
        # An annotator who was shown no proposal started from none, even if their client claims one.
        blind = ("early", "anna", "ben")
        drawn = [revision for revision in listed if revision["restored_from"] is None]
        assert all((r["model_version"] is None) == (r["annotator"] in blind) for r in drawn)
    assert sorted(kept) == sorted((case, voxels % 4000, name) for case, voxels, name in cohort.submitted)


def voxels_of(label: bytes) -> int:
    import gzip

    return int((np.asarray(nib.Nifti1Image.from_bytes(gzip.decompress(label)).dataobj) > 0).sum())


def test_trainings_are_queued_by_labels_and_by_hand(server: LiveServer, cohort: Cohort) -> None:
    """One training runs, and at most one automatic training waits."""
    submit_three(server, cohort)
    wait_for(lambda: training(server, check_if_running="true").ok, "a training is queued")
    by_hand = train(server, 4000)
    assert by_hand.status_code == 200, "an automatic training is no obstacle"
    again = train(server, 4000)
    assert again.status_code == 429
    assert by_hand.json()["id"] in again.json()["detail"]
    queued = train(server, 4001, enqueue="true")
    assert queued.status_code == 200
    state = stats(server)["queue"]
    assert [state["running"], *state["waiting"]][-2:] == [by_hand.json()["id"], queued.json()["id"]]
    # The server's own may just have been about to end.
    assert stop(server)["status"] in ("STOPPED", "DONE")
    known = {task["id"]: task["status"] for task in training(server, all="true").json()}
    assert known[by_hand.json()["id"]] == known[queued.json()["id"]] == "STOPPED"


def test_stopping_answers_when_everything_has_stopped(server: LiveServer) -> None:
    task, other = train(server, 4000).json()["id"], train(server, 4000, enqueue="true").json()["id"]
    wait_for_a_step(server, task)
    stopped = stop(server)
    # The Slicer extension shows the last of the details.
    assert (stopped["status"], stopped["id"], bool(stopped["details"][-1])) == ("STOPPED", task, True)
    assert not processes_of(task)
    assert stats(server)["status"] == "stopped"
    assert training(server, check_if_running="true").status_code == 404
    known = {task["id"]: task["status"] for task in training(server, all="true").json()}
    assert known[task] == known[other] == training(server).json()["status"] == "STOPPED"


def test_a_killed_server_finishes_its_training_after_a_restart(
    start_here: Callable[..., LiveServer], session: Session, server: LiveServer, cohort: Cohort
) -> None:
    task = train(server, 24).json()["id"]
    wait_for_a_step(server, task)
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait()
    again = session.server = start_here(cohort.studies, CONF, serve_command)
    most = 0

    def ended() -> bool:
        nonlocal most
        answer = training(again)
        assert (answer.status_code, answer.json()["id"]) == (200, task), "its id never becomes unknown"
        most = max(most, len(processes_of(task)))
        return answer.json()["status"] not in ("SUBMITTED", "RUNNING")

    wait_for(ended, "the training ends")
    assert training(again).json()["status"] == "DONE", training(again).json()
    assert most == 1, "two processes never train at once"
    # What was learnt of these labels need not be better than what was there.
    assert (stats(again)["task_id"], stats(again)["status"] in ("done", "rejected")) == (task, True)
    check_labels(again, cohort)

    # A training that crashes is reported as failed.
    died = train(again, 4000).json()["id"]
    (process,) = wait_for(lambda: processes_of(died), "its process runs")
    process.kill()
    wait_for(lambda: training(again).json()["status"] == "ERROR", "the death is noticed")
    assert "SIGKILL" in training(again).json()["error"]
    assert (stats(again)["status"] in ("failed", "stopped"), bool(stats(again)["error"])) == (True, True)

    # Two annotators submit the same case in the same moment: both labels are kept, one of them is current.
    case = next(iter(cohort.cases))
    together = threading.Barrier(2)

    def submit(name: str, voxels: int) -> int:
        label = cohort.label(case, voxels)
        together.wait()
        return again.submit(case, label, client_id=name, model_version="v0001").status_code

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(submit, ("anna", "ben"), (3001, 3002))) == [200, 200]
    cohort.submitted += [(case, 3001, "anna"), (case, 3002, "ben")]
    check_labels(again, cohort)
    query = {"image": case, "revision": 1, "client_id": "carla"}
    restored = requests.post(f"{again.url}/deformux/labels/restore", params=query, timeout=60).json()
    assert (restored["annotator"], restored["restored_from"]) == ("carla", 1)
    cohort.submitted.append((case, next(voxels for name, voxels, _ in cohort.submitted if name == case), "carla"))
    for log in (server.log, again.log):
        assert "Exception in ASGI application" not in log.read_text()


def test_leases_are_exclusive_in_time_and_across_restarts(tmp_path: Path) -> None:
    now = [1000.0]
    leases = Leases(tmp_path / "leases.json", minutes=10, clock=lambda: now[0])
    cases = [f"case {n}" for n in range(40)]
    all_ready = threading.Barrier(8)

    def ask(name: str) -> list[str | None]:
        # As if in a process of its own.
        own = Leases(tmp_path / "leases.json", minutes=10, clock=lambda: now[0])
        all_ready.wait()
        return [own.claim(name, cases) for _ in range(5)]

    with ThreadPoolExecutor(8) as pool:
        given = [case for got in pool.map(ask, [f"annotator {n}" for n in range(8)]) for case in got]
    assert sorted(map(str, given)) == sorted(cases), (
        "asking again skips to a different case; no two annotators get the same"
    )
    assert leases.claim("somebody new", cases) is None
    mine = [case for case, lease in leases.active().items() if lease.annotator == "annotator 3"]
    assert leases.claim("annotator 3", cases) in mine, "their own come round again"
    leases.release("case 7")
    assert leases.claim("somebody new", cases) == "case 7"
    now[0] += 600
    assert leases.claim("somebody else", ["case 7"]) == "case 7", "it has expired"
    assert len(Leases(tmp_path / "leases.json", minutes=10, clock=lambda: now[0]).active()) == 1
