"""AUTO_TRAIN on a live server: three submits of one label are one, and what was trained on counts no more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from live import LABELS, LiveServer, Volume, serve_command, wait_for, write, write_volume

CONF = {"labels": ",".join(LABELS), "modality": "ct", "spacing": "4,4,4", "patch_size": "16,16,16", "auto_train": "2"}


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Volume]:
    root = tmp_path_factory.mktemp("auto")
    return {
        name: write_volume(root / "studies" / f"{name}.nii.gz", root / f"{name}.nii.gz", spacing=(4, 4, 4), seed=number)
        for number, name in enumerate("abc")
    }


@pytest.fixture(scope="module")
def server(start_here: Callable[..., LiveServer], volumes: dict[str, Volume]) -> LiveServer:
    return start_here(volumes["a"].image.parent, CONF, serve_command)


def tasks(server: LiveServer) -> list[dict[str, Any]]:
    answer = requests.get(f"{server.url}/train/", params={"all": "true"}, timeout=60)
    return answer.json() if answer.ok else []


def new_labels(server: LiveServer) -> int:
    stats = requests.get(f"{server.url}/info/", timeout=60).json()["train_stats"]["segmentation"]
    return stats["queue"]["new_labels"]


def test_a_training_is_due_after_distinct_changed_labels(
    server: LiveServer, volumes: dict[str, Volume], tmp_path: Path
) -> None:
    other = write(tmp_path / "other.nii.gz", np.roll(volumes["a"].truth, 1, axis=0), volumes["a"].affine)
    # Three times the same bytes, and another label of the same image.
    for label in (volumes["a"].label, volumes["a"].label, volumes["a"].label, other):
        assert server.submit("a", label).ok
    assert tasks(server) == []
    assert server.submit("b", volumes["b"].label).ok
    (first,) = tasks(server)
    assert first["automatic"]
    wait_for(lambda: tasks(server)[0]["status"] == "RUNNING", "it starts")
    assert requests.delete(f"{server.url}/train/", timeout=120).json()["id"] == first["id"]
    assert new_labels(server) == 0
    # The same labels again: nothing to learn.
    assert server.submit("a", other).ok
    assert server.submit("b", volumes["b"].label).ok
    assert (new_labels(server), len(tasks(server))) == (0, 1)
    # Restoring an earlier one is a change, and restoring what was trained on is none.
    for revision, count in ((1, 1), (4, 0)):
        query = {"image": "a", "revision": revision}
        assert requests.post(f"{server.url}/deformux/labels/restore", params=query, timeout=60).ok
        assert (new_labels(server), len(tasks(server))) == (count, 1)
    assert server.submit("a", volumes["a"].label).ok
    assert server.submit("c", volumes["c"].label).ok
    assert len(tasks(server)) == 2
    assert requests.delete(f"{server.url}/train/", timeout=120).status_code == 200
