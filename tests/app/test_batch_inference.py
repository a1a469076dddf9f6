"""Batch inference on a CPU: bodies of all clients, damaged files, stopping, and a killed server."""

from __future__ import annotations

import gzip
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import psutil
import pytest
import requests
from live import APP, LABELS, LiveServer, project_of, publish_untrained, serve_command, wait_for, write, write_volume

from deformux_label.lib.infers.batch_inference import images_of
from deformux_label.lib.store.datastore import CheckedDatastore

CONF = {"labels": ",".join(LABELS), "modality": "ct", "spacing": "4,4,4", "patch_size": "16,16,16"}
CASES = ("a", "b", "c")
# The example in the route's documentation, which MONAI Label's own server accepts.
STOCK = {
    "device": "cuda",
    "multi_gpu": True,
    "gpus": "all",
    "logging": "WARNING",
    "save_label": True,
    "label_tag": "original",
    "max_workers": 1,
    "max_batch_size": 0,
}


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    root = tmp_path / "batch"
    for number, name in enumerate(CASES):
        label = root / "labels" / f"{name}.nii.gz"
        write_volume(root / "studies" / f"{name}.nii.gz", label, spacing=(4, 4, 4), seed=number)
    (root / "studies" / "aa_broken.nii.gz").write_bytes((root / "studies" / "a.nii.gz").read_bytes()[:500])
    return root / "studies"


@pytest.fixture
def server(start_here: Callable[..., LiveServer], studies: Path) -> Iterator[LiveServer]:
    server = start_here(studies, CONF, serve_command)
    yield server
    server.stop()


@pytest.fixture
def submitted(server: LiveServer, studies: Path) -> Path:
    """Publish a model, submit a label of ``b``, and return the label's file."""
    publish_untrained(studies, CONF)
    assert server.submit("b", studies.parent / "labels" / "b.nii.gz").ok
    return studies / "labels" / "final" / "b.nii.gz"


def post(server: LiveServer, model: str = "segmentation", body: Any = None, **query: Any) -> requests.Response:
    return requests.post(f"{server.url}/batch/infer/{model}", params=query, json=body, timeout=300)


def status(server: LiveServer, **query: Any) -> requests.Response:
    return requests.get(f"{server.url}/batch/infer", params=query, timeout=60)


def followed(server: LiveServer, task: str) -> dict[str, Any]:
    def ended() -> Any:
        seen = status(server).json()
        assert seen["id"] == task
        assert isinstance(seen["details"][-1], str)
        return seen if seen["status"] != "RUNNING" else None

    return wait_for(ended, "the batch inference ends")


def test_without_a_model_it_says_so_and_bad_options_are_refused(server: LiveServer, studies: Path) -> None:
    assert status(server).status_code == 404
    untrained = post(server)
    assert (untrained.status_code, "no trained model yet" in untrained.json()["detail"]) == (409, True)
    publish_untrained(studies, CONF)
    for model, body, query, code, word in (
        ("nobody", None, {}, 404, "segmentation"),
        ("edit", None, {}, 400, "needs clicks"),
        ("segmentation", None, {"images": "some"}, 400, "all, labeled, unlabeled"),
        ("segmentation", {"images": ["a"]}, {}, 400, "all, labeled, unlabeled"),
        ("segmentation", {"label_tag": "final"}, {}, 400, "submitted"),
        ("segmentation", {"label_tag": "../../x"}, {}, 400, "label_tag must be original"),
        ("segmentation", {"label_tag": {}, "device": "tpu"}, {}, 400, "device must be"),
        ("segmentation", {"save_label": False}, {}, 400, "save_label must be true"),
        ("segmentation", {"max_workers": -1}, {}, 400, "max_workers"),
        ("segmentation", {"max_batch_size": "many"}, {}, 400, "max_batch_size"),
        ("segmentation", {"gpus": "0; rm"}, {}, 400, "gpus must be all"),
        ("segmentation", {"gpus": "\0"}, {}, 400, "gpus must be all"),
        ("segmentation", {"multi_gpu": 7}, {}, 400, "multi_gpu"),
        ("segmentation", {"logging": "LOUD"}, {}, 400, "logging"),
        ("segmentation", {"model": "edit"}, {}, 400, "batch inference has no option 'model'"),
        ("segmentation", {"client_id": "\ud800"}, {}, 400, "Unicode"),
    ):
        refused = post(server, model, body, **query)
        assert (refused.status_code, word in refused.json()["detail"]) == (code, True), refused.text
    assert status(server).status_code == 404, "nothing was begun"
    assert requests.delete(f"{server.url}/batch/infer", timeout=60).json() is None


