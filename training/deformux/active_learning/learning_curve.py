"""Learning curves over labelled volumes: their area, paired comparisons, tables and plot."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import stats
from scipy.integrate import trapezoid

from deformux.data.atomic_files import replacing, write_text

__all__ = [
    "CurveSummary",
    "SimulatedRound",
    "area_under_budget_curve",
    "paired_difference",
    "plot_curves",
    "read_rounds",
    "summarise_curves",
    "write_curve_summary",
    "write_rounds",
]

BASELINE = "random"


@dataclass(frozen=True)
class SimulatedRound:
    """One training of a simulation, and its Dice on the fixed test set (NaN for a label that is in no case)."""

    strategy: str
    seed: int
    round: int
    labelled: tuple[str, ...]
    mean_dice: float
    dice: tuple[float, ...]
    seconds: float


@dataclass(frozen=True)
class CurveSummary:
    """A strategy over all seeds: mean and 95 % half width of the area, and of its difference to random."""

    strategy: str
    seeds: int
    area: float
    area_half_width: float
    final_dice: float
    difference: float | None
    difference_half_width: float | None


def area_under_budget_curve(budget: Sequence[float], dice: Sequence[float]) -> float:
    """Return the mean Dice over the budget: trapezoids over labelled volumes, divided by their range (AUBC).

    Zhan et al., "A comparative survey: benchmarking for pool-based active learning", IJCAI 2021, 634. A single round is
    its own mean.
    """
    if len(budget) == 1:
        return float(dice[0])
    return float(trapezoid(dice, budget) / (budget[-1] - budget[0]))


def paired_difference(values: Sequence[float], reference: Sequence[float]) -> tuple[float, float]:
    """Return the mean difference of values paired by seed, and the half width of its 95 % interval (Student's t).

    The half width is NaN for a single pair.
    """
    return _mean_and_half_width(np.subtract(values, reference))


def summarise_curves(rounds: Iterable[SimulatedRound]) -> list[CurveSummary]:
    """Summarise each strategy in order of appearance, over the seeds with as many rounds as the longest curve."""
    curves: dict[str, dict[int, list[SimulatedRound]]] = {}
    for row in sorted(rounds, key=lambda row: row.round):
        curves.setdefault(row.strategy, {}).setdefault(row.seed, []).append(row)
    longest = max((len(curve) for seeds in curves.values() for curve in seeds.values()), default=0)
    areas = {
        strategy: {
            seed: area_under_budget_curve([len(r.labelled) for r in curve], [r.mean_dice for r in curve])
            for seed, curve in seeds.items()
            if len(curve) == longest
        }
        for strategy, seeds in curves.items()
    }
    baseline = areas.get(BASELINE, {})
    result = []
    for strategy, by_seed in areas.items():
        if not by_seed:
            continue
        area, area_half_width = _mean_and_half_width(np.array(list(by_seed.values())))
        shared = [seed for seed in by_seed if seed in baseline]
        difference: tuple[float | None, float | None] = (None, None)
        if strategy != BASELINE and shared:
            difference = paired_difference([by_seed[s] for s in shared], [baseline[s] for s in shared])
        final = float(np.mean([curves[strategy][seed][-1].mean_dice for seed in by_seed]))
        result.append(CurveSummary(strategy, len(by_seed), area, area_half_width, final, *difference))
    return result


def write_rounds(path: Path, rounds: Iterable[SimulatedRound], labels: Sequence[str]) -> None:
    """Write a CSV file with one row per training."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(
        [
            "strategy",
            "seed",
            "round",
            "labelled",
            "mean_dice",
            *(f"dice_{label}" for label in labels),
            "seconds",
            "cases",
        ]
    )
    for row in rounds:
        dice = [f"{value:.6f}" for value in (row.mean_dice, *row.dice)]
        writer.writerow(
            [row.strategy, row.seed, row.round, len(row.labelled), *dice, f"{row.seconds:.1f}", " ".join(row.labelled)]
        )
    write_text(path, text.getvalue())


def read_rounds(path: Path) -> list[SimulatedRound]:
    """Return the trainings of a CSV file of ``write_rounds``; none if there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [
            SimulatedRound(
                strategy=row["strategy"],
                seed=int(row["seed"]),
                round=int(row["round"]),
                labelled=tuple(row["cases"].split()),
                mean_dice=float(row["mean_dice"]),
                dice=tuple(float(value) for name, value in row.items() if name.startswith("dice_")),
                seconds=float(row["seconds"]),
            )
            for row in csv.DictReader(file)
        ]


def write_curve_summary(path: Path, summary: Iterable[CurveSummary]) -> None:
    """Write a CSV file with one row per strategy; unknown values are empty."""
    text = io.StringIO()
    writer = csv.writer(text)
    columns = [field.name for field in fields(CurveSummary)]
    writer.writerow(columns)
    for line in summary:
        values = [getattr(line, column) for column in columns]
        writer.writerow([f"{value:.6f}" if isinstance(value, float) else value for value in values])
    write_text(path, text.getvalue())


def plot_curves(path: Path, rounds: Sequence[SimulatedRound]) -> None:
    """Plot into a PNG file: mean Dice against labelled volumes, a thin line per seed and a thick one per strategy."""
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    strategies = list(dict.fromkeys(row.strategy for row in rounds))
    for index, strategy in enumerate(strategies):
        rows = sorted((row for row in rounds if row.strategy == strategy), key=lambda row: (row.seed, row.round))
        colour = f"C{index}"
        for seed in dict.fromkeys(row.seed for row in rows):
            curve = [(len(row.labelled), row.mean_dice) for row in rows if row.seed == seed]
            axes.plot(*zip(*curve, strict=True), color=colour, linewidth=0.7, alpha=0.35)
        budgets = sorted({len(row.labelled) for row in rows})
        means = [np.mean([row.mean_dice for row in rows if len(row.labelled) == budget]) for budget in budgets]
        axes.plot(budgets, means, color=colour, linewidth=2.2, marker="o", markersize=4, label=strategy)
    axes.set_xlabel("labelled volumes")
    axes.set_ylabel("mean Dice on the fixed test set")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _mean_and_half_width(values: np.ndarray) -> tuple[float, float]:
    n = len(values)
    if n < 2:
        return float(np.mean(values)), math.nan
    return float(np.mean(values)), float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n))
