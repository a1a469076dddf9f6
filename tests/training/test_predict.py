"""Output of ``deformux predict``: a result for each scan, and a note on scans with non-finite voxels."""

from pathlib import Path

import nibabel as nib
import nrrd
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from deformux.cli.main import app
from deformux.data.cases import result_names
from deformux.data.preprocessing import Preprocessing
from deformux.networks.deformux_net import DeformUXNet
from deformux.networks.model_file import ModelCard, save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    card = ModelCard(labels=("ball",), preprocessing=Preprocessing(patch_size=(16, 16, 16)), preset="tiny")
    save_model(path, DeformUXNet(1, 2, "tiny"), card)
    return path


def _scan(path: Path, shape: tuple[int, int, int], *, without_intensity: int = 0) -> None:
    path.parent.mkdir(exist_ok=True)
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    values.reshape(-1)[:without_intensity] = np.nan
    if path.suffix == ".nrrd":
        nrrd.write(str(path), values)
        return
    written = path.parent / path.name.lower()
    nib.save(nib.Nifti1Image(values, np.eye(4)), written)
    written.rename(path)


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "300"})


def test_every_scan_gets_its_own_result(model: Path, tmp_path: Path) -> None:
    scans, output = tmp_path / "scans", tmp_path / "out"
    # Different patients, told apart by their shapes.
    _scan(scans / "one.NII.GZ", (8, 9, 10))
    _scan(scans / "one.nii.gz", (9, 9, 10))
    _scan(scans / "two.nii.gz", (10, 9, 10))
    _scan(scans / "two.nrrd", (11, 9, 10))
    _scan(scans / "two.nrrd.nii", (12, 9, 10))
    done = _run("predict", model, scans, output)
    assert done.exit_code == 0, done.output
    assert {path.name: nib.load(path).shape[0] for path in output.iterdir()} == {
        "one.nii.gz": 8,
        "one.nii.gz.nii.gz": 9,
        "two.nii.gz": 10,
        "two.nrrd.nii.gz": 11,
        "two.nrrd.nii.nii.gz": 12,
    }
    assert "5 of 5 volumes written" in done.output
    assert "two.nrrd is written as two.nrrd.nii.gz: two.nii.gz is for two.nii.gz" in done.output


def test_a_result_never_takes_the_name_of_another() -> None:
    given = ["a.nii", "a.nii.gz", "a.nii.nii.gz", "a.nii-2.mha", "b.NRRD"]
    assert result_names([Path("scans") / name for name in given]) == ["a", "a.nii.gz", "a.nii", "a.nii-2", "b"]
    assert result_names([Path("a.mha"), Path("a.mha.nii"), Path("a.nrrd")]) == ["a", "a.mha", "a.nrrd"]
    crowded = [Path(name) for name in ("a.mha", "a.nii.mha", "a.nii", "a.nii.nrrd")]
    assert result_names(crowded) == ["a", "a.nii", "a.nii-2", "a.nii.nrrd"]


def test_a_scan_with_nan_is_named(model: Path, write_case, tmp_path: Path) -> None:
    write_case("whole", size=(16, 16, 16))
    case = write_case("torn", size=(16, 16, 16))
    scan = nib.load(case.image)
    values = scan.get_fdata(dtype=np.float32)
    values[0, 0, :3] = (np.nan, np.inf, np.nan)
    nib.save(nib.Nifti1Image(values, scan.affine), case.image)
    nib.save(nib.Nifti1Image((np.asarray(nib.load(case.label).dataobj) == 1).astype(np.uint8), scan.affine), case.label)
    whole = tmp_path / "labels" / "whole.nii.gz"
    whole.write_bytes(case.label.read_bytes())
    for command in (("predict", model, tmp_path / "images", tmp_path / "out"), ("evaluate", model, tmp_path)):
        done = _run(*command)
        assert done.exit_code == 0, done.output
        lines = [line for line in done.output.splitlines() if "NaN" in line]
        assert lines == ["torn.nii.gz: 3 voxels are NaN or infinite and treated as its lowest intensity"]


def test_bad_cases_do_not_end_a_scoring(model: Path, write_case, tmp_path: Path) -> None:
    cases = [write_case(name, seed=seed, size=(16, 16, 16)) for seed, name in enumerate(("a", "b", "c", "d"))]
    for case in cases:
        label = nib.load(case.label)
        ball = (np.asarray(label.dataobj) == 1).astype(np.uint8)
        nib.save(nib.Nifti1Image(ball, label.affine), case.label)
    cases[0].image.write_text("no image")
    nib.save(nib.Nifti1Image(np.full((16, 16, 16), 7, np.uint8), np.diag([2.0, 2.0, 3.0, 1.0])), cases[2].label)
    done = _run("evaluate", model, tmp_path, "--csv", tmp_path / "scores.csv")
    assert done.exit_code == 1, done.output
    lines = [line for line in done.output.splitlines() if line.startswith("skipped: ")]
    assert len(lines) == 2
    assert lines[0].startswith("skipped: a: a.nii.gz cannot be read")
    assert lines[1].startswith("skipped: c: label c.nii.gz")
    assert "on 2 volumes" in done.output
    assert [row.split(",")[0] for row in (tmp_path / "scores.csv").read_text().splitlines()] == ["case", "b", "d"]


def test_no_scan_is_replaced_by_its_own_result(model: Path, tmp_path: Path) -> None:
    scan = tmp_path / "scans" / "one.nii.gz"
    _scan(scan.with_name("one.NII.GZ"), (9, 9, 10))
    _scan(scan, (8, 9, 10))
    before = scan.read_bytes()
    (tmp_path / "link").symlink_to(scan.parent)
    for images, output in ((scan.parent, scan.parent), (scan, scan.parent), (scan, tmp_path / "link")):
        done = _run("predict", model, images, output)
        assert done.exit_code == 2, done.output
        assert "would replace the scan" in done.output
    assert scan.read_bytes() == before
