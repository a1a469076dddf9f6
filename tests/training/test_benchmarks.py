"""The quality benchmarks: their numbers against formulas, their files, and a run that is killed."""

from __future__ import annotations

import argparse
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
from benchmarks.common.report import Section, markdown_table, measure_and_write, read_data, read_section, write_section
from benchmarks.common.scores import score_volume
from benchmarks.common.simulated_rounds import from_rows, read_simulation, to_rows
from benchmarks.common.trial_data import TrialData
from benchmarks.common.trial_report import paired_p
from benchmarks.common.trials import Result, Task, Trial
from benchmarks.quality.labels_needed import labels_needed
from scipy import ndimage
from torch import nn

from deformux.active_learning.learning_curve import SimulatedRound
from deformux.data.preprocessing import Preprocessing
from deformux.fitting.recipe import Recipe


@pytest.mark.slow
def test_the_simulation_adds_seeds_to_its_results(write_case, tmp_path: Path, repository: Path) -> None:
    names = [write_case(f"c{number}", seed=number, size=(20, 20, 16)).id for number in range(8)]
    (tmp_path / "split.json").write_text(json.dumps({"train": names}))
    command = [sys.executable, "-m", "benchmarks.quality.strategies", "--data", tmp_path, "--work", tmp_path / "work"]
    command += ["--results", tmp_path / "results", "--strategies", "random,typicality", "--rounds", "2"]
    command += ["--start", "1", "--batch", "1", "--steps", "2", "--continue-steps", "2"]

    def play(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *options], cwd=repository, capture_output=True, text=True, check=False)

    for seeds in ("1", "2"):
        done = play("--seeds", seeds)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "seed 0 is in" in done.stdout
    rounds = read_simulation(tmp_path / "results" / "data" / "strategies.json")
    rows = [(row.strategy, row.seed, row.round, len(row.labelled)) for row in rounds]
    assert rows == [(s, seed, r, 1 + r) for s in ("random", "typicality") for seed in range(2) for r in range(2)]
    assert "2 seeds" in (tmp_path / "results" / "active_learning.md").read_text()
    other = play("--steps", "3")
    assert other.returncode == 1
    assert "is of other settings" in other.stderr


def _equal_budget(folder: Path, *options: str) -> list[str | Path]:
    """Return the command that trains networks on the volumes of a folder and keeps its files there."""
    command = [sys.executable, "-m", "benchmarks.quality.equal_budget", "--data", folder, "--work", folder / "work"]
    return [*command, "--results", folder / "results", "--threads", "1", "--sizes", "tiny", *options]


# Each trial imports everything again in its own process.
@pytest.mark.slow
def test_a_killed_comparison_goes_on_after_the_last_finished_trial(
    write_case, tmp_path: Path, repository: Path
) -> None:
    names = [write_case(f"c{number}", seed=number, size=(20, 20, 16)).id for number in range(4)]
    (tmp_path / "split.json").write_text(json.dumps({"train": names[:2], "val": names[2:]}))
    results = tmp_path / "results"
    file = results / "data" / "equal_budget.json"
    command = _equal_budget(tmp_path, "--seeds", "1", "--steps", "2", "--networks", "UNETR", "UNet")
    with (tmp_path / "log").open("w") as log:
        first = subprocess.Popen(command, cwd=repository, stdout=log, stderr=log, start_new_session=True)
        try:
            deadline = time.monotonic() + 300
            while not file.is_file():
                assert first.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.02)
        finally:
            os.killpg(first.pid, signal.SIGKILL)
            first.wait()
    kept = read_data(results, "equal_budget")["trials"]
    assert [name.partition("-")[0] for name in kept] == ["UNETR"]
    again = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    data = read_data(results, "equal_budget")
    # Seconds, to microseconds, are those of the first training.
    assert kept.items() <= data["trials"].items(), "it was trained again"
    text = read_section(results, "comparison", "quality_equal_steps")
    assert "2 of 2 trials, all" in text
    assert (results / "quality_equal_steps.png").stat().st_size > 0
    assert data["cases"] == [names[2:]]
    for network in ("UNETR", "UNet"):
        (dice,) = [trial["dice"] for name, trial in data["trials"].items() if name.startswith(f"{network}-")]
        assert len(dice) == 2
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
    text = read_section(tmp_path / "results", "comparison", "quality_equal_2_seconds")
    assert "2 of 2 trials, all" in text
    assert "up to 2 trainings at a time" in text
    (timed,) = (tmp_path / "work" / "steps").glob("*.txt")
    trials = read_data(tmp_path / "results", "equal_budget")["trials"]
    steps = {name.split("-seed-")[1][0]: trial["steps"] for name, trial in trials.items()}
    assert steps == dict.fromkeys("01", int(timed.read_text()))


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
    scores = score_volume(found, truth, 3, spacing)
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


