"""Coarse voxels and many steps against fine voxels and few: Dice after about as much computing, on five organs.

    python -m benchmarks.quality.plan_trials                      # all trials, each 6 to 12 minutes of a core
    python -m benchmarks.quality.plan_trials --sets heart-7
    python -m benchmarks.quality.plan_trials --rewrite

The numbers behind the plan's rules of spacing, steps and batch (``deformux.data.planning``): trainings of a given
number of steps without clicks, frame, strides and augmentation as planned, scored on all of ``val``. Trials that were
measured before are kept. Writes data/plan_trials.json and the page plan_trials.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.common.command import run_command
from benchmarks.common.machine import software_lines
from benchmarks.common.places import DATA, WORK
from benchmarks.common.report import (
    Section,
    add_results,
    bullets,
    data_file,
    markdown_table,
    measure_and_write,
    read_data,
)
from benchmarks.quality.any_organ_sets import ORGAN_SETS, Organ, prepared_organ

from deformux.data.choices import Choices
from deformux.data.fingerprint import read_fingerprint
from deformux.data.planning import make_plan
from deformux.data.volume_reader import read_volume
from deformux.fitting.fit import fit
from deformux.fitting.recipe import RECIPES
from deformux.inference.largest_component import keep_largest_component
from deformux.inference.metrics import dice_per_label, mean_dice
from deformux.inference.sliding_window import segment_labels
from deformux.networks.deformux_net import DeformUXNet


@dataclass(frozen=True)
class PlanTrial:
    """A training: its set, voxels along the frame's axes, steps, patches of a step, and the peak learning rate."""

    organ: str
    spacing_mm: tuple[float, float, float]
    patch_size: tuple[int, int, int]
    steps: int
    batch_size: int = 1
    learning_rate: float = 2e-3


