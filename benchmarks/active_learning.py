"""All strategies of ``deformux.selection`` on the hippocampus ``train`` split; ``val`` takes no part.

    python benchmarks/active_learning.py --data ../shared/data/hippocampus --work /tmp/active_learning [--threads 1]

A quarter of the split, by a hash of the ids, tests; the rest is the pool. Volumes are resampled to 1.5 mm, which makes
a training three times as fast; every training starts from scratch. What is finished is kept in ``--work``, so that the
run can be stopped and started again. Two processes fill two cores better than two threads: give them other seeds and
one folder (``--first-seed 0 --seeds 3`` and ``--first-seed 3 --seeds 2``), then run once more with all seeds.
Writes benchmarks/results/active_learning.md, .csv and .png when every round of ``--seeds`` is done.
"""

from __future__ import annotations

import argparse
import math
import shutil
from pathlib import Path

import torch
from _machine import machine_lines
from rich.console import Console

from deformux.budget_curve import Summary
from deformux.files import write_text
from deformux.selection import STRATEGIES
from deformux.simulate import Plan
from deformux.simulate_cli import play, short_recipe
from deformux.transforms import Preprocessing

_RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--strategies", default=",".join(STRATEGIES))
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--batch", type=int, default=5)
    parser.add_argument("--start", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    plan = Plan(
        strategies=tuple(arguments.strategies.split(",")),
        rounds=arguments.rounds,
        batch=arguments.batch,
        start=arguments.start,
        seeds=tuple(range(arguments.first_seed, arguments.first_seed + arguments.seeds)),
        # Left and right hippocampi are mirror images, and the split holds both. At the usual 1e-3, Dice after 150
        # steps depends more on the initial weights than on the labels.
        recipe=short_recipe(arguments.steps).replace(flip_axes=(0,), foreground_ratio=1.0, learning_rate=3e-3),
        prep=Preprocessing.from_options("mr", "1.5,1.5,1.5", "32,48,32"),
        labels=("anterior", "posterior"),
    )
    summary = play(plan, arguments.data, arguments.work, subset="train", test_fraction=0.25, console=Console())
    if arguments.first_seed:
        return
    text = "\n".join(_report(plan, summary)) + "\n"
    write_text(_RESULTS / "active_learning.md", text)
    shutil.copyfile(arguments.work / "rounds.csv", _RESULTS / "active_learning.csv")
    shutil.copyfile(arguments.work / "curves.png", _RESULTS / "active_learning.png")
    print(text)


def _report(plan: Plan, summary: list[Summary]) -> list[str]:
    return [
        "# Active learning on the hippocampus `train` split, simulated",
        "",
        *(f"- {line}" for line in machine_lines()),
        f"- {plan.rounds} rounds from {plan.start} labelled volumes in steps of {plan.batch}, {len(plan.seeds)} seeds; "
        f"network `{plan.preset}`, 1.5 mm, each training from scratch in {plan.recipe.steps} steps of "
        f"{plan.recipe.batch_size} volumes",
        "- AUBC: area under Dice over labelled volumes, divided by their range; ±: half width of the 95 % confidence "
        "interval over seeds (Student's t)",
        "",
        "| strategy | AUBC | Dice in the last round | AUBC less that of random, paired by seed |",
        "|---|---|---|---|",
        *(
            f"| {line.strategy} | {line.area:.4f} {_plus_minus(line.area_half_width)} | {line.final_dice:.4f} "
            f"| {_difference(line)} |"
            for line in summary
        ),
    ]


def _difference(line: Summary) -> str:
    if line.difference is None or line.difference_half_width is None:
        return ""
    return f"{line.difference:+.4f} {_plus_minus(line.difference_half_width)}"


def _plus_minus(half_width: float) -> str:
    return "" if math.isnan(half_width) else f"± {half_width:.4f}"


if __name__ == "__main__":
    main()
