"""The demo as a user runs it: a process that starts the real server, trains in rounds and leaves nothing running."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib.image
import nibabel as nib
import numpy as np
import psutil
import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from deformux.data.synthetic import LABELS
from deformux_label.cli.common import app_folder
from deformux_label.demo.__main__ import main
from deformux_label.lib.configs.project import Project
from preloaded import PreloadedProcess, run_preloaded

TINY = ["--rounds", "2", "--first", "2", "--batch", "2", "--volumes", "6", "--steps", "3", "--voxel-scale", "2.5"]


PROGRAM = "import runpy; runpy.run_module('deformux_label.demo.__main__', None, '__main__')"


def demo(arguments: Sequence[str], folder: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return run_preloaded(PROGRAM, *arguments, folder=folder, **options)


def demo_in_this_process(arguments: Sequence[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Result:
    """Run the demo where it ends before it starts a server."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the handler is only for the demo's own process
    command = typer.Typer()
    command.command()(main)
    return CliRunner().invoke(command, arguments)


def processes_naming(folder: Path) -> list[str]:
    """Return the command lines of all running processes that mention `folder`: server, training and scoring do."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = " ".join(process.info["cmdline"] or [])
        if str(folder) in line and process.info["status"] != psutil.STATUS_ZOMBIE and process.pid != os.getpid():
            found.append(line)
    return found


def remove_state(output: Path, *, labels: Sequence[str] = LABELS, modality: str = "ct") -> None:
    """Remove the model versions that the app keeps for a demo's studies."""
    project = Project.from_conf({"labels": ",".join(labels), "modality": modality})
    shutil.rmtree(project.state_folder(app_folder(), str(output / "studies")), ignore_errors=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.CompletedProcess[str], Path]]:
    folder = tmp_path_factory.mktemp("demo")
    yield demo([*TINY, "--output", str(folder / "out")], folder), folder / "out"
    remove_state(folder / "out")


def test_demo_succeeds_and_prints_a_row_per_round(finished: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    result, output = finished
    log = (output / "server.log").read_text()[-3000:] if (output / "server.log").is_file() else ""
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}\n{log}"
    assert re.search(r"round +labelled +mean Dice +liver +spleen +kidneys +vessels +corrected +seconds", result.stdout)
    rows = re.findall(r"^ +(\d) +(\d) +(0\.\d{3}) ", result.stdout, re.MULTILINE)
    assert [(number, labelled) for number, labelled, _ in rows] == [("1", "2"), ("2", "4")]
    assert "report.html" in result.stdout
    assert "make serve STUDIES=" in result.stdout


