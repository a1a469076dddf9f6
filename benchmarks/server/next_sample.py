"""All strategies of ``deformux.active_learning`` on the hippocampus ``train`` split; ``val`` takes no part.

    python -m benchmarks.server.next_sample --data ../shared/data/hippocampus [--work DIR] [--seeds 5] [--threads 1]

A quarter of the split, by a hash of the ids, tests; the rest is the pool. Volumes are resampled to 1.5 mm. The first
training starts from scratch, each later one from the round before, as in the app.

Adds each seed to benchmarks/results/active_learning.csv, .json, .md and .png as soon as all its rounds are done, and
does not play again what is there by the same settings: hours that no machine has at once can be spent on several.
Within a seed, what is finished is kept in ``--work``. Two processes fill two cores better than two threads: give them
other seeds (``--first-seed 3 --seeds 2``).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from benchmarks.common.machine import machine_lines
from filelock import FileLock
from rich.console import Console

from deformux.active_learning.learning_curve import (
    CurveSummary,
    SimulatedRound,
    plot_curves,
    read_rounds,
    summarise_curves,
    write_rounds,
)
from deformux.active_learning.simulation import SimulationPlan
from deformux.active_learning.strategies import STRATEGIES
from deformux.cli.simulate import play
from deformux.cli.simulate_options import short_recipe
from deformux.data.atomic_files import write_text
from deformux.data.cases import find_cases
from deformux.data.preprocessing import Preprocessing
from deformux.fitting.recipe import Recipe

_RESULTS = Path(__file__).parents[1] / "results" / "active_learning"
_TEST_FRACTION = 0.25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/active_learning"))
    parser.add_argument("--strategies", default=",".join(STRATEGIES))
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--batch", type=int, default=5)
    parser.add_argument("--start", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=300, help="of the first training")
    parser.add_argument("--continue-steps", type=int, default=60, help="of each later one")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=_RESULTS, help="the files' name without its ending")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    plan = SimulationPlan(
        strategies=tuple(arguments.strategies.split(",")),
        rounds=arguments.rounds,
        batch=arguments.batch,
        start=arguments.start,
        seeds=(),
        # From scratch each time, Dice in as many steps as there is time for depends more on the initial weights than on
        # the labels: 0.785 and 0.717 with 5 volumes and two seeds, 0.749 with 30 (100 steps at 3e-3).
        # At the rate of the seeds that are done; the library's own is twice that now.
        recipe=_recipe(arguments.steps).replace(learning_rate=1e-3),
        continue_recipe=_recipe(arguments.continue_steps, "continue"),
        prep=Preprocessing.from_options("mr", "1.5,1.5,1.5", "32,48,32"),
        labels=("anterior", "posterior"),
    )
    results = _Results(arguments.results, plan)
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        if seed in results.seeds():
            print(f"seed {seed} is in {results.csv} already")
            continue
        own = arguments.work / f"seed-{seed}"
        play(
            dataclasses.replace(plan, seeds=(seed,)),
            find_cases(arguments.data, subset="train"),
            own,
            test_fraction=_TEST_FRACTION,
            console=Console(),
        )
        results.add(seed, read_rounds(own / "rounds.csv"))


def _recipe(steps: int, name: str = "finetune") -> Recipe:
    # Left and right hippocampi are mirror images, and the split holds both.
    return short_recipe(steps, name).replace(batch_size=1, flip_axes=(0,), foreground_ratio=1.0)


class _Results:
    """The committed files: rounds of finished seeds, by what settings and on what machine."""

    def __init__(self, stem: Path, plan: SimulationPlan) -> None:
        self.plan = plan
        self.csv, self.json = stem.with_suffix(".csv"), stem.with_suffix(".json")
        self.markdown, self.png = stem.with_suffix(".md"), stem.with_suffix(".png")
        settings = {name: value for name, value in dataclasses.asdict(plan).items() if name not in ("seeds", "device")}
        # As they are read back, where tuples are lists.
        self.settings = json.loads(json.dumps(settings | {"test_fraction": _TEST_FRACTION}))
        if self._facts()["settings"] != self.settings:
            sys.exit(f"error: {self.json} is of other settings; move it away, or give other --results")

    def seeds(self) -> set[int]:
        return {row.seed for row in read_rounds(self.csv)}

    def add(self, seed: int, rounds: list[SimulatedRound]) -> None:
        with FileLock(self.csv.with_suffix(".lock")):
            rows = [*read_rounds(self.csv), *rounds]
            rows.sort(key=lambda row: (self.plan.strategies.index(row.strategy), row.seed, row.round))
            facts = self._facts()
            facts["machines"][str(seed)] = machine_lines()
            write_text(self.json, json.dumps(facts, indent=1) + "\n")
            write_rounds(self.csv, rows, self.plan.labels)
            plot_curves(self.png, rows)
            write_text(self.markdown, "\n".join(self._report(summarise_curves(rows), facts)) + "\n")
        print(self.markdown.read_text())

    def _facts(self) -> dict[str, Any]:
        if not self.json.is_file():
            return {"settings": self.settings, "machines": {}}
        facts: dict[str, Any] = json.loads(self.json.read_text())
        return facts

    def _report(self, summary: list[CurveSummary], facts: dict[str, Any]) -> list[str]:
        plan = self.plan
        later = plan.continue_recipe.steps if plan.continue_recipe else plan.recipe.steps
        machines: dict[tuple[str, ...], list[str]] = {}
        for seed, lines in sorted(facts["machines"].items()):
            machines.setdefault(tuple(lines), []).append(seed)
        return [
            "# Active learning on the hippocampus `train` split, simulated",
            "",
            *(f"- seed {', '.join(seeds)}: {'; '.join(lines)}" for lines, seeds in machines.items()),
            f"- {plan.rounds} rounds from {plan.start} labelled volumes in steps of {plan.batch}, "
            f"{len(facts['machines'])} seeds; network `{plan.preset}`, "
            f"{'×'.join(f'{mm:g}' for mm in plan.prep.spacing_mm or ())} mm, the first training from "
            f"scratch in {plan.recipe.steps} steps, each later one from the round before in {later} steps, of "
            f"{plan.recipe.batch_size} volume",
            "- AUBC: area under Dice over labelled volumes, divided by their range; ±: half width of the 95 % "
            "confidence interval over seeds (Student's t)",
            "",
            "| strategy | AUBC | Dice in the last round | AUBC less that of random, paired by seed |",
            "|---|---|---|---|",
            *(
                f"| {line.strategy} | {line.area:.4f} {_plus_minus(line.area_half_width)} | {line.final_dice:.4f} "
                f"| {_difference(line)} |"
                for line in summary
            ),
        ]


def _difference(line: CurveSummary) -> str:
    if line.difference is None or line.difference_half_width is None:
        return ""
    return f"{line.difference:+.4f} {_plus_minus(line.difference_half_width)}"


def _plus_minus(half_width: float) -> str:
    return "" if math.isnan(half_width) else f"± {half_width:.4f}"


if __name__ == "__main__":
    main()
