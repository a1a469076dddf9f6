"""Implementation of ``deformux simulate``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.table import Table

from deformux.active_learning.learning_curve import (
    CurveSummary,
    SimulatedRound,
    plot_curves,
    summarise_curves,
    write_curve_summary,
    write_rounds,
)
from deformux.active_learning.simulation import SimulationPlan, held_out, simulate
from deformux.cli.common import ProgressBar, clear_errors, console
from deformux.cli.devices import torch_device, use_threads
from deformux.data.cases import Case
from deformux.data.preprocessing import Preprocessing
from deformux.fitting.fit import Progress, TrainingError
from deformux.fitting.recipe import Recipe

__all__ = ["play", "simulate_on_folder"]


def simulate_on_folder(
    cases: Sequence[Case],
    output: Path,
    *,
    test_fraction: float,
    strategies: tuple[str, ...],
    rounds: int,
    batch: int,
    start: int,
    seeds: tuple[int, ...],
    recipe: Recipe,
    continue_recipe: Recipe | None,
    prep: Preprocessing,
    labels: tuple[str, ...],
    preset: str,
    snapshots: int,
    start_from: Path | None,
    device: str,
    threads: int,
) -> None:
    """Run a simulation with the options of the command on labelled volumes; see ``SimulationPlan``."""
    with clear_errors(TrainingError):
        use_threads(threads)
        plan = SimulationPlan(
            strategies=strategies,
            rounds=rounds,
            batch=batch,
            start=start,
            seeds=seeds,
            recipe=recipe,
            prep=prep,
            labels=labels,
            preset=preset,
            snapshots=snapshots,
            start_from=start_from,
            device=torch_device(device),
            continue_recipe=continue_recipe,
        )
        play(plan, cases, output, test_fraction=test_fraction)


def play(
    plan: SimulationPlan, cases: Sequence[Case], output: Path, *, test_fraction: float, console: Console = console
) -> list[CurveSummary]:
    """Simulate with a progress bar; write tables and plot after each round, and print the summary."""
    pool, test = held_out(cases, test_fraction)
    total = len(plan.strategies) * len(plan.seeds) * plan.rounds
    done: list[SimulatedRound] = []
    computing: list[float] = []
    began = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}"))
    with ProgressBar(*columns, console=console) as bar:
        task = bar.add_task(f"{len(pool)} volumes to choose from, {len(test)} to test on", total=total, left="")

        def show(what: str, progress: Progress) -> None:
            bar.update(task, description=f"{what}: step {progress.step} of {progress.total_steps}")

        def finished(row: SimulatedRound, computed: bool) -> None:
            nonlocal began
            if computed:
                computing.append(time.monotonic() - began)
            began = time.monotonic()
            done.append(row)
            _write(output, done, plan)
            console.print(
                f"{row.strategy}, seed {row.seed}: {len(row.labelled)} labelled, Dice {row.mean_dice:.4f}"
                + ("" if computed else " (kept)")
            )
            left = _duration((total - len(done)) * sum(computing) / len(computing)) if computing else ""
            bar.update(task, completed=len(done), left=f"about {left} left" if left else "")

        simulate(plan, pool, test, output, on_round=finished, on_progress=show)
    summary = summarise_curves(done)
    console.print(_table(summary))
    console.print(f"{output}: rounds.csv, summary.csv, curves.png")
    return summary


def _table(summary: list[CurveSummary]) -> Table:
    """Show the area under the budget curve of each strategy, and its paired difference to random."""
    table = Table("strategy", "seeds", "AUBC", "final Dice", "difference to random (95 %)")
    for line in summary:
        table.add_row(
            line.strategy,
            str(line.seeds),
            f"{line.area:.4f} ± {line.area_half_width:.4f}",
            f"{line.final_dice:.4f}",
            "" if line.difference is None else f"{line.difference:+.4f} ± {line.difference_half_width:.4f}",
        )
    return table


def _write(output: Path, rounds: list[SimulatedRound], plan: SimulationPlan) -> None:
    write_rounds(output / "rounds.csv", rounds, plan.labels)
    write_curve_summary(output / "summary.csv", summarise_curves(rounds))
    plot_curves(output / "curves.png", rounds)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min" if minutes else "a minute"
