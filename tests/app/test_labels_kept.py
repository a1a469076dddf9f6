"""Submitted labels are never lost: revisions, crashes at any moment, and a damaged index."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import requests
from fastapi import HTTPException
from live import LABELS, LiveServer, Volume, write
from typer.testing import CliRunner

from deformux_label.cli.main import app
from deformux_label.lib.store.datastore import CheckedDatastore

pytestmark = pytest.mark.usefixtures("unwatched")


@pytest.fixture
def store(volume: Volume) -> CheckedDatastore:
    return opened(volume)


def opened(volume: Volume) -> CheckedDatastore:
    return CheckedDatastore(str(volume.image.parent), labels=LABELS)


def label_with(volume: Volume, voxels: int) -> Path:
    values = np.zeros_like(volume.truth)
    values.flat[:voxels] = 1
    return write(volume.label.with_name(f"{voxels}.nii.gz"), values, volume.affine)


def voxels(path: str | Path) -> int:
    return int((np.asarray(nib.load(path).dataobj) > 0).sum())


def submit(store: CheckedDatastore, volume: Volume, number: int, annotator: str, **info: Any) -> None:
    store.save_label("scan", str(label_with(volume, number)), "final", {"client_id": annotator, **info})


def current(store: CheckedDatastore) -> int | None:
    path = store.get_label_uri("scan", "final")
    return voxels(path) if path else None


@pytest.fixture(scope="module")
def crashes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return what was found after a kill -9 at every call that writes."""
    command = [sys.executable, str(Path(__file__).with_name("crash_points.py")), str(tmp_path_factory.mktemp("crash"))]
    # It imports from both folders of tests that are importable here.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_crash_at_any_call_loses_nothing_that_was_acknowledged(crashes: list[dict[str, Any]]) -> None:
    assert {case["action"] for case in crashes if case["finished"]} == {
        *("save", "save_another", "delete", "rebuild", "lease_and_queue")
    }
    killed = [case for case in crashes if not case["finished"]]
    assert len(killed) > 40
    for case in crashes:
        where = f"{case['action']}, call {case['call']}"
        scan, other = case["entries"]["scan"], case["entries"]["other"]
        # The first annotator's label was acknowledged before.
        first = scan["revisions"][0]
        assert (first["annotator"], first["voxels"] > 0) == ("first", True), where
        # The current label is complete and the newest revision, and the index names its annotator.
        for entry in (scan, other):
            newest = entry["revisions"][-1] if entry["revisions"] else {"voxels": None, "annotator": None}
            assert entry["current"] == newest["voxels"], where
            if entry["info"]:
                assert entry["info"]["client_id"] == newest["annotator"], where
                assert entry["info"]["revision"] == len(entry["revisions"]), where
        # The next server starts, knows these labels, and continues.
        assert case["indexed"] == {
            "scan": ["final"] if scan["current"] is not None else [],
            "other": ["final"] if other["current"] is not None else [],
        }, where
        assert case["files"] == (["other.nii.gz", "scan.nii.gz"] if scan["current"] is not None else ["other.nii.gz"])
    done = {case["action"]: case for case in crashes if case["finished"]}
    assert done["save"]["entries"]["scan"]["current"] == 0
    assert done["save_another"]["entries"]["other"]["current"] > 0
    assert done["delete"]["entries"]["scan"]["current"] is None
    assert (done["lease_and_queue"]["leases"], done["lease_and_queue"]["tasks"]) == (["scan"], 1)


def test_every_submit_is_a_revision(store: CheckedDatastore, volume: Volume) -> None:
    submit(store, volume, 5, "anna", model_version="v0001")
    submit(store, volume, 7, "ben")
    assert current(store) == 7
    history = store.revisions.history("scan", "final")
    assert [(r.number, r.annotator, r.model_version) for r in history] == [(1, "anna", "v0001"), (2, "ben", None)]
    assert [voxels(store.revisions.file(r)) for r in history] == [5, 7]
    assert history[0].time <= history[1].time
    restored = store.restore_label("scan", 1, "carla")
    assert current(store) == 5
    assert (restored.number, restored.annotator, restored.restored_from) == (3, "carla", 1)
    assert store.get_label_info("scan", "final")["revision"] == 3
    with pytest.raises(HTTPException, match="no revision 9"):
        store.restore_label("scan", 9, "carla")


def test_proposals_of_a_model_are_not_revisions(store: CheckedDatastore, volume: Volume) -> None:
    store.save_label("scan", str(label_with(volume, 5)), "original", {})
    store.save_label("scan", str(label_with(volume, 6)), "draft", {"client_id": "anna"})
    assert store.revisions.known() == {"scan": ["draft"]}


def test_deleting_keeps_the_revisions(store: CheckedDatastore, volume: Volume) -> None:
    submit(store, volume, 5, "anna")
    store.remove_label("scan", "final")
    assert current(store) is None
    assert current(opened(volume)) is None, "a restart does not bring it back"
    assert current(store) is None
    with pytest.raises(HTTPException, match="its revisions are 1"):
        store.restore_label("scan", 2, "anna")
    store.restore_label("scan", 1, "anna")
    assert current(store) == 5
    scan = volume.image.read_bytes()
    store.remove_image("scan")
    volume.image.write_bytes(scan)
    again = opened(volume)
    assert current(again) is None
    again.restore_label("scan", 1, "anna")
    assert current(again) == 5


