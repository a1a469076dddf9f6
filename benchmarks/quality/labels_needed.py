"""How many labels each strategy needs for 95 % of what all labels give, from simulations that are finished.

    python -m benchmarks.quality.active_learning --full full/rounds.csv
    python -m benchmarks.quality.active_learning --full-dice 0.87 --rounds some/rounds.csv

``--rounds`` are by default those of benchmarks/server/next_sample.py; ``--full`` is a simulation of the same settings
with one round that labels the whole pool, in as many steps as all rounds have together:

    deformux simulate --data ../shared/data/hippocampus --output full --subset train --modality mr \\
        --strategy random --rounds 1 --start 120 --seeds 5 --labels anterior,posterior --spacing 1.5,1.5,1.5 \\
        --patch-size 32,48,32 --steps 600 --set batch_size=1 --set flip_axes=0, --set foreground_ratio=1.0

Between two rounds Dice is taken to rise in a straight line. Writes quality_active_learning.md, .csv and .png.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from benchmarks.common.command import RESULTS, run
from benchmarks.common.machine import machine_lines
from benchmarks.common.report import strips, table, write_report

from deformux.active_learning.learning_curve import BASELINE, paired_difference

# Labelled volumes and mean Dice of each round, in order.
Curve = list[tuple[int, float]]
_HEADS = ("strategy", "volumes", "reached by", "in the first round", f"less {BASELINE}", f"times {BASELINE}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=Path, default=RESULTS / "active_learning.csv", help="of a simulation")
    full = parser.add_mutually_exclusive_group(required=True)
    full.add_argument("--full", type=Path, help="rounds.csv of trainings on the whole pool")
    full.add_argument("--full-dice", type=float, help="or the Dice of such a training")
    parser.add_argument("--share", type=float, default=0.95, help="of the full-data Dice")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    curves = read_curves(arguments.rounds)
    all_labels = arguments.full_dice or full_dice(arguments.full)
    target = arguments.share * all_labels
    needed = {
        strategy: {seed: labels_needed(curve, target) for seed, curve in by_seed.items()}
        for strategy, by_seed in curves.items()
    }
    most = max(labelled for by_seed in curves.values() for curve in by_seed.values() for labelled, _ in curve)
    reached = {name: [n for n in by_seed.values() if n is not None] for name, by_seed in needed.items()}
    write_report(
        arguments.results,
        "active_learning",
        title=f"Labels needed for {100 * arguments.share:g} % of the full-data Dice",
        lines=[
            *(f"- {line}" for line in machine_lines()),
            f"- all labels give Dice {all_labels:.4f}, so that {target:.4f} is to be reached; simulations ended at "
            f"{most} labelled volumes",
            "- volumes: mean over the seeds that reached it, by linear interpolation between rounds; difference and "
            f"ratio: to `{BASELINE}`, over the seeds in which both did; ±: half width of the 95 % confidence interval "
            "(Student's t). A seed above the target in its first round counts with that round's volumes, though it may "
            "need fewer",
            "",
            *table(
                _HEADS,
                _rows(needed, curves),
            ),
        ],
        rows=[("strategy", "seed", "volumes"), *((s, seed, n) for s, own in needed.items() for seed, n in own.items())],
        plot=strips({name: values for name, values in reached.items() if values}, "labelled volumes needed"),
    )
    print((arguments.results / "quality_active_learning.md").read_text())


def read_curves(path: Path) -> dict[str, dict[int, Curve]]:
    """Strategy to seed to curve, of a simulation's rounds.csv."""
    curves: dict[str, dict[int, Curve]] = defaultdict(lambda: defaultdict(list))
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            curves[row["strategy"]][int(row["seed"])].append((int(row["labelled"]), float(row["mean_dice"])))
    return {strategy: {seed: sorted(curve) for seed, curve in own.items()} for strategy, own in curves.items()}


def full_dice(path: Path) -> float:
    """Mean Dice of trainings on the whole pool."""
    curves = read_curves(path)
    return float(np.mean([curve[-1][1] for by_seed in curves.values() for curve in by_seed.values()]))


def labels_needed(curve: Curve, target: float) -> float | None:
    """Labelled volumes at which a curve first reaches a Dice; its first round's where it begins above, or None."""
    (before, below), *others = curve
    if below >= target:
        return float(before)
    for labelled, dice in others:
        if dice >= target:
            return before + (labelled - before) * (target - below) / (dice - below)
        before, below = labelled, dice
    return None


def _rows(
    needed: Mapping[str, Mapping[int, float | None]], curves: Mapping[str, Mapping[int, Curve]]
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
        at_once = str(sum(n == curves[strategy][seed][0][0] for seed, n in by_seed.items()))
        volumes = f"{np.mean(reached):.1f}" if reached else "not reached"
        rows.append([strategy, volumes, f"{len(reached)} of {len(by_seed)} seeds", at_once, *compared])
    return rows


if __name__ == "__main__":
    run(main)
