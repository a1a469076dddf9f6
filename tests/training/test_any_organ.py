"""The benchmark of any organ: its baseline and its rules against others' numbers, its records, and a killed run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from benchmarks.common.report import read_data, read_section
from benchmarks.quality.any_organ_contenders import ABLATIONS, CONTENDERS, MAIN_CONTENDERS, PLAN, UNLABELLED
from benchmarks.quality.any_organ_deformux import Trained
from benchmarks.quality.any_organ_dynunet import DynUNetContender
from benchmarks.quality.any_organ_fixed import fixed_settings
from benchmarks.quality.any_organ_nnunet_plan import unet_plan
from benchmarks.quality.any_organ_page import any_organ_section
from benchmarks.quality.any_organ_records import OrganRecord, OrganRecords, OrganRun
from benchmarks.quality.any_organ_runs import ordered_runs
from benchmarks.quality.any_organ_scores import labels_on_grid, score_organ
from benchmarks.quality.any_organ_sets import DRAWN_SETS, ORGAN_SETS, TURNED_SETS, prepared_organ
from benchmarks.quality.any_organ_unet_patches import UNetPatches
from scipy import ndimage

SHAPE, SPACING = (40, 44, 8), (1.5, 1.5, 8.0)


@pytest.fixture
def hearts(tmp_path: Path) -> Path:
    """Return a folder of data with short hearts of two labels: four to train on, two to score."""
    folder = tmp_path / "data"
    for kind in ("images", "labels"):
        (folder / "heart_mr_acdc" / kind).mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = [f"c{number}" for number in range(6)]
    for name in names:
        centre = rng.integers(14, 26, 2)
        x, y = np.mgrid[: SHAPE[0], : SHAPE[1]]
        radius = np.hypot(x - centre[0], y - centre[1])
        label = np.zeros(SHAPE, np.uint8)
        # Sparse values, which the benchmark makes dense.
        label[radius < 9], label[radius < 5] = 7, 2
        image = (100 + 80 * (label == 2) + 40 * (label == 7) + rng.normal(0, 8, SHAPE)).astype(np.int16)
        affine = np.diag([-SPACING[0], -SPACING[1], SPACING[2], 1])
        for kind, values in (("images", image), ("labels", label)):
            nib.save(nib.Nifti1Image(values, affine), folder / "heart_mr_acdc" / kind / f"{name}.nii.gz")
    (folder / "heart_mr_acdc" / "split.json").write_text(json.dumps({"train": names[:4], "val": names[4:]}))
    (folder / "heart_mr_acdc" / "labels.json").write_text(json.dumps({"2": "left ventricle", "7": "myocardium"}))
    return folder


def test_a_set_is_dense_and_chosen_by_the_seed(hearts: Path, tmp_path: Path) -> None:
    chosen = [prepared_organ(ORGAN_SETS["heart-3"], hearts, tmp_path / "work", seed=seed) for seed in (0, 0, 1, 2)]
    assert chosen[0] == chosen[1]
    assert len({organ.train for organ in chosen}) > 1
    organ = chosen[0]
    assert organ.labels == ("left_ventricle", "myocardium")
    assert [case.id for case in organ.val] == ["c4", "c5"]
    assert {case.id for case in organ.train} < {"c0", "c1", "c2", "c3"}
    assert len(organ.scans) == 4
    for case in (*organ.train, *organ.val):
        stored = np.asarray(nib.load(hearts / "heart_mr_acdc" / "labels" / f"{case.id}.nii.gz").dataobj)
        assert np.array_equal(np.asarray(nib.load(case.label).dataobj), (stored == 2) + 2 * (stored == 7))


@pytest.mark.parametrize("name", TURNED_SETS)
def test_a_turned_set_has_the_same_voxels_and_other_angles(name: str, hearts: Path, tmp_path: Path) -> None:
    few = replace(TURNED_SETS[name], labelled=3)
    organ = prepared_organ(few, hearts, tmp_path / "work", seed=0)
    turns = []
    for case in (*organ.train, *organ.val):
        image, source = nib.load(case.image), nib.load(hearts / "heart_mr_acdc" / "images" / f"{case.id}.nii.gz")
        assert np.array_equal(np.asarray(image.dataobj), np.asarray(source.dataobj))
        assert np.allclose(nib.load(case.label).affine, image.affine, atol=1e-4)
        turn = image.affine[:3, :3] @ np.linalg.inv(source.affine[:3, :3])
        assert np.allclose(turn @ turn.T, np.eye(3), atol=1e-5), "it is a rotation"
        # The slices lie across the heart, far from axial ones.
        assert 30 < np.degrees(np.arccos(abs(turn[2, 2]))) < 85
        turns.append(turn)
    assert np.allclose(turns[0], turns[1], atol=1e-5) == (few.turn == "one")


def test_a_set_that_was_drawn_in_part_has_the_same_patients(hearts: Path, tmp_path: Path) -> None:
    whole, strokes, slices = (
        prepared_organ(replace(one, labelled=3), hearts, tmp_path / "work", seed=0) for one in DRAWN_SETS.values()
    )
    assert whole.val == strokes.val == slices.val
    for full, drawn, some in zip(whole.train, strokes.train, slices.train, strict=True):
        assert full.id == drawn.id == some.id
        assert drawn.label == hearts / "heart_mr_acdc" / "scribbles" / f"{full.id}.nii.gz"
        known, truth = (np.asarray(nib.load(case.label).dataobj) for case in (some, full))
        assert np.array_equal(known[:, :, ::3], truth[:, :, ::3])
        assert (np.delete(known, np.s_[::3], axis=2) == 255).all()


def test_the_baseline_is_what_the_demo_chose(hearts: Path, tmp_path: Path) -> None:
    organ = prepared_organ(ORGAN_SETS["heart-3"], hearts, tmp_path / "work", seed=0)
    settings = fixed_settings(organ.scans)
    assert settings.prep.to_dict() == {
        "modality": "mr",
        "spacing_mm": None,
        "patch_size": (48, 48, 16),
        "window_hu": (-175.0, 250.0),
        "percentiles": (0.5, 99.5),
    }
    assert settings.preset == "tiny"
    assert settings.strides is None
    assert settings.recipe.batch_size == 1
    # Of the recipe of that day, whose digest this is: the baseline must not follow the library.
    numbers = json.dumps(settings.recipe.in_steps(100, epochs=10).to_dict(), sort_keys=True)
    assert hashlib.sha256(numbers.encode()).hexdigest()[:16] == "af6214daf31db522"
    large = tmp_path / "large.nii.gz"
    values = np.random.default_rng(0).integers(0, 99, (256, 248, 12), np.int16)
    nib.save(nib.Nifti1Image(values, np.diag([1.25, 1.25, 8, 1])), large)
    # Numbers of `make demo` before there was a plan, for a scan above its budget of voxels.
    coarse = fixed_settings([large]).prep
    assert coarse.spacing_mm == (1.45, 1.45, 8.0)
    assert coarse.patch_size == (96, 96, 16)


# nnU-Net v2's planner, by its published rules, for well-known data: spacing, and strides of the 3D network.
@pytest.mark.parametrize(
    ("shape", "spacing", "patch", "strides"),
    [
        # Task04 hippocampus: 40×56×40, three halvings of all axes.
        ((36, 50, 35), (1.0, 1.0, 1.0), (40, 56, 40), ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2))),
        # Task05 prostate: 20×320×256 of 3.6×0.62×0.62 mm; slices are halved later than the plane.
        (
            (20, 320, 319),
            (3.6, 0.625, 0.625),
            (20, 320, 320),
            ((1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2), (1, 2, 2)),
        ),
    ],
)
def test_a_unet_is_planned_by_nnunets_rules(shape, spacing, patch, strides) -> None:
    plan = unet_plan([shape] * 30, [spacing] * 30, voxels=10**8)
    assert plan.spacing_mm == pytest.approx(spacing)
    assert plan.patch_size == patch
    assert plan.strides == strides
    assert plan.kernels[0] == ((1, 3, 3) if spacing[0] > 1 else (3, 3, 3))
    assert plan.kernels[-1] == (3, 3, 3)
    small = unet_plan([shape] * 30, [spacing] * 30, voxels=60_000)
    assert small.batch_size * np.prod(small.patch_size) <= 60_000
    assert small.batch_size >= 2


def test_slices_of_a_coarse_set_are_resampled_to_its_finest_tenth() -> None:
    spacings = [(1.0, 1.0, 8.0)] * 8 + [(1.0, 1.0, 4.0)] * 2
    assert unet_plan([(200, 200, 20)] * 10, spacings, voxels=10**7).spacing_mm == pytest.approx((1, 1, 4))


@pytest.mark.parametrize(("shape", "spacing", "flat"), [(SHAPE, SPACING, True), ((24, 28, 20), (2.0, 2.0, 2.0), False)])
def test_patches_of_a_unet_show_scan_and_label_at_the_same_place(shape, spacing, flat: bool) -> None:
    rng = np.random.default_rng(0)
    label = torch.as_tensor(ndimage.gaussian_filter(rng.normal(size=shape), 3) > 0.03)[None].float()
    plan = unet_plan([shape], [spacing], voxels=2 * 16 * 16 * 8)
    assert plan.flat == flat
    batches = iter(UNetPatches([(10 * label, label)], plan, seed=0))
    foreground = 0
    for _ in range(20):
        batch = next(batches)
        assert batch["image"].shape == batch["label"].shape == (plan.batch_size, 1, *plan.patch_size)
        for image, own in zip(batch["image"], batch["label"], strict=True):
            if 0 < own.mean() < 1:
                # However it was turned, scaled, mirrored and changed in contrast.
                assert image[own == 1].mean() > image[own == 0].mean() + 2
        foreground += int((batch["label"].flatten(1).mean(1) > 0).sum())
    assert foreground >= 20


def test_scores_need_no_exact_spacing_and_take_the_plane_of_thick_slices(hearts: Path, tmp_path: Path) -> None:
    organ = prepared_organ(ORGAN_SETS["heart-3"], hearts, tmp_path / "work", seed=0)
    truth = {case.id: np.asarray(nib.load(case.label).dataobj) for case in organ.val}

    def shifted(voxels: int, axis: int):
        return lambda case: np.roll(truth[case.id], voxels, axis)

    def surface(voxels: int, axis: int) -> np.ndarray:
        scores = score_organ(organ.val, shifted(voxels, axis), n_labels=3)
        assert all(own["dice"][2] is None for own in scores.values()), "a label in neither volume"
        return np.array([own["surface_dice"][:2] for own in scores.values()])

    # A voxel in the plane is within the tolerance, two are not.
    assert (surface(1, 0) > 0.99).all()
    assert (surface(3, 0) < 0.8).all()


def test_labels_of_a_file_are_brought_to_the_axes_of_the_scan(tmp_path: Path) -> None:
    values = np.arange(4 * 5 * 6).reshape(4, 5, 6).astype(np.uint8)
    affine = np.diag([-2.0, -2.0, 3.0, 1.0])
    scan, found = tmp_path / "scan.nii.gz", tmp_path / "found.nii.gz"
    nib.save(nib.Nifti1Image(values, affine), scan)
    nib.save(nib.as_closest_canonical(nib.Nifti1Image(values, affine)), found)
    assert np.array_equal(labels_on_grid(found, scan), values)


def test_a_dynunet_learns_within_its_seconds(hearts: Path, tmp_path: Path) -> None:
    organ = prepared_organ(ORGAN_SETS["heart-3"], hearts, tmp_path / "work", seed=0)
    peer = DynUNetContender(organ.scans, n_labels=2, voxels=8000, optimizer="adamw", seed=0, device="cpu")
    told: list[float] = []
    trained = peer.train(organ.train, seconds=3, tell=lambda _, part: told.append(part))
    assert isinstance(trained, Trained)
    assert trained.steps >= 1
    assert trained.seconds >= 3
    found = peer.segment_case(organ.val[0])
    assert found.shape == SHAPE
    assert found.dtype == np.uint8
    assert set(np.unique(found)) <= {0, 1, 2}


def test_both_sequences_of_a_case_are_learned_from(hearts: Path, tmp_path: Path) -> None:
    source, folder = hearts / "heart_mr_acdc", hearts / "brain_tumour_mr"
    (folder / "images").mkdir(parents=True)
    shutil.copytree(source / "labels", folder / "labels")
    (folder / "split.json").write_text((source / "split.json").read_text())
    for image in (source / "images").iterdir():
        for suffix in ("_0000", "_0001"):
            shutil.copy(image, folder / "images" / image.name.replace(".nii", f"{suffix}.nii"))
    organ = prepared_organ(ORGAN_SETS["brain-tumour-3"], hearts, tmp_path / "work", seed=0)
    assert organ.sequences == ("0000", "0001")
    assert [image.name for image in organ.val[0].images] == ["c4_0000.nii.gz", "c4_0001.nii.gz"]
    assert organ.labels == ("label_2", "label_7")
    options = {"n_labels": 2, "voxels": 8000, "optimizer": "sgd", "seed": 0, "device": "cpu"}
    peer = DynUNetContender(organ.scans, sequences=organ.sequences, **options)  # type: ignore[arg-type]
    assert peer.train(organ.train, seconds=0.1, tell=lambda *_: None).steps >= 1
    assert peer.network.in_channels == 2
    assert peer.segment_case(organ.val[0]).shape == SHAPE


def _record(dice: float, train: str = "a", **changes: object) -> OrganRecord:
    scores = {f"c{case}": {"dice": [dice, dice], "surface_dice": [dice / 2, None]} for case in range(2)}
    settings = {
        "preprocessing": {"spacing_mm": [1, 2, 3], "patch_size": [8, 8, 8], "frame": "acquisition"},
        "recipe": {"batch_size": 2},
        "strides": [[2, 2, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]],
    }
    values = {"scores": scores, "settings": settings, "machine": ("date: today",), **changes}
    return OrganRecord(100, 600.0, 2.0, 60.0, 5, ("x", "y"), (train,), **values)  # type: ignore[arg-type]


def test_the_most_informative_runs_come_first() -> None:
    runs = ordered_runs((*ORGAN_SETS, *TURNED_SETS, *DRAWN_SETS), CONTENDERS, seeds=3, minutes=10)
    first = [(run.organ, run.contender) for run in runs[: len(MAIN_CONTENDERS)]]
    assert first == [("heart-7", name) for name in MAIN_CONTENDERS]
    plain = len(ORGAN_SETS) * len(CONTENDERS) * 3
    assert len(runs) == len(set(runs)) == plain + (len(TURNED_SETS) + len(DRAWN_SETS)) * 2 * 3
    assert runs[-1].contender in ABLATIONS
    # A plan comes before everything that starts from it.
    for index, run in enumerate(runs):
        assert run.contender == PLAN or run.contender == "fixed" or replace(run, contender=PLAN) in runs[:index]


def test_records_are_merged_into_one_file_and_read_back(tmp_path: Path) -> None:
    runs = [OrganRun("heart-3", name, 0, 0.5) for name in ("plan", "fixed")]
    written = [_record(0.75), _record(0.5, scores={})]
    for run, record in zip(runs, written, strict=True):
        records = OrganRecords(tmp_path, tmp_path / "work")
        records.write(run, record)
        records.merge()
    assert not list((tmp_path / "work" / "finished").iterdir())
    found = OrganRecords(tmp_path, tmp_path / "work").all()
    assert found == {run.name: record for run, record in zip(runs, written, strict=True)}
    assert len(read_data(tmp_path, "any_organ")["machines"]) == 1


def test_the_page_compares_ranks_and_parts() -> None:
    scored = {"plan": 0.8, "fixed": 0.6, "dynunet": 0.5, "dynunet-adamw": 0.85, "monailabel": 0.1}
    scored |= {"plan-without-frame": 0.7}
    records = {
        OrganRun("heart-7", name, seed, 10).name: _record(dice + seed / 100, train=str(seed))
        for name, dice in scored.items()
        for seed in range(2)
    }
    records[OrganRun("heart-7", "plan-without-window", 0, 10).name] = _record(0, scores={})
    records[OrganRun("heart-7-turned-each", "plan", 0, 10).name] = _record(0.79)
    records[OrganRun("heart-20-strokes", UNLABELLED, 0, 10).name] = _record(0.77)
    runs = ordered_runs((*ORGAN_SETS, *TURNED_SETS, *DRAWN_SETS), CONTENDERS, seeds=2, minutes=10)
    section = any_organ_section(records, runs)
    text = "\n".join(section.lines)
    assert section.name == "any_organ_10_minutes"
    assert f"15 of {len(runs)} runs, **so far**" in text
    assert "| heart-7 | 0.805 ± 0.007 | 0.605 ± 0.007 | 0.505 ± 0.007 | 0.855 ± 0.007 | 0.105 ± 0.007 |" in text
    # The better of both optimizers is the peer's.
    assert "Mean rank over 1 sets: dynunet 1.00, plan 2.00, fixed 3.00, monailabel 4.00." in text
    assert "better than the fixed defaults on 1 of 1 sets, by at least 0.10 on 1" in text
    assert "| heart-7 | 0.705 ± 0.007 (-0.100) | = |" in text
    assert "| heart-7-turned-each | 0.790 |" in text
    assert "| heart-20-strokes | 0.770 (" in text
    assert "| heart-7 | heart_mr_acdc | 1 | 2 | 2 |" in text
    assert "| heart-7 | acquisition | 1 × 2 × 3 | 8×8×8 | 2 | 221 222 222 222 | 2 |" in text


# Each run imports everything again in its own process.
@pytest.mark.slow
def test_a_killed_benchmark_goes_on_with_what_is_missing(hearts: Path, tmp_path: Path, repository: Path) -> None:
    results = tmp_path / "results"
    command = [sys.executable, "-m", "benchmarks.quality.any_organ", "--data", hearts, "--work", tmp_path / "work"]
    command += ["--results", results, "--sets", "heart-3", "--seeds", "1", "--minutes", "0.02", "--threads", "1"]
    command += ["--contenders", "plan", "fixed", "dynunet", "plan-without-window", "plan-without-patch"]
    file = results / "data" / "any_organ.json"
    with (tmp_path / "log").open("w") as log:
        first = subprocess.Popen(command, cwd=repository, stdout=log, stderr=log, start_new_session=True)
        try:
            deadline = time.monotonic() + 600
            while not file.is_file():
                assert first.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.02)
        finally:
            os.killpg(first.pid, signal.SIGKILL)
            first.wait()
    kept = read_data(results, "any_organ")["records"]
    assert list(kept) == ["heart-3, plan, seed 0, 0.02 min on 1 threads"]
    again = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    data = read_data(results, "any_organ")["records"]
    assert len(data) == 5
    assert kept.items() <= data.items(), "it was trained again"
    plan = data["heart-3, plan, seed 0, 0.02 min on 1 threads"]
    assert plan["settings"]["plan"]["reasons"], "the plan is kept with its reasons"
    same = data["heart-3, plan-without-window, seed 0, 0.02 min on 1 threads"]
    assert same["settings"] == {"same_as": "plan"}
    other = data["heart-3, plan-without-patch, seed 0, 0.02 min on 1 threads"]
    assert other["settings"]["preprocessing"]["patch_size"] == [48, 48, 16]
    assert other["settings"]["plan"] == plan["settings"]["plan"]
    text = read_section(results, "any_organ", "any_organ_0.02_minutes")
    assert "5 of 5 runs, all" in text
    assert (results / "any_organ_0.02_minutes.png").stat().st_size > 0
    (results / "any_organ.md").unlink()
    report = subprocess.run([*command, "--report"], cwd=repository, capture_output=True, text=True, check=False)
    assert report.returncode == 0, report.stderr
    assert read_section(results, "any_organ", "any_organ_0.02_minutes") == text


@pytest.mark.slow
def test_an_unknown_set_or_no_minutes_is_one_sentence(repository: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.quality.any_organ", "--results", tmp_path, "--work", tmp_path]
    for options, words in ((["--sets", "lung"], "invalid choice: 'lung'"), (["--report"], "no records to report")):
        done = subprocess.run([*command, *options], cwd=repository, capture_output=True, text=True, check=False)
        assert done.returncode
        assert words in done.stderr
        assert "Traceback" not in done.stderr
