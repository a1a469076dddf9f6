"""Tables, CSV files and plots of results."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from benchmarks.common.scores import METRICS, TOLERANCE_MM
from benchmarks.common.trials import Result
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import stats

from deformux.data.atomic_files import replacing, write_text

__all__ = [
    "NOTES",
    "SURFACE",
    "case_rows",
    "facts",
    "figure",
    "mean_and_deviation",
    "paired_p",
    "significant",
    "spread",
    "strips",
    "table",
    "write_report",
]

SURFACE = f"surface Dice at {TOLERANCE_MM:g} mm"
NOTES = (
    "- Dice and distances: mean over labels of the mean over cases; ± is the standard deviation over seeds. HD95 "
    "where a label is missed, or found where there is none, is the volume's diagonal",
    "- p: Wilcoxon's signed-rank test, two-sided, paired over cases, each a mean over labels and seeds",
)
# The signed-rank test cannot reach p < 0.05 with fewer pairs.
_FEWEST_PAIRS = 6


def write_report(
    folder: Path,
    name: str,
    *,
    title: str,
    lines: Iterable[str],
    rows: Iterable[Sequence[object]],
    plot: Figure | None = None,
) -> None:
    """Replace ``quality_<name>.md``, ``.csv`` and, where there is a plot, ``.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"quality_{name}.md", "\n".join([f"# {title}", "", *lines]) + "\n")
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    write_text(folder / f"quality_{name}.csv", text.getvalue())
    if plot is not None:
        with replacing(folder / f"quality_{name}.png") as temporary:
            plot.savefig(temporary, format="png")


def facts(results: Sequence[Result], planned: int, *others: str) -> list[str]:
    """What a reader must know, as a list: machine and versions, the data, the seeds, how much is done."""
    machine = dict.fromkeys(line for result in results for line in result.machine)
    lines = [*machine, *others]
    if results:
        task = results[0].trial.task
        seeds = sorted({result.trial.seed for result in results})
        patches = dict.fromkeys("×".join(map(str, result.trial.task.prep.patch_size)) for result in results)
        lines += [
            f"tested on {len(task.test)} volumes that took no part in training, on their own grids",
            f"seeds {', '.join(map(str, seeds))}; batch {task.recipe.batch_size}, patch "
            f"{' or '.join(patches)}; training took {sum(r.seconds for r in results):.0f} s in all",
        ]
    state = "all" if len(results) == planned else "**so far**"
    return [*(f"- {line}" for line in (*lines, f"{len(results)} of {planned} trials, {state}")), ""]


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """A Markdown table, and an empty line."""
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return [*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows), ""]


def case_rows(results: Sequence[Result]) -> list[list[object]]:
    """One row for each trial and test case, below a head."""
    if not results:
        return []
    columns = [f"{metric}_{label}" for metric in METRICS for label in results[0].trial.task.labels]
    rows: list[list[object]] = [["trial", "network", "size", "seed", "steps", "seconds", "case", *columns]]
    for result in results:
        trial = result.trial
        start = [trial.title, trial.network, trial.size, trial.seed, result.steps, f"{result.seconds:.1f}"]
        for case, values in result.scores.items():
            numbers = ["" if v is None else f"{v:.4f}" for metric in METRICS for v in values[metric]]
            rows.append([*start, case, *numbers])
    return rows


def mean_and_deviation(results: Sequence[Result], metric: str = "dice") -> str:
    """Mean of a metric over seeds ± their standard deviation."""
    return spread([result.mean(metric) for result in results], 2 if metric == "hd95_mm" else 4)


def spread(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation, the latter from two values on."""
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"


def paired_p(one: Sequence[Result], other: Sequence[Result], metric: str = "dice") -> float | None:
    """Wilcoxon's signed-rank test over cases, each a mean over labels and seeds: the p-value, two-sided.

    None where there are too few cases, or nothing differs.
    """
    a, b = (np.mean([np.nanmean(result.per_case(metric), axis=1) for result in some], axis=0) for some in (one, other))
    if len(a) < _FEWEST_PAIRS or np.array_equal(a, b):
        return None
    return float(stats.wilcoxon(a, b).pvalue)


def significant(p: float | None) -> str:
    """A p-value as text."""
    return "" if p is None else f"{p:.1g}" if p < 0.001 else f"{p:.3f}"


def figure(width: float = 8, height: float = 5) -> Figure:
    """An empty figure that needs no display."""
    empty = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(empty)
    return empty


def strips(groups: Mapping[str, Sequence[float]], axis: str) -> Figure:
    """A row for each group, best first: a point per seed, and a bar at their mean."""
    groups = dict(sorted(groups.items(), key=lambda item: np.mean(item[1])))
    plot = figure(height=1.2 + 0.35 * len(groups))
    axes = plot.add_subplot()
    for row, values in enumerate(groups.values()):
        axes.plot(values, [row] * len(values), "o", color="C0", alpha=0.6)
        axes.plot([np.mean(values)], [row], "|", color="black", markersize=14)
    axes.set_yticks(range(len(groups)), list(groups))
    axes.set_xlabel(axis)
    axes.grid(alpha=0.3, axis="x")
    return plot
