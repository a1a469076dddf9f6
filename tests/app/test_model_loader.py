"""The served model, and the status of a training in another process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from deformux.data.preprocessing import Preprocessing
from deformux.networks.deformux_net import DeformUXNet
from deformux.networks.model_file import ModelCard
from deformux.networks.pretrained import PRETRAINED
from deformux_label.lib.configs.project import Project
from deformux_label.lib.infers.model_loader import ServedModels
from deformux_label.lib.trainers.status import TrainingStatus

PROJECT = Project(labels=("a", "b"))


def published(models: ServedModels, value: float) -> str:
    """Write and publish a version that its output bias identifies."""
    network = DeformUXNet(1, 3, "tiny")
    torch.nn.init.constant_(network.head.conv.conv.bias, value)
    name = models.versions.write(network, ModelCard(labels=("a", "b"), preprocessing=Preprocessing(), preset="tiny"))
    models.versions.publish(name)
    return name


def bias(models: ServedModels) -> float:
    name = models.current()
    assert name is not None
    return models.load(name, "cpu")[0].head.conv.conv.bias[0].item()


def test_the_published_pointer_is_followed(tmp_path: Path) -> None:
    models = ServedModels(PROJECT, tmp_path)
    assert models.current() is None
    first = published(models, 1.0)
    assert (models.current(), bias(models)) == (first, 1.0)
    held = models.load(first, "cpu")[0]
    assert models.load(first, "cpu")[0] is held, "the same version is not read again"
    published(models, 2.0)
    assert bias(models) == 2.0
    models.versions.publish(first)
    assert bias(models) == 1.0


def test_a_pointer_to_a_missing_version_serves_no_model(tmp_path: Path) -> None:
    models = ServedModels(PROJECT, tmp_path)
    models.versions.path(published(models, 1.0)).unlink()
    assert models.current() is None


@pytest.mark.parametrize("name", PRETRAINED)
def test_pretrained_weights_answer_for_their_own_labels_only(name: str, tmp_path: Path) -> None:
    own = Project.from_conf({"pretrained": name})
    models = ServedModels(own, tmp_path)
    assert models.current() == f"pretrained-{name}"
    assert models.load(f"pretrained-{name}", "cpu")[1].labels == own.labels
    other = Project.from_conf({"pretrained": name, "labels": "something,else"})
    assert ServedModels(other, tmp_path / "other").current() is None


def test_status_of_an_ended_process(tmp_path: Path) -> None:
    status = TrainingStatus(tmp_path / "training.json")
    assert status.read() == {}
    program = (
        "import sys; from pathlib import Path; from deformux_label.lib.trainers.status import TrainingStatus\n"
        "TrainingStatus(Path(sys.argv[1])).start(total_epochs=7)\n"
        "print('started', flush=True); sys.stdin.readline()\n"
    )
    command = [sys.executable, "-c", program, str(status.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while process.stdout.readline() != "started\n":
            assert process.poll() is None
        assert status.read()["status"] == "running"
        assert status.read()["total_epochs"] == 7
        process.kill()
    assert status.read()["status"] == "stopped"
    # A later process with the same id is not the training.
    values = json.loads(status.path.read_text())
    status.path.write_text(json.dumps({**values, "process": [psutil.Process().ppid(), 1.0]}))
    assert status.read()["status"] == "stopped"
