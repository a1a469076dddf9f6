"""MONAI Label's own radiology app, as a user runs it: its ``segmentation`` model, through its own server.

The app is the one that ``monailabel apps --download --name radiology`` gives, unchanged; its options are the names of
the set's labels, and no pretrained weights, which it takes from the internet for its own labels only. Labels are
submitted, the training is started and stopped, and scans are segmented through the server's API.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from benchmarks.quality.any_organ_deformux import Tell
from benchmarks.quality.any_organ_scores import labels_on_grid
from benchmarks.quality.any_organ_sets import Organ
from monailabel.client import MONAILabelClient

from deformux.data.atomic_files import write_text
from deformux.data.cases import Case
from deformux_label.demo.server_process import PlayerError, ServerProcess

__all__ = ["RadiologyApp", "radiology_app"]

_MODEL = "segmentation"
_COMMAND = (sys.executable, "-m", "monailabel.main")
# More than fit into any time: the training is stopped at the minutes.
_EPOCHS = 1_000_000
_POLL_SECONDS = 0.2
_START_SECONDS = 900.0
_STARTED = re.compile(r"Engine run (?:starting|resuming)")
_STEP = re.compile(r"Epoch: \d+/\d+, Iter: \d+/\d+ -- train_loss")
_EPOCH_DONE = re.compile(r"New Model published")


class RadiologyApp:
    """The app's server with the scans and labels of a set.

    Args:
        server: started.
        folder: for the server's answers.
        organ: the set.
        device: where it trains and segments.
    """

    def __init__(self, server: ServerProcess, folder: Path, organ: Organ, *, device: str) -> None:
        self.server, self.organ, self.device = server, organ, device
        self.published = folder / "radiology" / "model" / f"{_MODEL}.pt"
        answers = folder / "answers"
        answers.mkdir(exist_ok=True)
        self.client = MONAILabelClient(server.url, tmpdir=str(answers), client_id="benchmark")

    def submit_labels(self) -> None:
        """Submit the labels of the training cases, as a viewer does."""
        info = [{"name": name, "idx": value} for value, name in enumerate(self.organ.labels, start=1)]
        for case in self.organ.train:
            self.client.save_label(case.id, str(case.label), params={"label_info": info, "model": _MODEL})

    def train(self, *, seconds: float, tell: Tell) -> tuple[int, float]:
        """Train for a time from the first iteration; return steps and seconds, in whole epochs only at the least.

        Values are those that a viewer sends: the trainer's own defaults, of lists the first item. The app publishes
        the model of the epoch with the best validation on its own split. A training that has published none by then
        goes on until it has.
        """
        config: Mapping[str, Any] = self.client.info()["trainers"][_MODEL]["config"]
        values = {name: value[0] if isinstance(value, list) else value for name, value in config.items()}
        self.client.train_start(_MODEL, {**values, "max_epochs": _EPOCHS, "device": self.device})
        tell("waiting for the app's training", 0.0)
        self._wait(lambda: bool(_STARTED.search(self._log())), _START_SECONDS)
        began = time.monotonic()
        while (spent := time.monotonic() - began) < seconds or not _EPOCH_DONE.search(self._log()):
            self._check_training()
            tell("training", min(1.0, spent / seconds))
            time.sleep(_POLL_SECONDS)
        best = self.published.parent / _MODEL / str(values["name"]) / "model.pt"
        # Neither it nor the published one is written by rename: a stop meanwhile would leave half a file.
        self._wait(lambda: zipfile.is_zipfile(best), 60)
        steps = len(_STEP.findall(self._log()))
        self.client.train_stop()
        self._wait(lambda: not self.client.train_status(check_if_running=True), 60)
        shutil.copy(best, self.published)
        return steps, spent

    def segment_case(self, case: Case) -> np.ndarray:
        """Return labels ``(X, Y, Z)`` on the scan's own grid."""
        parameters = {"result_extension": ".nii.gz", "result_dtype": "uint8", "device": self.device}
        answer, _ = self.client.infer(_MODEL, case.id, parameters)
        found = Path(answer)
        labels = labels_on_grid(found, case.image)
        found.unlink()
        return labels

    def facts(self) -> dict[str, Any]:
        """Return plain values that say what is fixed in the app."""
        return {
            "network": "SegResNet, 32 filters",
            "spacing_mm": [1.5, 1.5, 1.5],
            "patch_size": [96, 96, 96],
            "learning_rate": 1e-4,
            "published": len(_EPOCH_DONE.findall(self._log())),
        }

    def parameters(self) -> int:
        """Return the number of parameters of the published model."""
        weights = torch.load(self.published, map_location="cpu", weights_only=True)
        return sum(value.numel() for value in weights.get("model", weights).values())

    def _log(self) -> str:
        return self.server.log.read_text(errors="replace")

    def _check_training(self) -> None:
        self.server.check()
        if not self.client.train_status(check_if_running=True):
            raise OSError("the app's training ended by itself; its last lines are: " + self.server.tail(5))

    def _wait(self, done: Callable[[], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not done():
            self.server.check()
            if time.monotonic() > end:
                raise OSError(f"MONAI Label's app did not go on within {seconds:.0f} s: {self.server.tail(5)}")
            time.sleep(_POLL_SECONDS)


@contextmanager
def radiology_app(organ: Organ, folder: Path, *, device: str, threads: int) -> Iterator[RadiologyApp]:
    """Serve the scans of a set with the app until the block ends; the folder is emptied before and after."""
    identity = folder.parent / f"{folder.name}.pid"
    _end_left_over(identity)
    shutil.rmtree(folder, ignore_errors=True)
    studies = folder / "studies"
    studies.mkdir(parents=True)
    for case in (*organ.train, *organ.val):
        shutil.copy(case.image, studies / f"{case.id}.nii.gz")
    # Its folder of models is made by the server.
    download = [*_COMMAND, "apps", "--download", "--name", "radiology", "--output", str(folder)]
    subprocess.run(download, check=True, capture_output=True)
    # Without SAM 2, another model of the app, whose weights it takes from the internet at the start.
    options = {"models": _MODEL, "labels": ",".join(organ.labels), "use_pretrained_model": "false", "sam2": "false"}
    conf = [part for name, value in options.items() for part in ("--conf", name, value)]
    command = [*_COMMAND, "start_server", "--app", str(folder / "radiology"), "--studies", str(studies), *conf]
    server = ServerProcess(
        command, log=folder / "server.log", environment=_environment(device, threads), folder=folder,
        patience_s=_START_SECONDS,
    )  # fmt: skip
    try:
        try:
            server.start()
        except PlayerError as error:
            raise OSError(f"{error}; its last lines are:\n{server.tail()}") from error
        write_text(identity, f"{server.process.pid} {psutil.Process(server.process.pid).create_time()}")
        app = RadiologyApp(server, folder, organ, device=device)
        app.submit_labels()
        yield app
    finally:
        server.stop()
        identity.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def _environment(device: str, threads: int) -> dict[str, str]:
    """Return this environment with the threads of all contenders, and without MLflow, which needs another version."""
    own = {
        "OMP_NUM_THREADS": str(threads),
        "MONAI_LABEL_TRACKING_ENABLED": "false",
        "MONAI_LABEL_INFER_TIMEOUT": "7200",
    }
    return {**os.environ, **own, **({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})}


def _end_left_over(identity: Path) -> None:
    """End the server of a run that was killed: it would go on training beside the next run."""
    if not identity.is_file():
        return
    pid, started = identity.read_text().split()
    try:
        process = psutil.Process(int(pid))
        if process.create_time() == float(started):
            for child in (*process.children(recursive=True), process):
                child.kill()
    except psutil.NoSuchProcess:
        pass
    identity.unlink(missing_ok=True)
