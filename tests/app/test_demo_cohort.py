"""Opening folders of real labelled data for the demo: layout, split, label names, modality, grids."""

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from rich.console import Console

from deformux.data.cases import InvalidFolder
from deformux_label.demo import teaching
from deformux_label.demo.cohort import open_cohort, synthetic_cohort
from deformux_label.demo.figures import DemoRound, read_scan
from deformux_label.demo.report import write_html
from deformux_label.demo.server_process import AnnotationClient, ServerProcess


def write_folder(folder: Path, *, names=("images", "labels"), values=(5, 9), shape=(12, 10, 8), low=-1000) -> Path:
    rng = np.random.default_rng(0)
    for number in range(4):
        label = np.zeros(shape, np.int16)
        for position, value in enumerate(values):
            label[position * 2 + 1] = value
        image = rng.integers(low, 200, shape).astype(np.int16)
        for kind, data in zip(names, (image, label), strict=True):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(data, np.diag([2.0, 2, 3, 1])), folder / kind / f"case_{number}.nii.gz")
    return folder


def test_hippocampus_uses_train_for_the_cohort_and_val_for_scoring_only(shared_data: Path) -> None:
    folder = shared_data / "hippocampus"
    cohort = open_cohort(folder, volumes=6, held_out=3, labels=("anterior", "posterior"))
    split = json.loads((folder / "split.json").read_text())
    assert {v.id for v in cohort.volumes} <= set(split["train"])
    assert {v.id for v in cohort.held_out} <= set(split["val"])
    assert (len(cohort.volumes), len(cohort.held_out)) == (6, 3)
    assert cohort.labels == ("anterior", "posterior")
    assert cohort.modality == "mr"
    assert (cohort.spacing, cohort.patch_size) == ("auto", "auto"), "the server plans them"
    truth = cohort.volumes[0].truth()
    np.testing.assert_array_equal(truth, np.asarray(nib.load(cohort.volumes[0].case.label).dataobj))


def test_choice_among_many_volumes_depends_on_the_seed_alone(shared_data: Path) -> None:
    first, again, other = (
        [v.id for v in open_cohort(shared_data / "hippocampus", volumes=6, seed=seed).volumes] for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_sparse_values_become_dense_and_get_names(tmp_path: Path) -> None:
    cohort = open_cohort(write_folder(tmp_path), volumes=3)
    assert cohort.labels == ("label_5", "label_9")
    assert len(cohort.volumes) == 3
    assert set(np.unique(cohort.volumes[0].truth())) == {0, 1, 2}
    assert cohort.modality == "ct"


def test_decathlon_layout_names_and_modality(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, names=("imagesTr", "labelsTr"), values=(1, 2), low=0)
    description = {"labels": {"0": "background", "1": "Left Kidney", "2": "spleen"}, "modality": {"0": "CT"}}
    (folder / "dataset.json").write_text(json.dumps(description))
    cohort = open_cohort(folder, volumes=16)
    assert cohort.labels == ("left_kidney", "spleen")
    assert cohort.modality == "ct"
    assert len(cohort.volumes) == 4


@pytest.mark.parametrize(
    ("low", "description", "expected"),
    [
        # As the server's plan decides: soft tissue alone is CT too, and a name that says nothing leaves it to values.
        (-90, {}, "ct"),
        (0, {}, "mr"),
        (-1000, {"channel_names": {"0": "T1"}}, "mr"),
        (-1000, {"modality": {"0": "contrast"}}, "ct"),
    ],
)
def test_modality_is_that_of_the_plan(
    tmp_path: Path, low: int, description: dict[str, dict[str, str]], expected: str
) -> None:
    folder = write_folder(tmp_path, low=low)
    (folder / "dataset.json").write_text(json.dumps(description))
    assert open_cohort(folder, volumes=4).modality == expected


def test_held_out_cases_of_several_sequences_are_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "data")
    for number in range(4):
        first = folder / "images" / f"case_{number}.nii.gz"
        shutil.copy(first, first.with_name(f"case_{number}_0001.nii.gz"))
        first.rename(first.with_name(f"case_{number}_0000.nii.gz"))
    (folder / "images" / "case_3_0000.nii.gz").unlink()
    split = {"train": ["case_0", "case_1"], "val": ["case_2", "case_3"]}
    (folder / "split.json").write_text(json.dumps(split))
    cohort = open_cohort(folder, volumes=4, held_out=2)
    assert [volume.id for volume in cohort.volumes] == split["train"]
    assert cohort.image_channels == "_0000=0000,_0001=0001"
    sent = {volume.id: [path.name for path in volume.sequences] for volume in cohort.held_out}
    assert sent == {"case_2": ["case_2_0000.nii.gz", "case_2_0001.nii.gz"], "case_3": ["case_3_0001.nii.gz"]}
    assert cohort.held_out[1].shape() == (12, 10, 8)
    uploaded: dict[str, list[str]] = {}

    class Knowing(AnnotationClient):
        """Answers with the true labels."""

        def info(self) -> dict[str, Any]:
            return {"strategies": {"first": {}}}

        def next_sample(self, strategy: str) -> str:
            return "case_0"

        def infer(self, model: str, image_id: str, *, files: Sequence[Path] = ()) -> Path:
            if files:
                uploaded[image_id] = [path.name for path in files]
            label = nib.load(folder / "labels" / f"{image_id}.nii.gz")
            dense = np.searchsorted([0, 5, 9], np.asarray(label.dataobj)).astype(np.uint8)
            nib.save(nib.Nifti1Image(dense, label.affine), tmp_path / f"{image_id}.nii.gz")
            return tmp_path / f"{image_id}.nii.gz"

        def submit(self, image_id: str, label: Path, labels: Sequence[str], *, model: str) -> None:
            pass

        def train(self, model: str, parameters: Mapping[str, Any], on_progress: Callable[[float], None]) -> None:
            pass

    monkeypatch.setattr(teaching, "AnnotationClient", Knowing)
    monkeypatch.setattr(ServerProcess, "start", lambda self: None)
    plan = teaching.DemoPlan(rounds=1, first=1, steps=1, strategy="first")
    rounds = teaching.run_demo(cohort, plan, {}, tmp_path / "demo", Console(quiet=True))
    assert rounds[-1].held_out_dice == 1
    assert uploaded == sent


