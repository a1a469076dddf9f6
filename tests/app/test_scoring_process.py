"""Background scoring ends with its server, even if that is killed, and whatever scoring is doing."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import psutil
import pytest
import requests
from live import CONF, LiveServer, Volume, publish_untrained, serve_command, stock_command, wait_for

# Seconds that what was started may outlive its server.
SOON_S = 3.0


def scoring_of(server: LiveServer) -> list[psutil.Process]:
    """The processes below a server that score."""
    found = []
    for process in psutil.Process(server.process.pid).children(recursive=True):
        try:
            if "scoring" in process.cmdline():
                found.append(process)
        except psutil.Error:
            continue
    return found


def gone(processes: list[psutil.Process], within_s: float) -> list[psutil.Process]:
    """Those that still run after that time."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        left = [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        if not left:
            return []
        time.sleep(0.05)
    return left


@pytest.fixture
def large_studies(tmp_path: Path) -> Path:
    """A scan that takes minutes to score."""
    studies = tmp_path / "studies"
    studies.mkdir()
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        scan = rng.normal(0, 100, (160, 160, 160)).astype(np.int16)
        nib.save(nib.Nifti1Image(scan, np.diag([2.0, 2.0, 2.0, 1.0])), studies / f"{name}.nii.gz")
    return studies


def begin(server: LiveServer, *, working: bool) -> list[psutil.Process]:
    """Request scoring, and wait until its process has begun, or until it works."""
    assert requests.post(f"{server.url}/scoring/uncertainty", json={}, timeout=60).status_code == 200
    processes = wait_for(lambda: scoring_of(server), "a scoring begins")
    if working:
        wait_for(lambda: _looks_at_a_volume(processes[0]), "the scoring has its model and its volumes")
    return processes


def _looks_at_a_volume(process: psutil.Process) -> bool:
    lock = [file.path for file in process.open_files() if file.path.endswith("selection/.lock")]
    return bool(lock)


@pytest.mark.parametrize(
    ("command", "number", "working"),
    [
        (serve_command, signal.SIGKILL, True),
        (stock_command, signal.SIGKILL, False),
        (serve_command, signal.SIGTERM, True),
    ],
    ids=["killed at work", "killed at its start", "asked to stop"],
)
def test_scoring_ends_with_its_server(
    start: Callable[..., LiveServer],
    large_studies: Path,
    command: Callable[..., list[str]],
    number: signal.Signals,
    working: bool,
) -> None:
    publish_untrained(large_studies, CONF)
    server = start(large_studies, CONF, command)
    processes = begin(server, working=working)
    if working:
        assert processes[0].nice() == 19, "trainings, which have 10, have priority"
        time.sleep(2)  # until it is in the middle of the first volume
        assert gone(processes, 0.1), "it finished before it could be interrupted"
    # Only the server, as in a crash, not its process group.
    serving = psutil.Process(server.process.pid)
    for process in (serving, *serving.children()):
        if process not in processes and "scoring" not in process.cmdline():
            os.kill(process.pid, number)
    assert gone(processes, SOON_S if number == signal.SIGKILL else 10.0) == []


def test_a_running_server_finishes_scoring(
    start: Callable[..., LiveServer], volumes: dict[str, Volume], tmp_path: Path
) -> None:
    studies = tmp_path / "studies"
    studies.mkdir()
    shutil.copy(volumes["axial"].image, studies)
    publish_untrained(studies, CONF)
    server = start(studies, CONF, serve_command)
    assert requests.post(f"{server.url}/scoring/uncertainty", json={}, timeout=60).status_code == 200

    def ended() -> str | None:
        task = requests.get(f"{server.url}/scoring/", timeout=60).json()
        return task["status"] if task["status"] not in ("RUNNING", "SUBMITTED") else None

    assert wait_for(ended, "the scoring ends") == "DONE"
    # Odd requests are refused in a sentence, by the server and by the process.
    for body in ({"method": 3}, {"method": None}, {"y": [1], "y_pred": {}}, {"y": "\ud800"}):
        answer = requests.post(f"{server.url}/scoring/dice", params={"run_sync": "true"}, json=body, timeout=60)
        assert answer.status_code < 500, (body, answer.text)
