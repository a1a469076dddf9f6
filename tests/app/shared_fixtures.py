"""Servers that the tests share: each starts once and is always stopped."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import requests
from live import (
    CONF,
    TAUGHT_CONF,
    LiveServer,
    Training,
    Volume,
    remove_state,
    rotation,
    serve_command,
    stock_command,
    write_volume,
)
from monailabel.config import settings


def _starting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., LiveServer]]:
    # A test run that is ended from outside must not leave servers behind: pytest tears down on KeyboardInterrupt.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    servers: list[LiveServer] = []
    projects: list[tuple[Path, Mapping[str, str]]] = []

    def _start(studies: Path, conf: Mapping[str, str], command: Callable[..., list[str]] = stock_command) -> LiveServer:
        projects.append((studies, conf))
        servers.append(LiveServer(command(studies, conf), tmp_path_factory.mktemp("server")))
        return servers[-1]

    yield _start
    for server in servers:
        server.stop()
    for studies, conf in projects:
        remove_state(studies, conf)


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., LiveServer]]:
    """Start a server on a folder; all of them are stopped, and what they kept is deleted, at the end."""
    yield from _starting(tmp_path_factory)


@pytest.fixture(scope="module")
def start_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., LiveServer]]:
    """The same for the servers of one file: they would score volumes in the background while the next one's work."""
    yield from _starting(tmp_path_factory)


@pytest.fixture
def unwatched(monkeypatch: pytest.MonkeyPatch) -> None:
    """No watcher of the studies, which a server has: what must hold without it."""
    monkeypatch.setattr(settings, "MONAI_LABEL_DATASTORE_AUTO_RELOAD", False)


@pytest.fixture
def volume(tmp_path: Path) -> Volume:
    """A small scan in a folder of studies, and its label outside."""
    return write_volume(tmp_path / "studies" / "scan.nii.gz", tmp_path / "label.nii.gz", spacing=(4, 4, 4))


@pytest.fixture(scope="session")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Volume]:
    """Scans in every geometry the clients meet, and plain ones to train on."""
    folder = tmp_path_factory.mktemp("volumes")

    def volume(name: str, suffix: str = ".nii.gz", **geometry: Any) -> Volume:
        image, label = folder / "images" / f"{name}{suffix}", folder / "labels" / f"{name}{suffix}"
        return write_volume(image, label, seed=len(made), **geometry)

    made: dict[str, Volume] = {}
    # left to the first axis, superior to the second, anterior to the third
    permuted = np.array([[-1.0, 0, 0], [0, 0, 1], [0, -1, 0]])
    made["axial"] = volume("axial")
    made["anisotropic"] = volume("anisotropic", spacing=(1.0, 1.0, 4.0))
    made["permuted"] = volume("permuted", axes=permuted, spacing=(2.0, 1.6, 3.2))
    made["oblique"] = volume("oblique", axes=rotation(20, -15, 30), spacing=(1.5, 1.5, 3.0))
    made["oblique_nrrd"] = volume("oblique_nrrd", ".nrrd", axes=rotation(-25, 10, 15), spacing=(3.0, 1.5, 2.0))
    made["plain_nii"] = volume("plain_nii", ".nii")
    for number in range(6):
        made[f"case_{number}"] = volume(f"case_{number}")
    return made


@pytest.fixture(scope="session")
def studies(tmp_path_factory: pytest.TempPathFactory, volumes: dict[str, Volume]) -> Path:
    """A folder of unlabelled scans."""
    folder = tmp_path_factory.mktemp("project") / "studies"
    folder.mkdir()
    for volume in volumes.values():
        shutil.copy(volume.image, folder)
    return folder


@pytest.fixture(scope="session")
def server(start: Callable[..., LiveServer], studies: Path) -> LiveServer:
    """The shared project, started by MONAI Label's own command."""
    return start(studies, TAUGHT_CONF)


@pytest.fixture(scope="session")
def fresh(start: Callable[..., LiveServer], tmp_path_factory: pytest.TempPathFactory) -> tuple[LiveServer, Path]:
    """A second project of the same labels, started by ``deformux-label serve`` on a folder that does not exist."""
    folder = tmp_path_factory.mktemp("fresh") / "new" / "studies"
    return start(folder, CONF, serve_command), folder


def run_training(server: LiveServer, **options: Any) -> Training:
    """Start a training and follow it as the Slicer extension does, but more often."""
    started = requests.post(f"{server.url}/train/segmentation", json=options, timeout=60)
    assert started.status_code == 200, started.text
    training = Training()
    end = time.monotonic() + 540
    while time.monotonic() < end:
        training.task = requests.get(f"{server.url}/train/", timeout=60).json()
        stats = requests.get(f"{server.url}/info/", timeout=60).json()["train_stats"]["segmentation"]
        if not training.seen or json.dumps(stats) != json.dumps(training.seen[-1]):
            training.seen.append(stats)
        if training.task["status"] in ("DONE", "ERROR"):
            return training
        time.sleep(0.1)
    raise AssertionError(f"the training did not end: {training.task}")


@pytest.fixture(scope="session")
def trainings(server: LiveServer, volumes: dict[str, Volume]) -> list[Training]:
    """Two trainings in a row: a few steps on three labels, then enough on six to find the organs."""
    cases = [volumes[f"case_{number}"] for number in range(6)]
    for case in cases[:3]:
        assert server.submit(case.id, case.label).status_code == 200
    first = run_training(server, steps=2)
    for case in cases[3:]:
        assert server.submit(case.id, case.label).status_code == 200
    return [first, run_training(server, steps=40, learning_rate=0.006)]


@pytest.fixture(scope="session")
def slicer_client() -> ModuleType:
    """Return the client code of the Slicer extension, from the installed monailabel wheel."""
    # The fixture exists once for each folder of tests. A second import would not set the package's submodules again.
    if loaded := sys.modules.get("MONAILabelLib"):
        return loaded
    files = importlib.metadata.files("monailabel") or []
    (init,) = [f for f in files if str(f).endswith("slicer/MONAILabel/MONAILabelLib/__init__.py")]
    path = Path(str(init.locate())).resolve()
    spec = importlib.util.spec_from_file_location("MONAILabelLib", path, submodule_search_locations=[str(path.parent)])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["MONAILabelLib"] = module
    spec.loader.exec_module(module)
    return module
