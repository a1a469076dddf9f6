"""The deformux command as a user runs it."""

import csv
import io
import json
import subprocess
import sys
import typing
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from rich.console import Console
from rich.progress import MofNCompleteColumn, TextColumn
from typer.testing import CliRunner

import preloaded
from deformux.cli.common import ProgressBar
from deformux.cli.main import app
from deformux.cli.versions import app as versions_app
from deformux.data.preprocessing import Preprocessing
from deformux.networks.deformux_net import DeformUXNet
from deformux.networks.model_file import ModelCard, save_model
from deformux.networks.pretrained import pretrained_path


def deformux(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deformux.cli.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_fit_predict_evaluate(write_case, tmp_path: Path) -> None:
    for i in range(3):
        write_case(f"case{i}", seed=i)
    model = tmp_path / "out" / "model.safetensors"
    options = ("--labels", "ball,box", "--patch-size", "32,32,16", "--validate", 1, "--seed", 3)
    done = preloaded.deformux("fit", tmp_path, model, *options, "--set", "steps=4", "--set", "epochs=2", "--threads", 2)
    assert done.returncode == 0, done.stderr + done.stdout
    card = json.loads(model.with_suffix(".json").read_text())
    assert card["labels"] == ["ball", "box"]
    assert len(card["training_cases"]) == 2
    assert card["recipe"]["steps"] == 4
    assert card["network_options"]["guidance"] is True
    assert card["plan"]["reasons"]["patch_size"] == "given"
    assert list(card["validation"]["per_case"]) not in ([], card["training_cases"])

    done = CliRunner().invoke(app, ["predict", str(model), str(tmp_path / "images"), str(tmp_path / "predicted")])
    assert done.exit_code == 0, done.output
    for name in ("case0", "case1", "case2"):
        result, scan = (nib.load(tmp_path / folder / f"{name}.nii.gz") for folder in ("predicted", "images"))
        assert result.shape == scan.shape
        np.testing.assert_allclose(result.affine, scan.affine, atol=1e-5)
        assert result.get_data_dtype() == np.uint8

    done = CliRunner().invoke(app, ["evaluate", str(model), str(tmp_path), "--csv", str(tmp_path / "scores.csv")])
    assert done.exit_code == 0, done.output
    assert "mean Dice" in done.output
    rows = list(csv.DictReader((tmp_path / "scores.csv").open()))
    for row in rows:
        a, b = (np.asarray(nib.load(tmp_path / f / f"{row['case']}.nii.gz").dataobj) for f in ("predicted", "labels"))
        for label, name in ((1, "ball"), (2, "box")):
            expected = 2 * ((a == label) & (b == label)).sum() / ((a == label).sum() + (b == label).sum())
            assert float(row[name]) == pytest.approx(expected, abs=1e-5)
    assert len(rows) == 3

    # An unreadable scan does not cost the other results, and prints no stack trace.
    (tmp_path / "images" / "broken.nii.gz").write_text("no image")
    done = preloaded.deformux("predict", model, tmp_path / "images", tmp_path / "again")
    assert done.returncode == 1
    assert "broken.nii.gz cannot be read" in done.stdout.replace("\n", " ")
    assert "Traceback" not in done.stderr + done.stdout
    assert len(list((tmp_path / "again").iterdir())) == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("fit", "nowhere", "m.safetensors", "--labels", "a"), "there is no folder nowhere"),
        (("fit", ".", "m.safetensors", "--labels", "a"), ". must hold the folders images/ and labels/"),
        (("fit", ".", "m.safetensors"), "name the labels with --labels"),
        (("fit", ".", "m.safetensors", "--labels", "a", "--modality", "pet"), "modality must be one of ct, mr"),
        (("fit", ".", "m.safetensors", "--labels", "a", "--set", "stepz=1"), "images/"),
        (("fit", ".", "m.safetensors", "--labels", "a,b,a"), "each label must have its own name; got 'a' twice"),
        (("fit", ".", "m.safetensors", "--labels", "a,,b"), "a comma-separated list of names without gaps; got 'a,,b'"),
        (("fit", ".", "m.safetensors", "--labels", "a, "), "a comma-separated list of names without gaps; got 'a, '"),
        (("fit", ".", "m.safetensors", "--labels", ","), "a comma-separated list of names without gaps; got ','"),
        (("simulate", "--data", ".", "--output", "o", "--labels", "a,a"), "each label must have its own name"),
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
    assert words in done.stdout.replace("\n", " ")
    assert "Traceback" not in done.stderr + done.stdout