def test_nothing_is_left_running(finished: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    _, output = finished
    assert processes_naming(output) == []


def test_there_is_a_picture_per_round_and_a_report_that_holds_them(
    finished: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    _, output = finished
    for name in ("round_1.png", "round_2.png", "learning_curve.png", "montage.png"):
        pixels = matplotlib.image.imread(output / name)
        assert pixels.shape[0] > 300
        assert pixels.shape[1] > 600
        assert pixels[..., :3].std() > 0.05  # neither empty nor of one colour
    page = (output / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert 'src="http' not in page  # self-contained
    assert page.count("<tr>") == 3


def test_dice_in_the_report_is_that_of_the_files(finished: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    _, output = finished
    rounds = json.loads((output / "rounds.json").read_text())
    assert [r["labelled"] for r in rounds] == [2, 4]
    for r in rounds:
        dice = []
        for name in r["volumes"]:
            truth = np.asarray(nib.load(output / "cohort" / "labels" / f"{name}.nii.gz").dataobj)
            found = np.asarray(nib.load(output / "predictions" / f"round_{r['number']}" / f"{name}.nii.gz").dataobj)
            overlap = [
                2 * np.sum((truth == v) & (found == v)) / (np.sum(truth == v) + np.sum(found == v)) for v in range(1, 5)
            ]
            dice.append(overlap)
        assert r["unlabelled"] == len(dice)
        assert r["mean_dice"] == pytest.approx(np.mean(dice), abs=1e-6)


def test_labels_stay_hidden_from_the_server_until_they_are_submitted(
    finished: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    _, output = finished
    studies = output / "studies"
    assert len(list(studies.glob("*.nii.gz"))) == 6
    submitted = sorted(path.name for path in (studies / "labels" / "final").glob("*.nii.gz"))
    assert len(submitted) == 4
    for name in submitted:  # and what arrived is the truth, on its grid
        arrived, truth = nib.load(studies / "labels" / "final" / name), nib.load(output / "cohort" / "labels" / name)
        np.testing.assert_array_equal(np.asarray(arrived.dataobj), np.asarray(truth.dataobj))
        np.testing.assert_allclose(arrived.affine, truth.affine, atol=1e-4)


def test_an_interrupted_demo_stops_its_server(tmp_path: Path) -> None:
    arguments = [*TINY, "--output", tmp_path / "out"]
    process = PreloadedProcess(PROGRAM, arguments, output=tmp_path / "log", folder=tmp_path)
    try:
        end = time.monotonic() + 120
        while time.monotonic() < end and not processes_naming(tmp_path / "out" / "studies"):
            assert process.poll() is None
            time.sleep(0.2)
        assert processes_naming(tmp_path / "out" / "studies"), "the server did not start"
        process.send_signal(signal.SIGINT)
        printed = process.ended(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Stopped; the server is stopped too." in printed
    assert "Traceback" not in printed
    assert processes_naming(tmp_path / "out") == []
    remove_state(tmp_path / "out")


def test_a_failing_training_shows_the_log_and_one_sentence(tmp_path: Path) -> None:
    output, environment = tmp_path / "out", {**os.environ, "DEFORM3D_BACKEND": "abacus"}
    result = demo([*TINY, "--output", str(output)], tmp_path, environment=environment)
    remove_state(output)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("demo: the training failed")
    assert "The last lines of the server's log:" in result.stdout
    assert "abacus" in result.stdout
    assert processes_naming(output) == []


def test_an_option_the_server_refuses_is_one_sentence(tmp_path: Path) -> None:
    result = demo([*TINY, "--output", str(tmp_path / "out"), "--preset", "gigantic"], tmp_path)
    assert result.returncode == 1
    assert "preset must be one of base, small, tiny, or auto; got 'gigantic'" in result.stderr
    assert "Traceback" not in result.stdout + result.stderr


def write_case(folder: Path, name: str, label: np.ndarray) -> None:
    rng = np.random.default_rng(len(name))
    for kind, data in (("images", rng.normal(100, 20, label.shape).astype(np.float32)), ("labels", label)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(data, np.eye(4)), folder / kind / f"{name}.nii.gz")


@pytest.mark.slow
def test_held_out_cases_of_several_sequences_are_scored(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    data, output = tmp_path / "data", tmp_path / "out"
    for name in "abcd":
        label = empty_label()
        label[2:6, 2:6, 1 + "abcd".index(name) : 5] = 1
        write_case(data, name, label)
        (data / "images" / f"{name}.nii.gz").rename(data / "images" / f"{name}_0000.nii.gz")
        second = rng.normal(100, 5, label.shape) + 200 * label
        nib.save(nib.Nifti1Image(second.astype(np.float32), np.eye(4)), data / "images" / f"{name}_0001.nii.gz")
    (data / "split.json").write_text(json.dumps({"train": ["a", "b"], "val": ["c", "d"]}))
    options = {"studies": data, "rounds": 1, "first": 1, "steps": 2, "preset": "tiny", "spacing": "native"}
    options |= {"patch-size": "16,16,16", "labels": "cube", "output": output}
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    result = demo(arguments, tmp_path)
    remove_state(output, labels=["cube"], modality="auto")
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    (finished,) = json.loads((output / "rounds.json").read_text())
    folder = output / "predictions" / "round_1" / "held_out"
    dice = []
    for name in "cd":
        truth, found = (
            np.asarray(nib.load(path).dataobj) == 1
            for path in (data / "labels" / f"{name}.nii.gz", folder / f"{name}.nii.gz")
        )
        dice.append(2 * np.sum(truth & found) / (np.sum(truth) + np.sum(found)))
    assert finished["held_out_dice"] == pytest.approx(np.mean(dice), abs=1e-6)
    assert not list((output / "studies").glob("[cd]_*"))


def empty_label() -> np.ndarray:
    return np.zeros((8, 8, 8), np.uint8)


def no_folder(folder: Path) -> str:
    return "is not a folder"


def no_labels(folder: Path) -> str:
    (folder / "data" / "images").mkdir(parents=True)
    return "must hold the folders images/ and labels/"


def all_background(folder: Path) -> str:
    for name in "abcdef":
        write_case(folder / "data", name, empty_label())
    return "are all background"


def damaged(folder: Path) -> str:
    for name in "abcdef":
        label = empty_label()
        label[2:5, 2:5, 2:5] = 1
        write_case(folder / "data", name, label)
    path = folder / "data" / "labels" / "c.nii.gz"
    path.write_bytes(path.read_bytes()[:40])
    return "case c cannot be used"


def too_few(folder: Path) -> str:
    for name in "ab":
        label = empty_label()
        label[2:5, 2:5, 2:5] = 7
        write_case(folder / "data", name, label)
    return "leave none to score"


@pytest.mark.parametrize("prepare", [no_folder, no_labels, all_background, damaged, too_few])
def test_unusable_studies_end_in_one_sentence(
    prepare: Callable[[Path], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = prepare(tmp_path)
    result = demo_in_this_process(["--studies", "data"], tmp_path, monkeypatch)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)  # no other exception came up
    assert result.stderr.startswith("demo: ")
    assert expected in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "demo").exists()


def test_an_output_folder_of_someone_else_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    precious = tmp_path / "thesis" / "chapter.txt"
    precious.parent.mkdir()
    precious.write_text("42")
    result = demo_in_this_process([*TINY, "--output", "thesis"], tmp_path, monkeypatch)
    assert result.exit_code == 1
    assert "has files that no demo wrote" in result.stderr
    assert precious.read_text() == "42"
