"""A real server process for the tests, and small volumes whose anatomy is known in millimetres."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import nrrd
import numpy as np
import requests

from deformux_label.demo.server_process import PlayerError, ServerProcess
from preloaded import PreloadedProcess

APP = Path(__file__).resolve().parents[2] / "apps" / "deformux_label"
LABELS = ("liver", "spleen")
CONF = {"labels": ",".join(LABELS), "modality": "ct", "spacing": "2,2,2", "patch_size": "32,32,32"}
# The project that learns: voxels so coarse that a training takes seconds, not minutes.
TAUGHT_CONF = {**CONF, "spacing": "3,3,3", "patch_size": "16,16,16"}
# Seconds that a test waits for an event, on slow machines too.
PATIENCE_S = 240
# Centre relative to the volume's, in RAS millimetres, and radius: no two axes alike, so that any flip shows.
ORGANS = {"liver": ((14.0, 2.0, 5.0), 13.0), "spleen": ((-13.0, 8.0, -7.0), 10.0)}


def stock_command(studies: Path, conf: Mapping[str, str]) -> list[str]:
    """Return MONAI Label's own command line."""
    command = [str(Path(sys.executable).parent / "monailabel"), "start_server", "--app", str(APP)]
    command += ["--studies", str(studies)]
    for key, value in conf.items():
        command += ["--conf", key, value]
    return command


def preloaded_stock_command(studies: Path, conf: Mapping[str, str]) -> list[str]:
    """Return what that script runs, which ``LiveServer`` runs with its libraries preloaded."""
    return [sys.executable, "-m", "monailabel.main", *stock_command(studies, conf)[1:]]


def serve_command(studies: Path, conf: Mapping[str, str]) -> list[str]:
    """Return this project's command line, which ``make serve`` calls."""
    command = [str(Path(sys.executable).parent / "deformux-label"), "serve", "--studies", str(studies)]
    for key, value in conf.items():
        command += [f"--{key.replace('_', '-')}", value]
    return command


# The two ways to start a server, by the name that tests have in their ids.
WAYS = {"deformux-label serve": serve_command, "monailabel start_server": preloaded_stock_command}


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of a server: the monailabel script runs the first ``python`` on the PATH."""
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "MONAI_LABEL_SESSION_PATH": str(folder / "sessions"),
        # The default folder of the login's users: not that of the user who runs the tests.
        "XDG_CONFIG_HOME": str(folder / "config"),
    }


# Commands that run with their libraries preloaded: how they begin, and the program in its place.
_PRELOADED = {
    (str(Path(sys.executable).parent / "deformux-label"),): "from deformux_label.cli.main import app; app()",
    (sys.executable, "-m", "monailabel.main"): "import runpy; runpy.run_module('monailabel.main', None, '__main__')",
}


def preloaded(command: Sequence[str], **options: Any) -> PreloadedProcess | None:
    """Start a command whose libraries can be preloaded; return None for any other."""
    for begin, program in _PRELOADED.items():
        if tuple(command[: len(begin)]) == begin:
            return PreloadedProcess(program, command[len(begin) :], **options)
    return None


def refused_start(command: Sequence[str], folder: Path, **variables: str) -> str:
    """Run a command whose options the server refuses, and return its one sentence."""
    name = uuid.uuid4().hex[:8]
    output, errors = (folder / f"{kind}-{name}.log" for kind in ("output", "errors"))
    given = {**environment(folder), **variables}
    process = preloaded(command, output=output, errors=errors, folder=folder, environment=given)
    assert process is not None, command
    assert process.wait(120) == 2, errors.read_text()[-2000:]
    said = errors.read_text()
    assert "Traceback" not in output.read_text() + said
    last = said.strip().splitlines()[-1]
    assert last.startswith("deformux-label: "), said
    return last


class LiveServer(ServerProcess):
    """A server that runs once it is constructed; ``stop`` ends it with everything that it started.

    ``serve_command`` and ``preloaded_stock_command`` have their libraries preloaded; ``stock_command`` is run as it is.
    """

    def __init__(self, command: Sequence[str], folder: Path, *, scheme: str = "http", host: str = "127.0.0.1") -> None:
        super().__init__(
            command,
            log=folder / f"server-{uuid.uuid4().hex[:8]}.log",
            scheme=scheme,
            host=host,
            environment=environment(folder),
            folder=folder,
            patience_s=PATIENCE_S,
        )
        try:
            self.start()
        except PlayerError as error:
            raise AssertionError(f"{error}:\n{self.log.read_text()[-3000:]}") from error

    def _launch(self) -> Any:
        options = {"output": self.log, "folder": self._folder, "environment": self._environment}
        return preloaded(self._command, **options) or super()._launch()

    def infer(
        self, image: str, /, *, model: str = "segmentation", query: Mapping[str, str] | None = None, **params: Any
    ) -> Any:
        """Ask for an inference by a raw request, without a client in between."""
        return requests.post(
            f"{self.url}/infer/{model}",
            params={"image": image, **(query or {})},
            files={"params": (None, json.dumps(params))},
            timeout=120,
        )

    def submit(self, image: str, label: Path, tag: str = "", **params: Any) -> Any:
        """Save a label by a raw request."""
        with label.open("rb") as file:
            return requests.put(
                f"{self.url}/datastore/label",
                params={"image": image, **({"tag": tag} if tag else {})},
                data={"params": json.dumps(params)},
                files={"label": (label.name, file)},
                timeout=120,
            )

    def objects(self) -> dict[str, Any]:
        """Return the datastore's index."""
        return requests.get(f"{self.url}/datastore/", params={"output": "all"}, timeout=60).json()["objects"]


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    """Return the condition's value as soon as it is true."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"it did not happen: {what}")


@dataclass
class Training:
    """One training as a client sees it: its last task, and every statistic it showed on the way."""

    task: dict[str, Any] = field(default_factory=dict)
    seen: list[dict[str, Any]] = field(default_factory=list)

    @property
    def final(self) -> dict[str, Any]:
        return self.seen[-1]


@dataclass(frozen=True)
class Volume:
    """A scan on disk with its true labels on the same grid."""

    image: Path
    label: Path
    affine: np.ndarray
    truth: np.ndarray

    @property
    def id(self) -> str:
        return self.image.name.split(".")[0]


def write_volume(
    image: Path,
    label: Path,
    *,
    axes: np.ndarray | None = None,
    spacing: Sequence[float] = (2.0, 2.0, 2.0),
    seed: int = 0,
) -> Volume:
    """Write a scan of about 64 mm along each axis and its labels, in the formats of their suffixes.

    ``axes`` holds the RAS directions of the voxel axes in its columns.
    """
    rng = np.random.default_rng(seed)
    axes = np.eye(3) if axes is None else axes
    shape = tuple(round(64 / s) for s in spacing)
    affine = np.eye(4)
    affine[:3, :3] = axes * spacing
    centre = rng.uniform(-40, 40, 3)
    affine[:3, 3] = centre - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    position = (
        nib.affines.apply_affine(affine, np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)) - centre
    )
    truth = np.zeros(shape, dtype=np.uint8)
    for value, (middle, radius) in enumerate(ORGANS.values(), start=1):
        truth[np.linalg.norm(position - middle - rng.uniform(-2, 2, 3), axis=-1) < radius] = value
    scan = np.choose(truth, [-60.0, 70.0, 190.0]) + rng.normal(0, 15, shape)
    write(image, scan.astype(np.int16), affine)
    write(label, truth, affine)
    return Volume(image, label, affine, truth)


def write(path: Path, array: np.ndarray, affine: np.ndarray) -> Path:
    """Write NIfTI or NRRD without the app's own code."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".nrrd":
        to_lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
        header = {
            "space": "left-posterior-superior",
            "space directions": to_lps[:3, :3].T,
            "space origin": to_lps[:3, 3],
        }
        nrrd.write(str(path), array, {**header, "kinds": ["domain"] * 3})
    else:
        nib.save(nib.Nifti1Image(array, affine), path)
    return path