def test_a_given_modality_wins(tmp_path: Path) -> None:
    assert open_cohort(write_folder(tmp_path), volumes=3, modality="mr").modality == "mr"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": ("a", "b", "c")}, "got 3 names, expected 2"),
        ({"volumes": 0}, "volumes: got 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(InvalidFolder, match=message):
        open_cohort(write_folder(tmp_path), **{"volumes": 4, **change})


def test_label_on_another_grid_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    nib.save(nib.Nifti1Image(np.ones((3, 3, 3), np.uint8), np.eye(4)), folder / "labels" / "case_1.nii.gz")
    with pytest.raises(InvalidFolder, match=r"case_1 cannot be used: image and label must lie on one grid"):
        open_cohort(folder, volumes=4)


@pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".NII"])
def test_every_format_that_the_server_reads(tmp_path: Path, suffix: str) -> None:
    folder = write_folder(tmp_path)
    for file in sorted(folder.glob("*/*.nii.gz")):
        image = sitk.ReadImage(str(file))
        file.unlink()
        plain = file.with_name(file.name.removesuffix(".nii.gz") + suffix.lower())
        sitk.WriteImage(image, str(plain))
        plain.rename(plain.with_suffix(suffix))
    cohort = open_cohort(folder, volumes=4)
    assert cohort.modality == "ct"
    assert len(cohort.volumes) == 4
    volume = cohort.volumes[0]
    assert volume.shape() == (12, 10, 8)
    # ITK stores left and posterior, so that these two axes are turned.
    np.testing.assert_allclose(np.abs(volume.affine()[:3, :3]), np.diag([2.0, 2, 3]))
    assert set(np.unique(volume.truth())) == {0, 1, 2}
    assert read_scan(volume.image).image.shape == (12, 10, 8)


def test_a_damaged_case_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    file = folder / "images" / "case_2.nii.gz"
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(InvalidFolder, match=r"case_2 cannot be used: case_2.nii.gz"):
        open_cohort(folder, volumes=4)


def test_synthetic_cohort_is_described_for_the_server(tmp_path: Path) -> None:
    cohort = synthetic_cohort(tmp_path / "cohort", volumes=2, seed=1, voxel_scale=2.5)
    assert cohort.labels == ("liver", "spleen", "kidneys", "vessels")
    assert cohort.modality == "ct"
    volume = cohort.volume("phantom_001")
    assert volume.truth().shape == volume.shape()
    assert volume.canonical_truth().sum() == volume.truth().sum()


def test_the_report_shows_any_name_and_a_dash_for_an_absent_dice(tmp_path: Path) -> None:
    finished = DemoRound(1, 3, 5, {"a<b": float("nan"), "left_kidney": 0.5}, 0.75, 0.25, 9.6, 4.0)
    (tmp_path / "curve.png").write_bytes(b"png")
    page = write_html(
        tmp_path / "report.html",
        title="R&D",
        rounds=[finished],
        labels=["a<b", "left_kidney"],
        pictures=[(tmp_path / "curve.png", 'a "curve"')],
        facts={"cohort": "<script>"},
    ).read_text(encoding="utf-8")
    assert "<h1>R&amp;D</h1>" in page
    heads = ["round", "labelled", "unlabelled", "mean Dice", "a&lt;b", "left kidney", "corrected by hand", "seconds"]
    assert re.findall("<th>(.*?)</th>", page) == heads
    assert re.findall("<td>(.*?)</td>", page) == ["1", "3", "5", "<b>0.750</b>", "–", "0.500", "25 %", "10"]
    assert 'src="data:image/png;base64,cG5n"' in page
    assert "<script>" not in page
