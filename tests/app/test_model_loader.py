"""The served model, and the status of a training in another process."""

from __future__ import annotations

import contextvars
import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from deformux.data.preprocessing import Preprocessing
from deformux.inference.locate import Locator
from deformux.inference.locator_file import locator_path
from deformux.networks.deformux_net import DeformUXNet
from deformux.networks.model_file import ModelCard
from deformux.networks.pretrained import PRETRAINED
from deformux_label.lib.configs.project import Project
from deformux_label.lib.infers.cancellation import ClientGone, watch_client
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


def test_each_version_is_served_with_its_own_locator(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    models = ServedModels(PROJECT, tmp_path)
    card = ModelCard(labels=("a", "b"), preprocessing=Preprocessing(), preset="tiny")
    names = []
    for threshold in (0.1, 0.3):
        locator = Locator(DeformUXNet(1, 3, "tiny"), (2, 2, 1), (16, 16, 16), ((0.0, 1.0),), threshold, 10.0, (1,))
        names.append(models.versions.write(DeformUXNet(1, 3, "tiny"), card, locator=locator))
    plain = published(models, 1.0)
    first, second = (models.locator(name, "cpu") for name in names)
    assert first is not None
    assert second is not None
    assert (first.threshold, second.threshold) == (0.1, 0.3)
    assert models.locator(names[1], "cpu") is second, "it is not read again"
    assert models.locator(plain, "cpu") is None
    assert caplog.text == ""
    locator_path(models.versions.path(names[0])).write_bytes(b"damaged")
    assert models.locator(names[0], "cpu") is None
    assert "without a locator" in caplog.text
    assert models.load(names[0], "cpu")[1].locator["expected"] == [1], "the model answers all the same"


def test_a_network_stops_between_layers_when_its_client_leaves(tmp_path: Path) -> None:
    """A large window takes seconds on a CPU."""
    models = ServedModels(PROJECT, tmp_path)
    name = published(models, 1.0)
    network, _ = models.load(name, "cpu")
    asked = 0

    def gone() -> bool:
        nonlocal asked
        asked += 1
        return asked > 3

    def run() -> None:
        watch_client(gone)
        network(torch.zeros(1, 1, 16, 16, 16))

    with pytest.raises(ClientGone):
        contextvars.copy_context().run(run)
    assert asked == 4
    network(torch.zeros(1, 1, 16, 16, 16))


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
