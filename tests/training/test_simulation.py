"""Simulated active learning: measurements, their pairing, and that no finished one is lost."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result
from scipy import stats
from typer.testing import CliRunner

from deformux.active_learning.learning_curve import (
    SimulatedRound,
    area_under_budget_curve,
    paired_difference,
    read_rounds,
    summarise_curves,
    write_rounds,
)
from deformux.active_learning.simulation import SimulationPlan, held_out, simulate
from deformux.active_learning.strategies import STRATEGIES
from deformux.cli.main import app
from deformux.cli.simulate_options import short_recipe
from deformux.data.cases import find_cases
from deformux.data.preprocessing import Preprocessing
from deformux.data.synthetic import write_cohort
from deformux.fitting.recipe import Recipe
from preloaded import start_deformux

# float32 repeats bit for bit.
OPTIONS = ["--patch-size", "16,16,16", "--spacing", "20,20,22", "--steps", "2", "--rounds", "2", "--batch", "2"]
OPTIONS += ["--start", "2", "--set", "mixed_precision=false", "--set", "flip_axes=0,", "--threads", "1"]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cohort(tmp_path_factory.mktemp("cohort"), volumes=10, voxel_scale=4.0)


def arguments(cohort: Path, output: Path, *options: str) -> list[str]:
    return ["simulate", "--data", str(cohort), "--output", str(output), *OPTIONS, *options]


def run(cohort: Path, output: Path, *options: str) -> Result:
    threads = torch.get_num_threads()
    try:
        return CliRunner().invoke(app, arguments(cohort, output, *options), env={"COLUMNS": "200"})
    finally:
        torch.set_num_threads(threads)


def kept(output: Path) -> dict[str, int]:
    """Return when each finished measurement was written; hidden files are interrupted writes."""
    found = (output / "measurements").glob("[!.]*.json")
    return {path.name: path.stat().st_mtime_ns for path in found}


def rows(output: Path) -> list[dict[str, str]]:
    """Return the table without what may differ between two runs."""
    with (output / "rounds.csv").open(newline="") as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def whole(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole")
    done = run(cohort, output, "--strategy", "all", "--seeds", "1")
    assert done.exit_code == 0, done.output
    return output


def test_every_strategy_labels_growing_sets_and_never_test_cases(cohort: Path, whole: Path) -> None:
    table = rows(whole)
    assert len(table) == len(STRATEGIES) * 2
    ids = sorted((case.id for case in find_cases(cohort)), key=lambda name: hashlib.sha256(name.encode()).digest())
    test = set(ids[:2])  # a quarter of ten, by hash
    for strategy in STRATEGIES:
        first, second = ([*row["cases"].split()] for row in table if row["strategy"] == strategy)
        assert [len(set(first)), len(set(second))] == [2, 4]
        assert second[:2] == first
        assert not test & {*second}
    # Strategies without a cold start of their own begin with the same volumes, and the same set gives the same Dice.
    start = {row["strategy"]: row for row in table if row["round"] == "0"}
    assert len({start[name]["cases"] for name in ("random", "uncertainty", "entropy", "bald", "stochastic_batch")}) == 1
    assert start["adaptive"]["cases"] == start["typicality"]["cases"]
    by_set: dict[frozenset[str], set[str]] = {}
    for row in table:
        by_set.setdefault(frozenset(row["cases"].split()), set()).add(row["mean_dice"])
    assert all(len(dice) == 1 for dice in by_set.values())
    assert (whole / "curves.png").read_bytes().startswith(b"\x89PNG")
    for row in table:
        per_label = [float(row[f"dice_{name}"]) for name in ("liver", "spleen", "kidneys", "vessels")]
        assert float(row["mean_dice"]) == pytest.approx(np.nanmean(per_label), abs=1e-5)


def test_a_table_that_is_read_and_written_again_stays_the_same(whole: Path, tmp_path: Path) -> None:
    table = whole / "rounds.csv"
    write_rounds(tmp_path / "again.csv", read_rounds(table), ("liver", "spleen", "kidneys", "vessels"))
    assert (tmp_path / "again.csv").read_bytes() == table.read_bytes()
    assert read_rounds(tmp_path / "none.csv") == []


def test_the_summary_is_that_of_the_rounds(whole: Path) -> None:
    with (whole / "summary.csv").open(newline="") as file:
        summary = {row["strategy"]: row for row in csv.DictReader(file)}
    table = rows(whole)
    for strategy in STRATEGIES:
        dice = [float(row["mean_dice"]) for row in table if row["strategy"] == strategy]
        reference = [float(row["mean_dice"]) for row in table if row["strategy"] == "random"]
        # Two rounds: the area is their mean.
        assert float(summary[strategy]["area"]) == pytest.approx(np.mean(dice), abs=2e-6)
        if strategy != "random":
            difference = np.mean(dice) - np.mean(reference)
            assert float(summary[strategy]["difference"]) == pytest.approx(difference, abs=2e-6)


def test_trainings_continue_the_round_before_on_request(cohort: Path, tmp_path: Path) -> None:
    recipe = short_recipe(2).replace(mixed_precision=False, foreground_ratio=1.0)
    pool, test = held_out(find_cases(cohort), 0.25)

    def dice(folder: str, continue_recipe: Recipe | None) -> list[float]:
        plan = SimulationPlan(
            strategies=("random",),
            rounds=3,
            batch=1,
            start=2,
            seeds=(0,),
            recipe=recipe,
            prep=Preprocessing("ct", spacing_mm=(20.0, 20.0, 22.0), patch_size=(16, 16, 16)),
            labels=("liver", "spleen", "kidneys", "vessels"),
            continue_recipe=continue_recipe,
        )
        return [row.mean_dice for row in simulate(plan, pool, test, tmp_path / folder)]

    scratch = dice("scratch", None)
    # Steps that change nothing give the first round's network again and again.
    still = dice("still", recipe.replace(learning_rate=1e-30, weight_decay=0.0))
    assert still == [scratch[0]] * 3
    moving = dice("moving", recipe)
    assert moving[0] == scratch[0]
    assert moving[1:] != scratch[1:]
    assert moving != still
    assert not list((tmp_path / "moving").rglob("weights/*.safetensors")), "weights of a finished seed are deleted"


def test_a_killed_simulation_resumes_and_ends_with_the_same_table(cohort: Path, whole: Path, tmp_path: Path) -> None:
    options = ["--strategy", "random,adaptive", "--seeds", "1"]
    log = tmp_path.with_suffix(".log")
    process = start_deformux(
        *arguments(cohort, tmp_path, *options), output=log, environment={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    end = time.monotonic() + 240
    while len(kept(tmp_path)) < 2 and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.01)
    process.kill()
    process.wait()
    before = kept(tmp_path)
    assert len(before) >= 2
    done = run(cohort, tmp_path, *options)
    assert done.exit_code == 0, done.output
    assert {name: kept(tmp_path)[name] for name in before} == before
    assert done.stdout.count("(kept)") == len(before)
    expected = [row for row in rows(whole) if row["strategy"] in ("random", "adaptive")]
    by_name = {(row["strategy"], row["round"]): row for row in rows(tmp_path)}
    assert [by_name[row["strategy"], row["round"]] for row in expected] == expected


def test_snapshots_of_earlier_rounds_give_samples_that_disagree(cohort: Path, tmp_path: Path) -> None:
    options = ["--strategy", "bald", "--seeds", "1", "--rounds", "3", "--batch", "1", "--snapshots", "2"]
    done = run(cohort, tmp_path, *options, "--set", "flip_axes=,")
    assert done.exit_code == 0, done.output
    information = {}
    for path in (tmp_path / "measurements").glob("[!.]*.json"):
        values = json.loads(path.read_text())
        information[len(values["labelled"])] = [s["mutual_information"] for s in values["scores"].values()]
    assert set(information[2]) == {0}, "one model alone"
    assert min(information[3]) > 0
    assert information[4] == [], "nothing is chosen after the last round"
    assert not list((tmp_path / "weights").iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--strategy", "best"], "one of adaptive, random"),
        (["--rounds", "9"], "rounds need 18 volumes to label, the pool has 8"),
        (["--test-fraction", "0"], "leaves nothing to test"),
        (["--strategy", "bald", "--set", "flip_axes=,"], "--snapshots 2"),
        (["--set", "flip_axes=none"], "flip_axes must be some of 0, 1, 2"),
        (
            ["--output", "/dev/null/results", "--seeds", "1"],
            "nothing can be written to /dev/null/results: not a directory",
        ),
    ],
)
def test_an_impossible_simulation_ends_in_a_sentence(
    cohort: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    done = run(cohort, tmp_path, *options)
    assert done.exit_code == 2
    assert message in done.stdout
    assert isinstance(done.exception, SystemExit)


def test_area_and_paired_difference_are_their_definitions() -> None:
    assert area_under_budget_curve([5, 10, 20], [0.5, 0.7, 0.9]) == pytest.approx((5 * 0.6 + 10 * 0.8) / 15)
    assert area_under_budget_curve([5], [0.5]) == 0.5
    a, b = [0.81, 0.84, 0.80, 0.86], [0.80, 0.80, 0.81, 0.82]
    mean, half = paired_difference(a, b)
    interval = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((interval.low, interval.high))
    assert math.isnan(paired_difference([0.5], [0.4])[1])


def test_summaries_pair_by_seed_and_leave_out_unfinished_ones() -> None:
    def curve(strategy: str, seed: int, *dice: float) -> list[SimulatedRound]:
        return [
            SimulatedRound(strategy, seed, index, tuple(map(str, range(5 * (index + 1)))), value, (value,), 1.0)
            for index, value in enumerate(dice)
        ]

    rounds = [*curve("random", 0, 0.5, 0.7), *curve("random", 1, 0.6, 0.8), *curve("entropy", 0, 0.6, 0.8)]
    rounds += curve("entropy", 1, 0.1)  # not finished
    random, entropy = summarise_curves(rounds)
    assert (random.strategy, random.seeds, random.area, random.difference) == ("random", 2, pytest.approx(0.65), None)
    assert (entropy.seeds, entropy.area, entropy.difference) == (1, pytest.approx(0.7), pytest.approx(0.1))


def test_the_test_set_does_not_change_when_volumes_are_added(cohort: Path) -> None:
    cases = find_cases(cohort)
    pool, test = held_out(cases, 0.3)
    assert {case.id for case in pool} | {case.id for case in test} == {case.id for case in cases}
    assert held_out(cases[::-1], 0.3)[1][::-1] == test


def test_a_plan_is_checked() -> None:
    with pytest.raises(ValueError, match="batch must be at least 1; got 0"):
        SimulationPlan(("random",), 2, 0, 2, (0,), short_recipe(2), Preprocessing(), ("a",))