def rotation(*degrees: float) -> np.ndarray:
    """Return the matrix of a rotation about x, then y, then z."""
    matrix = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(degrees)):
        turn = np.eye(3)
        i, j = [k for k in range(3) if k != axis]
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    return matrix


def slicer(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run ``slicer_session.py``: real Slicer in a process of its own, for its teardown may crash."""
    script = Path(__file__).with_name("slicer_session.py")
    done = subprocess.run(
        [sys.executable, str(script)], input=json.dumps(jobs), capture_output=True, text=True, timeout=180, check=False
    )
    lines = done.stdout.strip().splitlines()
    failure = f"Slicer failed ({done.returncode}):\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    assert lines, failure
    assert lines[-1].startswith("["), failure
    return json.loads(lines[-1])


def publish_untrained(
    studies: Path,
    conf: Mapping[str, str],
    bias: float = 0.0,
    guidance: float | None = None,
    background: float | None = None,
) -> str:
    """Publish a version of random weights for a project that no server serves yet, and return its name.

    ``guidance`` is the standard deviation of the weights through which clicks enter; None for a model without.
    ``background`` is the bias of the background, if it has another.
    """
    import torch

    from deformux.networks.deformux_net import DeformUXNet
    from deformux.networks.model_file import ModelCard
    from deformux.publishing.model_versions import ModelVersions

    project = project_of(conf)
    versions = ModelVersions(project.state_folder(APP, str(studies)) / "versions")
    options = {} if guidance is None else {"guidance": True}
    network = DeformUXNet(1, len(project.labels) + 1, project.preset, **options)
    torch.nn.init.constant_(network.head.conv.conv.bias, bias)
    if background is not None:
        torch.nn.init.constant_(network.head.conv.conv.bias[:1], background)
    for name, parameter in network.named_parameters():
        if guidance is not None and name.endswith(".guidance"):
            torch.nn.init.normal_(parameter, std=guidance)
    card = ModelCard(
        labels=project.labels,
        preprocessing=project.preprocessing,
        preset=project.preset,
        network_options=options,
    )
    name = versions.write(network, card)
    versions.publish(name)
    return name


def remove_state(studies: Path, conf: Mapping[str, str]) -> None:
    """Delete a project's state in the app's folder."""
    shutil.rmtree(project_of(conf).state_folder(APP, str(studies)), ignore_errors=True)


def project_of(conf: Mapping[str, str]) -> Any:
    """Return the project of these options, some of which are the server's."""
    from deformux_label.lib.configs.project import Project
    from deformux_label.lib.configs.server import SERVER_OPTIONS

    return Project.from_conf({key: value for key, value in conf.items() if key not in SERVER_OPTIONS})
