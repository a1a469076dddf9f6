"""Thousands of seeded requests: no 5xx but 507, no hang, no access outside, no growth."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import requests
from attacks import process_of, tree
from fuzz import Fuzzer, fuzz
from fuzz_values import volumes_of
from live import APP, CONF, LiveServer, serve_command, stock_command, wait_for

_SEED = 18
IMAGES = ("one", "two", "three")
# Files of a server besides the studies and its state: its log, and MONAI Label's empty folders.
_OF_THE_APP = ("model", "logs", "bin", "__pycache__")


@pytest.mark.parametrize(
    ("command", "count"),
    [
        pytest.param(serve_command, 3_000, id="3000 requests"),
        pytest.param(serve_command, 20_000, id="20000 requests", marks=pytest.mark.slow),
        pytest.param(stock_command, 3_000, id="3000 requests under start_server", marks=pytest.mark.slow),
    ],
)
def test_no_request_breaks_the_server(
    start_here: Callable[..., LiveServer], tmp_path: Path, command: Callable[..., list[str]], count: int
) -> None:
    studies, canary = tmp_path / "project" / "studies", tmp_path / "canary"
    studies.mkdir(parents=True)
    canary.mkdir()
    (canary / "secret.raw").write_bytes(bytes(range(48, 112)) * 10)
    volumes = volumes_of(tmp_path)
    originals = {studies / f"{name}.nii.gz": volumes[".nii.gz"] for name in IMAGES}
    for path, data in originals.items():
        path.write_bytes(data)
    server = start_here(studies, {**CONF, "max_upload_gb": "0.01"}, command)
    sessions = [
        requests.put(f"{server.url}/session/", files={"files": ("a.nii", volumes[".nii"])}, timeout=60).json()
        for _ in range(2)
    ]
    fuzzer = Fuzzer(
        server.url,
        _SEED,
        images=IMAGES,
        volumes=volumes,
        labels=volumes_of(tmp_path, labels=True),
        sessions=[session["session_id"] for session in sessions],
    )
    outside = surroundings(studies, tmp_path)
    process = process_of(server)
    warm = count // 5
    first = fuzz(server.url, fuzzer.request, range(warm))
    before = grown(process)
    second = fuzz(server.url, fuzzer.request, range(warm, count))
    faults = first.faults + second.faults
    assert not faults, f"{len(faults)} faults:\n" + "\n".join(faults[:20])
    # Most are refused, and valid ones work.
    statuses = {status: first.statuses.get(status, 0) + second.statuses.get(status, 0) for status in second.statuses}
    print(json.dumps(dict(sorted(statuses.items()))))
    assert statuses[200] > count // 20
    assert surroundings(studies, tmp_path) == outside
    assert {path: path.read_bytes() for path in originals} == originals
    assert not strange_places(studies)
    wait_for(lambda: within(grown(process), before), f"threads and files went back to {before}")
    assert requests.get(f"{server.url}/info/", timeout=60).ok
    assert requests.get(f"{server.url}/datastore/", params={"output": "all"}, timeout=60).ok
    log = server.log.read_text()
    assert "Traceback (most recent call last)" not in log, log[log.index("Traceback") - 500 :][:4000]


def grown(process: psutil.Process) -> tuple[int, int]:
    """Return the counts of threads and open files."""
    time.sleep(0.2)
    return process.num_threads(), process.num_fds()


def within(now: tuple[int, int], before: tuple[int, int]) -> bool:
    """Wait until the counts are within bounds: idle worker threads end after a while."""
    return now[0] <= before[0] + 3 and now[1] <= before[1] + 8


def surroundings(studies: Path, folder: Path) -> dict[str, str]:
    """Return everything around the studies, and the installed app."""
    around = {name: what for name, what in tree(folder).items() if not name.startswith("project/studies")}
    app = {name: what for name, what in tree(APP).items() if not set(Path(name).parts) & set(_OF_THE_APP)}
    return {**around, **app}


def strange_places(studies: Path) -> list[str]:
    """Return files in the studies that are neither volumes with visible names nor the server's own."""
    known = {"datastore_v2.json", ".lock", ".deformux", "labels"}
    there = [path for path in studies.iterdir() if path.name not in known]
    suffixes = (".nii.gz", ".nii", ".nrrd", ".mha")
    return [
        path.name for path in there if not path.is_file() or path.name[0] == "." or not path.name.endswith(suffixes)
    ]