TRIALS = (
    PlanTrial("heart-7", (1.5625, 1.5625, 10), (80, 80, 10), 500),
    PlanTrial("heart-7", (1.5625, 1.5625, 10), (80, 80, 10), 500, learning_rate=5e-3),
    PlanTrial("heart-7", (2, 2, 10), (80, 80, 10), 500),
    PlanTrial("heart-7", (2.5, 2.5, 10), (80, 80, 10), 500),
    PlanTrial("heart-7", (2.5, 2.5, 10), (64, 64, 10), 780),
    PlanTrial("heart-7", (3.1, 3.1, 10), (48, 48, 10), 1390),
    PlanTrial("fetal-brain-5", (0.8, 0.8, 0.8), (32, 48, 32), 600),
    PlanTrial("fetal-brain-5", (1.2, 1.2, 1.2), (32, 48, 32), 600),
    PlanTrial("fetal-brain-5", (1.6, 1.6, 1.6), (32, 48, 32), 600),
    PlanTrial("fetal-brain-5", (2.2, 2.2, 2.2), (32, 48, 32), 600),
    PlanTrial("abdomen-4", (3.75, 3.75, 7.7), (48, 32, 32), 600),
    PlanTrial("abdomen-4", (5.5, 5.5, 7.7), (48, 32, 32), 600),
    PlanTrial("abdomen-4", (7.7, 7.7, 7.7), (48, 32, 32), 600),
    PlanTrial("spine-5", (4, 3.15, 3.15), (24, 32, 32), 1000),
    PlanTrial("spine-5", (4, 3.15, 3.15), (24, 32, 64), 500),
    PlanTrial("spine-5", (4.2, 4.2, 4.2), (24, 24, 48), 890),
    PlanTrial("hippocampus-5", (1, 1, 1), (32, 48, 32), 600, batch_size=2),
    PlanTrial("hippocampus-5", (1.15, 1, 1), (32, 32, 32), 1200),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.plan_trials",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sets = list(dict.fromkeys(trial.organ for trial in TRIALS))
    parser.add_argument("--sets", nargs="+", choices=sets, default=sets)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of all sets")
    parser.add_argument("--work", type=Path, default=WORK / "any_organ", help="folder for prepared volumes")
    add_results(parser)
    arguments = parser.parse_args()
    measure_and_write(arguments, "plan_trials", lambda: measured(arguments), section)


def measured(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Do the trials that have no row yet; yield all rows so far after each."""
    rows: list[dict[str, Any]] = []
    if data_file(arguments.results, "plan_trials").is_file():
        rows = read_data(arguments.results, "plan_trials")["rows"]
    known = {PlanTrial(**_with_tuples(row["trial"])) for row in rows}
    for trial in TRIALS:
        if trial.organ in arguments.sets and trial not in known:
            organ = prepared_organ(ORGAN_SETS[trial.organ], arguments.data, arguments.work, seed=0)
            rows.append(tried(trial, organ))
            yield {"machine": software_lines(), "rows": rows}


def tried(trial: PlanTrial, organ: Organ) -> dict[str, Any]:
    """Train and score once; return a row of the data file."""
    given = Choices(spacing_mm=trial.spacing_mm, patch_size=trial.patch_size, keep_largest=False)
    plan = make_plan(read_fingerprint(organ.scans, organ.train), labels=organ.labels, given=given)
    changes = {**plan.recipe_changes, "batch_size": trial.batch_size, "learning_rate": trial.learning_rate, "clicks": 0}
    recipe = RECIPES["finetune"].replace(**changes).in_steps(trial.steps, epochs=10)
    torch.manual_seed(0)
    network = DeformUXNet(1, len(organ.labels) + 1, plan.preset, strides=plan.strides)
    began = time.process_time()
    done = fit(network, organ.train, recipe=recipe, prep=plan.preprocessing, labels=organ.labels, seed=0)
    seconds = time.process_time() - began
    every: list[list[float]] = []
    largest: list[list[float]] = []
    for case in organ.val:
        truth = np.rint(read_volume(case.label).values).astype(np.uint8)
        mask = np.asarray(segment_labels(network, case.images, plan.preprocessing)[0])
        every.append(dice_per_label(mask, truth, len(organ.labels)))
        keep_largest_component(mask)
        largest.append(dice_per_label(mask, truth, len(organ.labels)))
    dice = {"dice": mean_dice(every), "largest": mean_dice(largest)}
    return {"trial": asdict(trial), "cpu_seconds": round(seconds), **dice, "loss": done.losses[-1]}


def section(data: Mapping[str, Any]) -> Section:
    """Write a row for each trial."""
    heads = ("set", "spacing, mm", "patch", "patches a step", "steps", "peak rate", "CPU s", "loss", "Dice", "largest")
    rows = [
        [
            *(row["trial"]["organ"], _sizes(row["trial"]["spacing_mm"]), _sizes(row["trial"]["patch_size"])),
            *(row["trial"]["batch_size"], row["trial"]["steps"], f"{row['trial']['learning_rate']:g}"),
            *(row["cpu_seconds"], f"{row['loss']:.2f}", f"{row['dice']:.3f}", f"{row['largest']:.3f}"),
        ]
        for row in data["rows"]
    ]
    lines = [
        *bullets(data["machine"]),
        "- tiny network, no clicks, seed 0 only; Dice on all of `val`, mean over labels of the means over scans",
        "- largest: the same masks when only the largest connected component of the foreground is kept; the plan does "
        "so where the labels are one piece in every scan",
        "",
        *markdown_table(heads, rows),
        "The best trial of a set against that with the finest voxels, at the same rate:",
        "",
        *markdown_table(("set", "finest, mm", "Dice", "best, mm", "Dice", "gain"), _gains(data["rows"])),
    ]
    return Section("plan_trials", "quality_plan_trials", "Coarse voxels and many steps against fine ones", lines)


def _gains(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    gains = []
    for organ in dict.fromkeys(row["trial"]["organ"] for row in rows):
        own = [row for row in rows if row["trial"]["organ"] == organ]
        finest = min(own, key=lambda row: (np.prod(row["trial"]["spacing_mm"]), row["trial"]["learning_rate"]))
        best = max(own, key=lambda row: float(row["dice"]))
        if best is not finest:
            sizes = (_sizes(row["trial"]["spacing_mm"]) for row in (finest, best))
            dice = (f"{row['dice']:.3f}" for row in (finest, best))
            pairs = [cell for pair in zip(sizes, dice, strict=True) for cell in pair]
            gains.append([organ, *pairs, f"{best['dice'] - finest['dice']:+.2f}"])
    return gains


def _with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _sizes(values: Sequence[float]) -> str:
    return "×".join(f"{value:g}" for value in values)


if __name__ == "__main__":
    run_command(main)