def test_labels_changed_by_hand_are_kept_before_they_are_replaced(store: CheckedDatastore, volume: Volume) -> None:
    """Labels that were copied into the folder, or whose files were edited in place."""
    folder = Path(store._datastore.label_path("final"))
    (folder / "scan.nii.gz").write_bytes(label_with(volume, 3).read_bytes())
    store.refresh()
    submit(store, volume, 5, "anna")
    assert [voxels(store.revisions.file(r)) for r in store.revisions.history("scan", "final")] == [3, 5]
    (folder / "scan.nii.gz").write_bytes(label_with(volume, 4).read_bytes())
    store.remove_label("scan", "final")
    kept = [r for r in store.revisions.history("scan", "final") if not r.deleted]
    assert [voxels(store.revisions.file(r)) for r in kept] == [3, 5, 4]


@pytest.mark.parametrize("damage", ["missing", "empty", "half", "another list"])
def test_a_lost_index_is_rebuilt(store: CheckedDatastore, volume: Volume, damage: str) -> None:
    submit(store, volume, 5, "anna", label_info=[{"name": "liver"}])
    store.save_label("scan", str(label_with(volume, 6)), "draft", {"client_id": "ben"})
    index = volume.image.parent / "datastore_v2.json"
    text = index.read_text()
    if damage == "missing":
        index.unlink()
    else:
        index.write_text({"empty": "", "half": text[: len(text) // 2], "another list": "[1, 2]"}[damage])
    again = opened(volume)
    assert current(again) == 5
    assert again.get_label_info("scan", "final")["client_id"] == "anna"
    assert again.get_label_info("scan", "final")["label_info"] == [{"name": "liver"}]
    assert again.get_label_info("scan", "draft")["client_id"] == "ben"
    assert json.loads(index.read_text())["objects"].keys() == {"scan"}
    aside = list(index.parent.glob("datastore_v2.json.damaged-*"))
    assert len(aside) == (damage != "missing")
    submit(again, volume, 8, "anna")
    assert [r.annotator for r in again.revisions.history("scan", "final")] == ["anna", "anna"]


def test_the_command_line_lists_and_restores(store: CheckedDatastore, volume: Volume) -> None:
    submit(store, volume, 5, "anna", model_version="v0001")
    submit(store, volume, 7, "ben")
    folder = ["--studies", str(volume.image.parent)]
    listed = CliRunner().invoke(app, ["labels", "list", *folder])
    assert listed.exit_code == 0
    assert all(word in listed.output for word in ("scan", "anna", "ben", "v0001"))
    restored = CliRunner().invoke(app, ["labels", "restore", *folder, "scan", "1"])
    assert restored.exit_code == 0, restored.output
    assert current(opened(volume)) == 5
    for command in (
        ["restore", *folder, "scan", "9"],
        ["restore", *folder, "nobody", "1"],
        ["list", *folder, "nobody"],
    ):
        refused = CliRunner().invoke(app, ["labels", *command])
        assert refused.exit_code == 2
        assert refused.stderr.startswith("deformux-label: ")
        assert refused.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [["../x"], ["scan", "--tag", "../final"], ["x" * 300]])
def test_the_command_refuses_invalid_names(volume: Volume, arguments: list[str]) -> None:
    listed = CliRunner().invoke(app, ["labels", "list", "--studies", str(volume.image.parent), *arguments])
    assert listed.exit_code == 2, listed.output
    assert listed.output.startswith("deformux-label: ")
    assert listed.output.count("\n") == 1


def test_a_full_disk_leaves_the_earlier_label(server: LiveServer, volumes: dict[str, Volume], tmp_path: Path) -> None:
    volume = volumes["plain_nii"]
    assert server.submit(volume.id, volume.label).status_code == 200
    where = f"{server.url}/datastore/label?label={volume.id}&tag=final"
    before = requests.get(where, timeout=60).content
    # Eight bytes a voxel, in a format without compression.
    large = write(tmp_path / "large.nii", np.zeros(volume.truth.shape), volume.affine)
    limit = large.stat().st_size // 2
    with largest_file(server, limit):
        answer = server.submit(volume.id, large)
    assert (answer.status_code, "disk is full" in answer.json()["detail"]) == (507, True), answer.text
    assert requests.get(where, timeout=60).content == before
    assert server.submit(volume.id, large).status_code == 200
    assert requests.get(where, timeout=60).content != before
    # Other tests on this server expect no label here.
    assert requests.delete(f"{server.url}/datastore/label?id={volume.id}&tag=final", timeout=60).ok


@contextmanager
def largest_file(server: LiveServer, size: int) -> Iterator[None]:
    """Let the kernel refuse the server's writes beyond ``size`` bytes per file, as for a used-up quota."""
    group = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if in_group(pid, server.process.pid)]
    before = [(pid, resource.prlimit(pid, resource.RLIMIT_FSIZE)) for pid in group]
    for pid, (_, most) in before:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, most))
    try:
        yield
    finally:
        for pid, limits in before:
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)


def in_group(pid: int, group: int) -> bool:
    try:
        return os.getpgid(pid) == group
    except ProcessLookupError:
        return False