def test_a_section_is_replaced_and_others_stay(tmp_path: Path) -> None:
    def write(name: str, *lines: str) -> None:
        write_section(tmp_path, Section("clicks", name, f"Title of {name}", lines))

    write("first", "old", "", "### part")
    write("second", "kept")
    before = (tmp_path / "clicks.md").read_text()
    write("first", "new")
    page = (tmp_path / "clicks.md").read_text()
    assert page == before.replace("old\n\n### part", "new")
    assert page.startswith("# What clicks gain\n")
    assert read_section(tmp_path, "clicks", "second") == "## Title of second\n\nkept\n"
    assert page.index("Title of first") < page.index("Title of second")


def test_a_section_is_written_again_from_its_data(tmp_path: Path) -> None:
    def section(data) -> Section:
        return Section("server", "load", "Load", markdown_table(("", "seconds"), [(k, v) for k, v in data["rows"]]))

    arguments = argparse.Namespace(results=tmp_path, rewrite=False)
    measure_and_write(arguments, "load", lambda: {"rows": (("a", "1.50"), ("b", ""))}, section)
    written = (tmp_path / "server.md").read_text()
    assert "|  | seconds |" in written
    assert "| a | 1.50 |\n| b |  |\n" in written
    (tmp_path / "server.md").unlink()
    measure_and_write(argparse.Namespace(results=tmp_path, rewrite=True), "load", pytest.fail, section)
    assert (tmp_path / "server.md").read_text() == written


def test_results_are_merged_into_one_file_and_read_back(tmp_path: Path) -> None:
    task = Task(("a", "b"), Preprocessing(), Recipe(), (), ())
    trials = [Trial(f"t{seed}", task, seed=seed) for seed in range(3)]
    scores = {f"c{i}": {m: [i / 7, None] for m in ("dice", "surface_dice", "hd95_mm")} for i in range(2)}
    work, finished = tmp_path / "work", tmp_path / "work" / "finished"
    finished.mkdir(parents=True)
    values = {"parameters": 5, "gmac": 1 / 3, "steps": 7, "seconds": 1e4 / 3, "seconds_per_step": None, "peak_gb": 0.5}
    data = TrialData(tmp_path, "benchmark", work)
    for trial in trials[:2]:
        content = {**values, "scores": scores, "machine": ["date: today"]}
        (finished / f"{trial.name}.json").write_text(json.dumps(content))
        # A second run, which shares the work, merges what it finds.
        TrialData(tmp_path, "benchmark", work).merge()
    assert not list(finished.iterdir())
    assert [trial in data for trial in trials] == [True, True, False]
    results = data.of(trials)
    assert [result.trial for result in results] == trials[:2]
    for result in results:
        assert result.machine == ("date: today",)
        assert result.seconds == pytest.approx(1e4 / 3, rel=1e-6)
        assert result.seconds_per_step is None
        assert result.per_case("dice") == pytest.approx(np.array([[0, np.nan], [1 / 7, np.nan]]), rel=1e-6, nan_ok=True)
    stored = read_data(tmp_path, "benchmark")
    assert stored["machines"] == [["date: today"]]
    assert stored["cases"] == [["c0", "c1"]]


def test_each_volume_of_a_simulation_is_stored_once() -> None:
    curves = [("random", 0, ("a", "b")), ("random", 1, ("c",)), ("typicality", 0, ("b",))]
    rounds = [
        SimulatedRound(strategy, seed, number, (*start, *"xyz"[:number]), 0.5 + number / 8, (0.25, 0.75), 1.5)
        for strategy, seed, start in curves
        for number in range(3)
    ]
    rows = to_rows(rounds)
    assert [row["added"] for row in rows[:3]] == [("a", "b"), ("x",), ("y",)]
    assert from_rows(json.loads(json.dumps(rows))) == rounds


def test_subpackages_import_only_common_and_themselves(repository: Path) -> None:
    folder = repository / "benchmarks"
    subpackages = {path.parent.name for path in folder.glob("*/__init__.py")}
    assert subpackages == {"common", "operator", "server", "quality"}
    for file in folder.glob("*/*.py"):
        imported = set(re.findall(r"^\s*(?:from|import) benchmarks\.(\w+)", file.read_text(), re.MULTILINE))
        assert imported <= {"common", file.parent.name}, file
        assert not re.search(r"^\s*from benchmarks import", file.read_text(), re.MULTILINE), file
