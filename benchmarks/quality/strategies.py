"""All strategies of ``deformux.active_learning`` on the hippocampus ``train`` split; ``val`` takes no part.

    python -m benchmarks.quality.strategies [--data FOLDER] [--work DIR] [--seeds 5] [--threads 1]

A quarter of the split, by a hash of the ids, tests; the rest is the pool. Volumes are resampled to 1.5 mm. The first
training starts from scratch, each later one from the round before, as in the app.

Adds each seed to data/strategies.json and the section active_learning of active_learning.md as soon as all its rounds
are done. Finished seeds of the same settings are not simulated again: several machines can share the hours. Within a
seed, finished rounds are kept in ``--work``. Two processes fill two cores better than two threads: give them different
seeds (``--first-seed 3 --seeds 2``).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.common.machine import machine_lines
from benchmarks.common.places import HIPPOCAMPUS, WORK
from benchmarks.common.report import (
    Section,
    add_results,
    data_file,
    markdown_table,
    read_data,
    read_section,
    write_data,
    write_section,
)
from benchmarks.common.simulated_rounds import from_rows, to_rows
from filelock import FileLock
from rich.console import Console

from deformux.active_learning.learning_curve import (
    CurveSummary,
    SimulatedRound,
    plot_curves,
    read_rounds,
    summarise_curves,
)
from deformux.active_learning.simulation import SimulationPlan
from deformux.active_learning.strategies import STRATEGIES
from deformux.cli.simulate import play
from deformux.cli.simulate_options import short_recipe
from deformux.data.cases import find_cases
from deformux.data.preprocessing import Preprocessing
from deformux.fitting.recipe import Recipe

_TEST_FRACTION = 0.25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HIPPOCAMPUS, help="a folder of labelled NIfTI")
    parser.add_argument("--work", type=Path, default=WORK / "strategies", help="folder of unfinished seeds")
    parser.add_argument("--strategies", default=",".join(STRATEGIES))
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--batch", type=int, default=5)
    parser.add_argument("--start", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=300, help="of the first training")
    parser.add_argument("--continue-steps", type=int, default=60, help="of each later one")
    parser.add_argument("--threads", type=int, default=1)
    add_results(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    plan = SimulationPlan(
        strategies=tuple(arguments.strategies.split(",")),
        rounds=arguments.rounds,
        batch=arguments.batch,
        start=arguments.start,
        seeds=(),
        # Training from scratch in each round, within a few hundred steps, Dice depends more on the initial weights than
        # on the labels: 0.785 and 0.717 with 5 volumes and two seeds, 0.749 with 30 (100 steps at 3e-3).
        # The learning rate of the seeds that are done; the library's own is now twice that.
        recipe=_recipe(arguments.steps).replace(learning_rate=1e-3),
        continue_recipe=_recipe(arguments.continue_steps, "continue"),
        prep=Preprocessing.from_options("mr", "1.5,1.5,1.5", "32,48,32"),
        labels=("anterior", "posterior"),
    )
    results = _Results(arguments.results, plan)
    if arguments.rewrite:
        results.write()
        return
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        if seed in results.seeds():
            print(f"seed {seed} is in {results.file} already")
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
    """The committed results: rounds of finished seeds, their settings and machines."""

    def __init__(self, folder: Path, plan: SimulationPlan) -> None:
        self.folder, self.plan = folder, plan
        self.file = data_file(folder, "strategies")
        settings = {name: value for name, value in dataclasses.asdict(plan).items() if name not in ("seeds", "device")}
        # As they are read back: tuples become lists.
        self.settings = json.loads(json.dumps(settings | {"test_fraction": _TEST_FRACTION}))
        if self._data()["settings"] != self.settings:
            sys.exit(f"error: {self.file} has other settings; move it away, or give a different --results")

    def seeds(self) -> set[int]:
        return {row["seed"] for row in self._data()["rounds"]}

    def add(self, seed: int, rounds: list[SimulatedRound]) -> None:
        with FileLock(self.file.with_suffix(".lock")):
            data = self._data()
            rows = [*from_rows(data["rounds"]), *rounds]
            rows.sort(key=lambda row: (self.plan.strategies.index(row.strategy), row.seed, row.round))
            data["machines"][str(seed)] = machine_lines()
            write_data(self.folder, "strategies", {**data, "rounds": to_rows(rows)})
        self.write()

    def write(self) -> None:
        """Write the section of all seeds."""
        data = self._data()
        rows = from_rows(data["rounds"])
        title = "Active learning on the hippocampus `train` split, simulated"
        lines = self._report(summarise_curves(rows), data["machines"])
        write_section(self.folder, Section("active_learning", "active_learning", title, lines))
        plot_curves(self.folder / "active_learning.png", rows)
        print(read_section(self.folder, "active_learning", "active_learning"))

    def _data(self) -> dict[str, Any]:
        if not self.file.is_file():
            self.file.parent.mkdir(parents=True, exist_ok=True)
            return {"settings": self.settings, "machines": {}, "rounds": []}
        return read_data(self.folder, "strategies")

    def _report(self, summary: list[CurveSummary], by_seed: Mapping[str, Sequence[str]]) -> list[str]:
        plan = self.plan
        later = plan.continue_recipe.steps if plan.continue_recipe else plan.recipe.steps
        machines: dict[tuple[str, ...], list[str]] = {}
        for seed, lines in sorted(by_seed.items()):
            machines.setdefault(tuple(lines), []).append(seed)
        heads = ("strategy", "AUBC", "Dice in the last round", "AUBC less that of random, paired by seed")
        rows = [
            (
                *(line.strategy, f"{line.area:.4f} {_plus_minus(line.area_half_width)}", f"{line.final_dice:.4f}"),
                _difference(line),
            )
            for line in summary
        ]
        return [
            *(f"- seed {', '.join(seeds)}: {'; '.join(lines)}" for lines, seeds in machines.items()),
            f"- {plan.rounds} rounds from {plan.start} labelled volumes in steps of {plan.batch}, "
            f"{len(by_seed)} seeds; network `{plan.preset}`, "
            f"{'×'.join(f'{mm:g}' for mm in plan.prep.spacing_mm or ())} mm, the first training from "
            f"scratch in {plan.recipe.steps} steps, each later one from the round before in {later} steps, of "
            f"{plan.recipe.batch_size} volume",
            "- AUBC: area under Dice over labelled volumes, divided by their range; ±: half width of the 95 % "
            "confidence interval over seeds (Student's t)",
            "",
            *markdown_table(heads, rows),
            "![Dice over labelled volumes](active_learning.png)",
        ]


def _difference(line: CurveSummary) -> str:
    if line.difference is None or line.difference_half_width is None:
        return ""
    return f"{line.difference:+.4f} {_plus_minus(line.difference_half_width)}"


def _plus_minus(half_width: float) -> str:
    return "" if math.isnan(half_width) else f"± {half_width:.4f}"


if __name__ == "__main__":
    main()
