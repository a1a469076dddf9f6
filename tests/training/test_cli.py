"""The deformux command as a user runs it."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from rich.console import Console
from rich.progress import MofNCompleteColumn, TextColumn

from deformux.cases import InvalidFolder, find_cases, label_names
from deformux.cli_support import ProgressBar


def deformux(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deformux.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_fit_predict_evaluate(write_case, tmp_path: Path) -> None:
    for i in range(3):
        write_case(f"case{i}", seed=i)
    model = tmp_path / "out" / "model.safetensors"
    options = ("--labels", "ball,box", "--patch-size", "32,32,16", "--validate", 1, "--seed", 3)
    done = deformux("fit", tmp_path, model, *options, "--set", "steps=4", "--set", "epochs=2", "--threads", 2)
    assert done.returncode == 0, done.stderr + done.stdout
    card = json.loads(model.with_suffix(".json").read_text())
    assert card["labels"] == ["ball", "box"]
    assert len(card["training_cases"]) == 2
    assert card["recipe"]["steps"] == 4
    assert card["network_options"] == {"guidance": True}
    assert list(card["validation"]["per_case"]) not in ([], card["training_cases"])

    done = deformux("predict", model, tmp_path / "images", tmp_path / "predicted")
    assert done.returncode == 0, done.stderr + done.stdout
    for name in ("case0", "case1", "case2"):
        result, scan = (nib.load(tmp_path / folder / f"{name}.nii.gz") for folder in ("predicted", "images"))
        assert result.shape == scan.shape
        np.testing.assert_allclose(result.affine, scan.affine, atol=1e-5)
        assert result.get_data_dtype() == np.uint8

    done = deformux("evaluate", model, tmp_path, "--csv", tmp_path / "scores.csv")
    assert done.returncode == 0, done.stderr + done.stdout
    assert "mean Dice" in done.stdout
    rows = list(csv.DictReader((tmp_path / "scores.csv").open()))
    for row in rows:
        a, b = (np.asarray(nib.load(tmp_path / f / f"{row['case']}.nii.gz").dataobj) for f in ("predicted", "labels"))
        for label, name in ((1, "ball"), (2, "box")):
            expected = 2 * ((a == label) & (b == label)).sum() / ((a == label).sum() + (b == label).sum())
            assert float(row[name]) == pytest.approx(expected, abs=1e-5)
    assert len(rows) == 3

    # One unreadable scan costs neither the other results nor a stack trace.
    (tmp_path / "images" / "broken.nii.gz").write_text("no image")
    done = deformux("predict", model, tmp_path / "images", tmp_path / "again")
    assert done.returncode == 1
    assert "broken.nii.gz cannot be read" in done.stdout.replace("\n", " ")
    assert "Traceback" not in done.stderr + done.stdout
    assert len(list((tmp_path / "again").iterdir())) == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("fit", "nowhere", "m.safetensors", "--labels", "a"), "nowhere must hold the folders images/ and labels/"),
        (("fit", ".", "m.safetensors"), "name the labels with --labels"),
        (("fit", ".", "m.safetensors", "--labels", "a", "--modality", "pet"), "modality must be one of ct, mr"),
        (("fit", ".", "m.safetensors", "--labels", "a", "--set", "stepz=1"), "images/"),
        (("predict", "nowhere.safetensors", ".", "out"), "there is no model file nowhere.safetensors"),
        (("evaluate", "brain", "."), "hippocampus"),
        (("evaluate", "hippocampus", ".", "--device", "gpu"), "device must be auto, cpu, cuda"),
    ],
)
def test_a_mistake_ends_in_one_sentence(
    arguments: tuple[str, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = deformux(*arguments)
    assert done.returncode == 2
    assert words in done.stdout
    assert "Traceback" not in done.stderr + done.stdout


def test_cases_are_paired_by_name(write_case, tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        write_case(name)
    (tmp_path / "labels" / "c.nii.gz").unlink()
    (tmp_path / "images" / "._a.nii.gz").write_text("made by a Mac")
    assert [case.id for case in find_cases(tmp_path)] == ["a", "b"]
    (tmp_path / "split.json").write_text(json.dumps({"train": ["a"], "val": ["b"]}))
    assert [case.id for case in find_cases(tmp_path, subset="val")] == ["b"]
    with pytest.raises(InvalidFolder, match="train, val"):
        find_cases(tmp_path, subset="test")


def test_label_names_come_from_a_decathlon_file(tmp_path: Path) -> None:
    assert label_names(tmp_path) is None
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "liver", "2": "tumour"}}))
    assert label_names(tmp_path) == ["liver", "tumour"]
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "2": "tumour"}}))
    with pytest.raises(InvalidFolder, match="without gaps"):
        label_names(tmp_path)


def test_the_shipped_hippocampus_model_reaches_its_number(shared_data: Path, tmp_path: Path) -> None:
    done = deformux(
        "evaluate",
        "hippocampus",
        shared_data / "hippocampus",
        "--subset",
        "val",
        "--csv",
        tmp_path / "s.csv",
        "--threads",
        2,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    rows = list(csv.DictReader((tmp_path / "s.csv").open()))
    assert len(rows) == 40
    assert np.mean([[float(row["anterior"]), float(row["posterior"])] for row in rows]) >= 0.885


@pytest.mark.parametrize(("line_seconds", "seen"), [(0.0, ["clicking 1/3", "clicking 2/3"]), (1000.0, [])])
def test_a_log_shows_progress_before_the_end(line_seconds: float, seen: list[str]) -> None:
    log = io.StringIO()
    columns = TextColumn("{task.description}"), MofNCompleteColumn()
    with ProgressBar(*columns, console=Console(file=log), line_seconds=line_seconds) as bar:
        task = bar.add_task("clicking", total=3)
        for _ in range(2):
            bar.update(task, advance=1)
        assert log.getvalue().split("\n")[:-1] == seen
        bar.update(task, advance=1)
    assert log.getvalue().count("clicking 3/3") == 1


def test_commands_are_silent_about_what_monai_does() -> None:
    done = deformux("--help")
    assert (done.returncode, done.stderr) == (0, "")