_LABELLED = ("--labels", "ball,box", "--patch-size", "16,16,16")
_SHORT = ("--strategy", "random", "--rounds", "1", "--batch", "1", "--start", "2", "--seeds", "1", "--steps", "1")
# Every path that a command takes: the command with {} in its place, and the kind of path.
_PATHS = [
    (("fit", "{}", "new/m.safetensors", *_LABELLED), "data"),
    (("fit", "{}", "new/m.safetensors"), "data without labels"),
    (("fit", "cases", "{}", *_LABELLED), "new model"),
    (("fit", "cases", "new/m.safetensors", *_LABELLED, "--start-from", "{}"), "start"),
    (("predict", "{}", "cases/images", "new"), "model"),
    (("predict", "model.safetensors", "{}", "new"), "images"),
    (("predict", "model.safetensors", "cases/images", "{}"), "new folder"),
    (("predict-cluster", "{}", "cases/images", "new", "--cluster", "local"), "model"),
    (("predict-cluster", "model.safetensors", "{}", "new", "--cluster", "local"), "images"),
    (("predict-cluster", "model.safetensors", "cases/images", "{}", "--cluster", "local"), "new folder"),
    (("plan", "{}"), "planned data"),
    (("plan", "cases", "--json", "{}"), "new plan"),
    (("evaluate", "{}", "cases"), "model"),
    (("evaluate", "model.safetensors", "{}"), "data"),
    (("evaluate", "model.safetensors", "cases", "--csv", "{}"), "new file"),
    (("clicks", "{}", "--model", "model.safetensors"), "data"),
    (("clicks", "cases", "--model", "{}"), "model"),
    (("clicks", "cases", "--model", "model.safetensors", "--output", "{}"), "new folder"),
    (("simulate", "--data", "{}", "--output", "new", *_LABELLED, *_SHORT), "data"),
    (("simulate", "--data", "cases", "--output", "{}", *_LABELLED, *_SHORT), "new folder"),
    (("simulate", "--data", "cases", "--output", "new", *_LABELLED, *_SHORT, "--start-from", "{}"), "start"),
    *(
        (("versions", command, "{}", *name), "versions")
        for command, name in [("list", ()), ("rollback", ()), ("unpin", ()), ("pin", ())]
        + [(command, ("v0001",)) for command in ("show", "publish", "pin")]
    ),
]
_EMPTY_DATA = "empty must hold the folders images/ and labels/"
# Wrong paths of each kind: the path, and the words that blame it.
_WRONG = {
    "data": [
        ("nowhere", "there is no folder nowhere"),
        ("file.txt", "file.txt is a file; a folder is expected"),
        ("empty", _EMPTY_DATA),
        ("hollow", "hollow/labels holds no volume"),
    ],
    "data without labels": [
        ("nowhere", "there is no folder nowhere"),
        ("empty", "empty has no dataset.json: name the labels"),
        ("unreadable", "dataset.json cannot be read as JSON"),
    ],
    "planned data": [
        ("nowhere", "there is no folder nowhere"),
        ("file.txt", "file.txt is a file; a folder is expected"),
        ("empty", "empty holds no volume"),
    ],
    "new plan": [
        ("file.txt/p.json", "nothing can be written to file.txt: file.txt is a file, not a folder"),
        ("new/plan", "the name of new/plan must end in .json"),
    ],
    "images": [
        ("nowhere", "there is no folder nowhere"),
        ("empty", "empty holds no volume"),
    ],
    "model": [
        ("nowhere.safetensors", "there is no model file nowhere.safetensors"),
        ("folder/nowhere", "there is no model file folder/nowhere"),
        ("brain", "'brain' is neither a model file (.safetensors) nor a shipped model; these are"),
        ("./file.txt", "file.txt"),
        ("empty", "empty is a folder; name a model file"),
        ("bare.safetensors", "bare.safetensors needs its card bare.json beside it"),
        ("damaged.safetensors", "damaged.safetensors is damaged: its checksum is not the one in its card"),
        ("carded.safetensors", "carded.json is not a model card"),
    ],
    "start": [
        ("nowhere.safetensors", "there is no model file nowhere.safetensors"),
        ("brain", "'brain' is neither a model file (.safetensors) nor a shipped model; these are"),
        ("damaged.safetensors", "damaged.safetensors is damaged: its checksum is not the one in its card"),
    ],
    "new model": [
        ("file.txt/m.safetensors", "nothing can be written to file.txt: file.txt is a file, not a folder"),
        ("file.txt/a/m.safetensors", "nothing can be written to file.txt/a: file.txt is a file, not a folder"),
        ("new/model", "the name of new/model must end in .safetensors"),
        ("folder.safetensors", "folder.safetensors is a folder; name a file to write"),
    ],
    "new folder": [
        ("file.txt", "nothing can be written to file.txt: file.txt is a file, not a folder"),
        ("file.txt/a", "nothing can be written to file.txt/a: file.txt is a file, not a folder"),
    ],
    "new file": [
        ("file.txt/s.csv", "nothing can be written to file.txt: file.txt is a file, not a folder"),
        ("empty", "empty is a folder; name a file to write"),
    ],
    "versions": [
        ("nowhere", "there is no folder nowhere"),
        ("file.txt", "file.txt is a file; a folder is expected"),
        ("empty", "empty holds no versions"),
    ],
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make folders and files of every kind that a path may wrongly name."""
    folder = tmp_path_factory.mktemp("workspace")
    for name in ("empty", "hollow/images", "hollow/labels", "unreadable", "folder.safetensors"):
        (folder / name).mkdir(parents=True)
    (folder / "file.txt").write_text("no folder, and no model")
    (folder / "unreadable" / "dataset.json").write_text("{")
    for kind in ("images", "labels"):
        (folder / "cases" / kind).mkdir(parents=True)
        for number in range(8):
            voxels = np.arange(512, dtype=np.uint8).reshape(8, 8, 8) % 3
            nib.save(nib.Nifti1Image(voxels, np.eye(4)), folder / "cases" / kind / f"c{number}.nii.gz")
    network = DeformUXNet(1, 3, "tiny")
    card = ModelCard(labels=("ball", "box"), preprocessing=Preprocessing(patch_size=(16, 16, 16)), preset="tiny")
    for name in ("model", "bare", "damaged", "carded"):
        save_model(folder / f"{name}.safetensors", network, card)
    (folder / "bare.json").unlink()
    (folder / "carded.json").write_text("[]")
    with (folder / "damaged.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"?")
    return folder


@pytest.mark.parametrize(
    ("arguments", "path", "words"),
    [
        pytest.param(arguments, path, words, id=f"{kind} of {' '.join(arguments[:2])}: {path}")
        for arguments, kind in _PATHS
        for path, words in _WRONG[kind]
    ],
)
def test_the_error_names_the_wrong_path(
    arguments: tuple[str, ...], path: str, words: str, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workspace)
    before = sorted(workspace.rglob("*"))
    given = [argument.replace("{}", path) for argument in arguments]
    done = CliRunner().invoke(app, given, env={"COLUMNS": "300"})
    assert done.exit_code == 2, done.output
    *_, last = done.output.strip().splitlines()
    assert last.startswith("error: ")
    assert words in last
    made = set(workspace.rglob("*")) - set(before)
    assert all((workspace / "new") in (file, *file.parents) for file in made), made


def test_a_training_that_starts_from_a_model_keeps_what_nobody_gave(write_case, tmp_path: Path) -> None:
    write_case("case")
    model = tmp_path / "model.safetensors"
    options = ["--labels", "ball,box", "--start-from", "hippocampus", "--patch-size", "16,16,16", "--set", "steps=1"]
    done = CliRunner().invoke(app, ["fit", str(tmp_path), str(model), *options, "--set", "epochs=1"])
    assert done.exit_code == 0, done.output
    card, start = (
        json.loads(path.with_suffix(".json").read_text()) for path in (model, pretrained_path("hippocampus"))
    )
    assert card["parent"] == "hippocampus"
    # By the scans, which look like CT, it would have been planned otherwise.
    assert card["preprocessing"] == {**start["preprocessing"], "patch_size": [16, 16, 16]}
    assert card["preset"] == start["preset"]


def test_the_list_of_paths_is_complete() -> None:
    """The list holds every argument and option whose value is a path, or the name of a model file."""
    commands = {("",): app.registered_commands, ("versions",): versions_app.registered_commands}
    taken = [
        (*group, command.name or command.callback.__name__.replace("_command", ""), name)
        for group, registered in commands.items()
        for command in registered
        for name, hint in typing.get_type_hints(command.callback).items()
        if hint in (Path, Path | None) or name in ("model", "start_from")
    ]
    tested = {(*(a[:2] if a[0] == "versions" else ("", a[0])), kind) for a, kind in _PATHS if "without" not in kind}
    assert len(taken) == len(tested), (sorted(taken), sorted(tested))


@pytest.mark.parametrize("cases", [8, pytest.param(40, marks=pytest.mark.slow)])
def test_the_shipped_hippocampus_model_reaches_its_number(shared_data: Path, tmp_path: Path, cases: int) -> None:
    hippocampus = shared_data / "hippocampus"
    for kind in ("images", "labels"):
        (tmp_path / kind).symlink_to(hippocampus / kind)
    split = json.loads((hippocampus / "split.json").read_text())
    (tmp_path / "split.json").write_text(json.dumps({"val": split["val"][:cases]}))
    scores = ("--subset", "val", "--csv", str(tmp_path / "s.csv"))
    done = CliRunner().invoke(app, ["evaluate", "hippocampus", str(tmp_path), *scores])
    assert done.exit_code == 0, done.output
    rows = list(csv.DictReader((tmp_path / "s.csv").open()))
    assert len(rows) == cases
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


def test_slow_steps_have_a_time_left() -> None:
    """Segmenting a scan takes longer than the half minute over which rich otherwise takes its means."""
    clock = 0.0
    bar = ProgressBar(TextColumn("{task.description}"), console=Console(file=io.StringIO()), mean_over_s=float("inf"))
    bar.get_time = lambda: clock
    task = bar.add_task("segmenting", total=10)
    for _ in range(4):
        clock += 120
        bar.update(task, advance=1)
    assert bar.tasks[0].time_remaining == pytest.approx(6 * 120)


def test_commands_hide_monais_warnings() -> None:
    done = deformux("--help")
    assert (done.returncode, done.stderr) == (0, "")