def test_an_empty_body_segments_every_readable_volume(server: LiveServer, studies: Path, submitted: Path) -> None:
    # A submitted label stays unchanged.
    label = submitted.read_bytes()
    started = requests.post(f"{server.url}/batch/infer/segmentation", timeout=60)
    assert started.status_code == 200, started.text
    assert started.json()["status"] == "RUNNING"
    again = post(server, body={})
    assert (again.status_code, started.json()["id"] in again.json()["detail"]) == (429, True)
    assert status(server, check_if_running="true").json()["id"] == started.json()["id"]
    done = followed(server, started.json()["id"])
    assert (done["status"], done["total"], done["stored"], done["failed"]) == ("DONE", 4, 3, 1), done
    assert {name: done["images"][name] for name in CASES} == dict.fromkeys(CASES, "stored")
    assert done["images"]["aa_broken"].startswith("failed: ")
    assert "aa_broken" in done["images"]["aa_broken"]
    wait_for(lambda: all("original" in server.objects()[name]["labels"] for name in CASES), "the server sees them")
    for name in CASES:
        query = {"label": name, "tag": "original"}
        proposal = requests.get(f"{server.url}/datastore/label", params=query, timeout=60).content
        assert np.asarray(nib.Nifti1Image.from_bytes(gzip.decompress(proposal)).dataobj).shape == (16, 16, 16)
    info = server.objects()["a"]["labels"]["original"]["info"]
    assert (info["model"], info["params"]["model_version"]) == ("segmentation", "v0001")
    assert submitted.read_bytes() == label
    revisions = requests.get(f"{server.url}/deformux/labels/revisions", params={"image": "b"}, timeout=60).json()
    assert len(revisions["revisions"]) == 1
    assert status(server, check_if_running="true").status_code == 404
    log = project_of(CONF).state_folder(APP, str(studies)) / "audit.jsonl"
    recorded = [line for line in map(json.loads, log.read_text().splitlines()) if line["what"] == "store segmentation"]
    assert [line["image"] for line in recorded] == sorted(CASES)
    for line in recorded:
        assert (line["tag"], line["version"], line["task"]) == ("original", "v0001", started.json()["id"])
        assert line["address"] == "batch inference"
    assert "ZeroDivisionError" not in server.log.read_text()


@pytest.mark.usefixtures("unwatched")
def test_the_kind_and_number_of_volumes_can_be_chosen(studies: Path) -> None:
    datastore = CheckedDatastore(str(studies), labels=LABELS)
    datastore.save_label("b", str(studies.parent / "labels" / "b.nii.gz"), "final", {})
    for request, expected in (
        ({}, ["a", "aa_broken", "b", "c"]),
        ({"images": "labeled"}, ["b"]),
        ({"images": "unlabeled"}, ["a", "aa_broken", "c"]),
        ({"images": "unlabeled", "max_batch_size": 2}, ["a", "aa_broken"]),
        ({"images": "all", "max_batch_size": 0}, ["a", "aa_broken", "b", "c"]),
    ):
        assert images_of(datastore, request) == expected


def processes_of(task: str) -> list[psutil.Process]:
    alive = (p for p in psutil.process_iter(["cmdline", "status"]) if p.info["status"] != psutil.STATUS_ZOMBIE)
    return [process for process in alive if any(task in part for part in process.info["cmdline"] or [])]


def test_it_is_stopped_and_a_killed_server_says_so(
    server: LiveServer, studies: Path, submitted: Path, start_here: Callable[..., LiveServer]
) -> None:
    # A minute of work; last in alphabetical order.
    noise = np.random.default_rng(0).integers(-100, 200, (96, 96, 96)).astype(np.int16)
    write(studies / "z_large.nii.gz", noise, np.diag([4.0, 4, 4, 1]))
    wait_for(lambda: "z_large" in server.objects(), "the large volume is seen")
    task = post(server, body={}, images="unlabeled").json()["id"]
    wait_for(lambda: status(server).json()["stored"] == 2, "the small ones are done")
    stopped = requests.delete(f"{server.url}/batch/infer", timeout=120).json()
    assert (stopped["id"], stopped["status"], stopped["stored"]) == (task, "STOPPED", 2), stopped
    assert "z_large" not in stopped["images"]
    assert not processes_of(task)

    task = post(server, body={}, images="unlabeled").json()["id"]
    wait_for(lambda: status(server).json()["stored"] == 2, "the small ones are done")
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait()
    again = start_here(studies, CONF, serve_command)
    wait_for(lambda: not processes_of(task), "it ends with its server")
    lost = status(again).json()
    assert (lost["id"], lost["status"], lost["stored"]) == (task, "ERROR", 2)
    assert "interrupted when its server ended" in lost["error"]
    assert "original" not in again.objects()["z_large"]["labels"]
    labelled = post(again, body=STOCK, images="labeled", run_sync="true").json()
    assert (labelled["status"], labelled["images"]) == ("DONE", {"b": "stored"}), labelled
    assert [task["status"] for task in status(again, all="true").json()] == ["STOPPED", "ERROR", "DONE"]
