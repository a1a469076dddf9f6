"""The quality benchmarks: their numbers against formulas, and a run that is killed."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.common.networks import NETWORKS, OURS, build, gmac
from benchmarks.common.report import paired_p
from benchmarks.common.scores import compare
from benchmarks.common.trials import Result, Task, Trial
from benchmarks.quality.active_learning import labels_needed
from scipy import ndimage
from torch import nn

from deformux.data.preprocessing import Preprocessing
from deformux.fitting.recipe import Recipe


@pytest.mark.slow
def test_the_simulation_adds_seeds_to_its_results(write_case, tmp_path: Path, repository: Path) -> None:
    names = [write_case(f"c{number}", seed=number, size=(20, 20, 16)).id for number in range(8)]
    (tmp_path / "split.json").write_text(json.dumps({"train": names}))
    command = [sys.executable, "-m", "benchmarks.server.next_sample", "--data", tmp_path, "--work", tmp_path / "work"]
    command += ["--results", tmp_path / "simulated", "--strategies", "random,typicality", "--rounds", "2"]
    command += ["--start", "1", "--batch", "1", "--steps", "2", "--continue-steps", "2"]

    def play(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *options], cwd=repository, capture_output=True, text=True, check=False)

    for seeds in ("1", "2"):
        done = play("--seeds", seeds)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "seed 0 is in" in done.stdout
    with (tmp_path / "simulated.csv").open(newline="") as file:
        rows = [(row["strategy"], row["seed"], row["round"]) for row in csv.DictReader(file)]
    assert rows == [(s, seed, r) for s in ("random", "typicality") for seed in "01" for r in "01"]
    assert "2 seeds" in (tmp_path / "simulated.md").read_text()
    other = play("--steps", "3")
    assert other.returncode == 1
    assert "is of other settings" in other.stderr


def _equal_budget(folder: Path, *options: str) -> list[str | Path]:
    """The command that trains networks on the volumes of a folder, and keeps there what it makes."""
    command = [sys.executable, "-m", "benchmarks.quality.equal_budget", "--data", folder, "--work", folder / "work"]
    return [*command, "--results", folder / "results", "--threads", "1", "--sizes", "tiny", *options]


# Each trial imports everything anew in its own process.
@pytest.mark.slow
def test_a_killed_comparison_goes_on_after_the_last_finished_trial(
    write_case, tmp_path: Path, repository: Path
) -> None:
    names = [write_case(f"c{number}", seed=number, size=(20, 20, 16)).id for number in range(4)]
    (tmp_path / "split.json").write_text(json.dumps({"train": names[:2], "val": names[2:]}))
    work, results = tmp_path / "work", tmp_path / "results"
    command = _equal_budget(tmp_path, "--seeds", "1", "--steps", "2", "--networks", "UNETR", "UNet")
    with (tmp_path / "log").open("w") as log:
        first = subprocess.Popen(command, cwd=repository, stdout=log, stderr=log, start_new_session=True)
        try:
            deadline = time.monotonic() + 300
            while not list(work.glob("UNETR*.json")):
                assert first.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.02)
        finally:
            os.killpg(first.pid, signal.SIGKILL)
            first.wait()
    (kept,) = work.glob("UNETR*.json")
    written = kept.stat().st_mtime_ns
    again = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert kept.stat().st_mtime_ns == written, "it was trained again"
    text = (results / "quality_equal_steps.md").read_text()
    assert "2 of 2 trials, all" in text
    assert (results / "quality_equal_steps.png").stat().st_size > 0
    with (results / "quality_equal_steps.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["network"], row["case"]) for row in rows} == {(n, c) for n in ("UNETR", "UNet") for c in names[2:]}
    for network in ("UNETR", "UNet"):
        dice = [
            [float(row["dice_anterior"]), float(row["dice_posterior"])] for row in rows if row["network"] == network
        ]
        line = next(line for line in text.splitlines() if line.startswith(f"| {network} |"))
        shown = [float(cell) for cell in line.split("|")[8:11]]
        assert shown == pytest.approx([*np.mean(dice, axis=0), np.mean(dice)], abs=2e-4)


@pytest.mark.slow
def test_trainings_at_a_time_have_as_many_steps_as_each_other(write_case, tmp_path: Path, repository: Path) -> None:
    names = [write_case(f"c{number}", seed=number, size=(20, 20, 16)).id for number in range(4)]
    (tmp_path / "split.json").write_text(json.dumps({"train": names[:2], "val": names[2:]}))
    command = _equal_budget(tmp_path, "--seeds", "2", "--networks", "UNETR", "--jobs", "2")
    command += ["--budget", "seconds", "--seconds", "2"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / "results" / "quality_equal_2_seconds.md").read_text()
    assert "2 of 2 trials, all" in text
    assert "up to 2 trainings at a time" in text
    (timed,) = (tmp_path / "work" / "steps").glob("*.txt")
    with (tmp_path / "results" / "quality_equal_2_seconds.csv").open(newline="") as file:
        assert {(row["seed"], row["steps"]) for row in csv.DictReader(file)} == {(s, timed.read_text()) for s in "01"}


@pytest.mark.slow
def test_the_first_training_says_already_how_long_it_will_take(write_case, tmp_path: Path, repository: Path) -> None:
    names = [write_case(f"c{number}", seed=number, size=(20, 20, 16)).id for number in range(2)]
    (tmp_path / "split.json").write_text(json.dumps({"train": names[:1], "val": names[1:]}))
    command = _equal_budget(tmp_path, "--seeds", "1", "--networks", "UNet", "--steps", "40")
    terminal = {**os.environ, "FORCE_COLOR": "1", "COLUMNS": "200"}
    done = subprocess.run(command, cwd=repository, env=terminal, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", done.stdout)
    assert re.search(r"training, step \d+ of 40 .* 0/1 .* about 0:\d\d:\d\d left", shown)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_one_sentence(write_case, tmp_path: Path, repository: Path) -> None:
    names = [write_case(f"c{number}", seed=number, size=(20, 20, 16)).id for number in range(2)]
    (tmp_path / "split.json").write_text(json.dumps({"train": names[:1], "val": names[1:]}))
    command = [sys.executable, "-m", "benchmarks.quality.ablations", "--data", tmp_path, "--work", tmp_path / "work"]
    command += ["--results", tmp_path / "results", "--device", "cuda", "--jobs", "2"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.endswith("error: this machine has no usable CUDA device; use --device cpu\n")
    assert "Traceback" not in done.stderr


def test_scores_are_those_of_the_definitions() -> None:
    rng = np.random.default_rng(0)
    spacing = (1.0, 0.7, 2.5)
    found, truth = (
        (ndimage.gaussian_filter(rng.normal(size=(24, 20, 12)), 2) > 0.03).astype(np.uint8) for _ in range(2)
    )
    found[found == 0] = 2 * (rng.random((found == 0).sum()) > 0.99)  # a label that is found where there is none
    scores = compare(found, truth, 3, spacing)
    a, b = found == 1, truth == 1
    assert scores["dice"][0] == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()))
    there, back = _surface_distances(a, b, spacing), _surface_distances(b, a, spacing)
    assert scores["hd95_mm"][0] == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)), rel=1e-5)
    near = (there <= 1).sum() + (back <= 1).sum()
    assert scores["surface_dice"][0] == pytest.approx(near / (len(there) + len(back)), rel=1e-5)
    diagonal = np.sqrt((24 * 1.0) ** 2 + (20 * 0.7) ** 2 + (12 * 2.5) ** 2)
    assert [scores[metric][1] for metric in ("dice", "surface_dice", "hd95_mm")] == [0, 0, pytest.approx(diagonal)]
    assert [scores[metric][2] for metric in ("dice", "surface_dice", "hd95_mm")] == [None] * 3


def _surface_distances(one: np.ndarray, other: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """From each surface voxel of one mask to the nearest of the other, in mm."""
    edges = [mask & ~ndimage.binary_erosion(mask) for mask in (one, other)]
    return ndimage.distance_transform_edt(~edges[1], sampling=spacing)[edges[0]]


def test_costs_are_those_that_were_counted_by_hand() -> None:
    assert gmac(nn.Conv3d(2, 4, 3, padding=1), (1, 2, 8, 9, 10)) == pytest.approx(8 * 9 * 10 * 27 * 2 * 4 / 1e9)
    # 582 and 3.0 for the interpolation are the project's own count of the published model (14 classes, 96³).
    published = build(OURS, "base", classes=14, patch=(96, 96, 96))
    assert gmac(published, (1, 1, 96, 96, 96)) == pytest.approx(585, abs=0.5)
    for name in NETWORKS:
        network = build(name, "tiny", classes=3, patch=(48, 64, 48))
        assert sum(p.numel() for p in network.parameters()) == pytest.approx(6.2e6, rel=0.36), name


def test_the_signed_rank_test_pairs_cases() -> None:
    def result(dice: list[float], seed: int) -> Result:
        task = Task(("a",), Preprocessing(), Recipe(), (), ())
        scores = {f"c{i}": {"dice": [value]} for i, value in enumerate(dice)}
        return Result(Trial("t", task, seed=seed), scores, 0, 0, 0, 0, None, 0, ())

    ours = [result([0.5, 0.6, 0.7, 0.8, 0.9, 0.99], seed) for seed in range(2)]
    # Better in each case by the mean over seeds, though not by each seed.
    peer = [result([0.49, 0.58, 0.67, 0.76, 0.85, 0.93], 0), result([0.5, 0.6, 0.7, 0.8, 0.9, 0.991], 1)]
    assert paired_p(ours, peer) == pytest.approx(2 / 2**6)
    assert paired_p(ours, ours) is None
    assert paired_p([result([0.5] * 5, 0)], [result([0.4] * 5, 0)]) is None, "five pairs can show nothing"


def test_labels_needed_lie_on_the_line_between_two_rounds() -> None:
    curve = [(5, 0.5), (10, 0.7), (15, 0.6), (20, 0.9)]
    assert labels_needed(curve, 0.6) == pytest.approx(7.5)
    assert labels_needed(curve, 0.8) == pytest.approx(15 + 5 * 2 / 3)
    assert labels_needed(curve, 0.4) == 5
    assert labels_needed(curve, 0.95) is None
