"""How many labels each strategy needs for 95 % of the Dice of all labels, from finished simulations.

    python -m benchmarks.quality.labels_needed --full full/rounds.csv
    python -m benchmarks.quality.labels_needed --full-dice 0.87 --rounds some/rounds.csv

By default ``--rounds`` are those of benchmarks.quality.strategies. ``--full`` is a simulation of the same settings
with one round that labels the whole pool, in as many steps as all rounds have together:

    deformux simulate --data ../shared/data/hippocampus --output full --subset train --modality mr \\
        --strategy random --rounds 1 --start 120 --seeds 5 --labels anterior,posterior --spacing 1.5,1.5,1.5 \\
        --patch-size 32,48,32 --steps 600 --set batch_size=1 --set flip_axes=0, --set foreground_ratio=1.0

Between two rounds Dice is interpolated linearly. Writes data/labels_needed.json and the section
quality_active_learning of active_learning.md.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.common.command import run_command
from benchmarks.common.machine import machine_lines
from benchmarks.common.plots import strips
from benchmarks.common.report import Section, add_results, bullets, data_file, markdown_table, measure_and_write
from benchmarks.common.simulated_rounds import read_simulation

from deformux.active_learning.learning_curve import BASELINE, paired_difference, read_rounds

# Labelled volumes and mean Dice of each round, in order.
Curve = list[tuple[int, float]]
_HEADS = ("strategy", "volumes", "reached by", "in the first round", f"less {BASELINE}", f"times {BASELINE}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=Path, help="rounds.csv of a simulation")
    full = parser.add_mutually_exclusive_group()
    full.add_argument("--full", type=Path, help="rounds.csv of trainings on the whole pool")
    full.add_argument("--full-dice", type=float, help="or the Dice of such a training")
    parser.add_argument("--share", type=float, default=0.95, help="part of the full-data Dice that is to be reached")
    add_results(parser)
    arguments = parser.parse_args()
    if not (arguments.rewrite or arguments.full or arguments.full_dice):
        parser.error("one of the arguments --full --full-dice --rewrite is required")
    measure_and_write(arguments, "labels_needed", lambda: measured(arguments), section)


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """Find the labelled volumes that each strategy and seed needs."""
    curves = read_curves(arguments.rounds or data_file(arguments.results, "strategies"))
    all_labels = arguments.full_dice or full_dice(arguments.full)
    target = arguments.share * all_labels
    return {
        "machine": machine_lines(),
        "share": arguments.share,
        "full_dice": all_labels,
        "most": max(labelled for by_seed in curves.values() for curve in by_seed.values() for labelled, _ in curve),
        "needed": {
            strategy: {str(seed): labels_needed(curve, target) for seed, curve in by_seed.items()}
            for strategy, by_seed in curves.items()
        },
        "first": {
            strategy: {str(seed): curve[0][0] for seed, curve in by_seed.items()}
            for strategy, by_seed in curves.items()
        },
    }


def section(data: Mapping[str, Any]) -> Section:
    """Write the labels needed as a table and a plot."""
    reached = {name: [n for n in by_seed.values() if n is not None] for name, by_seed in data["needed"].items()}
    target = data["share"] * data["full_dice"]
    return Section(
        "active_learning",
        "quality_active_learning",
        f"Labels needed for {100 * data['share']:g} % of the full-data Dice",
        [
            *bullets(data["machine"]),
            f"- all labels give Dice {data['full_dice']:.4f}, so that {target:.4f} is to be reached; simulations ended "
            f"at {data['most']} labelled volumes",
            "- volumes: mean over the seeds that reached it, by linear interpolation between rounds; difference and "
            f"ratio: to `{BASELINE}`, over the seeds in which both did; ±: half width of the 95 % confidence interval "
            "(Student's t). A seed above the target in its first round counts with that round's volumes, though it may "
            "need fewer",
            "",
            *markdown_table(_HEADS, _rows(data["needed"], data["first"])),
        ],
        strips({name: values for name, values in reached.items() if values}, "labelled volumes needed"),
    )


def read_curves(path: Path) -> dict[str, dict[int, Curve]]:
    """Read strategy to seed to curve from the rounds.csv or the data file of a simulation."""
    rounds = read_simulation(path) if path.suffix == ".json" else read_rounds(path)
    curves: dict[str, dict[int, Curve]] = defaultdict(lambda: defaultdict(list))
    for row in rounds:
        curves[row.strategy][row.seed].append((len(row.labelled), row.mean_dice))
    return {strategy: {seed: sorted(curve) for seed, curve in own.items()} for strategy, own in curves.items()}


def full_dice(path: Path) -> float:
    """Return the mean Dice of trainings on the whole pool."""
    curves = read_curves(path)
    return float(np.mean([curve[-1][1] for by_seed in curves.values() for curve in by_seed.values()]))


def labels_needed(curve: Curve, target: float) -> float | None:
    """Return the labelled volumes at which a curve first reaches a Dice, those of its first round if it begins above.

    None if it does not reach the Dice.
    """
    (before, below), *others = curve
    if below >= target:
        return float(before)
    for labelled, dice in others:
        if dice >= target:
            return before + (labelled - before) * (target - below) / (dice - below)
        before, below = labelled, dice
    return None


def _rows(
    needed: Mapping[str, Mapping[str, float | None]], first: Mapping[str, Mapping[str, int]]
) -> list[Sequence[str]]:
    rows = []
    baseline = needed.get(BASELINE, {})
    for strategy, by_seed in needed.items():
        reached = [n for n in by_seed.values() if n is not None]
        pairs = [(n, b) for seed, n in by_seed.items() if n is not None and (b := baseline.get(seed)) is not None]
        compared = ["", ""]
        if pairs and strategy != BASELINE:
            own, random = zip(*pairs, strict=True)
            difference, half_width = paired_difference(own, random)
            interval = "" if np.isnan(half_width) else f" ± {half_width:.1f}"
            compared = [f"{difference:+.1f}{interval}", f"{np.mean(own) / np.mean(random):.2f}"]
        at_once = str(sum(n == first[strategy][seed] for seed, n in by_seed.items()))
        volumes = f"{np.mean(reached):.1f}" if reached else "not reached"
        rows.append([strategy, volumes, f"{len(reached)} of {len(by_seed)} seeds", at_once, *compared])
    return rows


if __name__ == "__main__":
    run_command(main)
