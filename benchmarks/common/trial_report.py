"""Facts, statistics and remarks of pages that are written from trials."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from benchmarks.common.report import bullets
from benchmarks.common.scores import TOLERANCE_MM
from benchmarks.common.trials import Result
from scipy import stats

__all__ = ["NOTES", "SURFACE", "facts", "mean_and_deviation", "p_text", "paired_p", "spread"]

SURFACE = f"surface Dice at {TOLERANCE_MM:g} mm"
NOTES = (
    "- Dice and distances: mean over labels of the mean over cases; ± is the standard deviation over seeds. HD95 "
    "where a label is missed, or found where there is none, is the volume's diagonal",
    "- p: Wilcoxon's signed-rank test, two-sided, paired over cases, each a mean over labels and seeds",
)
# The signed-rank test cannot reach p < 0.05 with fewer pairs.
_MIN_PAIRS = 6


def facts(results: Sequence[Result], planned: int, *others: str) -> list[str]:
    """Return a list of machine and versions, data, seeds, and the number of trials that are done."""
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
    return [*bullets((*lines, f"{len(results)} of {planned} trials, {state}")), ""]


def mean_and_deviation(results: Sequence[Result], metric: str = "dice") -> str:
    """Return the mean of a metric over seeds ± its standard deviation."""
    return spread([result.mean(metric) for result in results], 2 if metric == "hd95_mm" else 4)


def spread(values: Sequence[float], digits: int) -> str:
    """Return the mean, and from two values on ± the standard deviation."""
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"


def paired_p(one: Sequence[Result], other: Sequence[Result], metric: str = "dice") -> float | None:
    """Return the two-sided p-value of Wilcoxon's signed-rank test over cases, each a mean over labels and seeds.

    None if there are too few cases, or no case differs.
    """
    a, b = (np.mean([np.nanmean(result.per_case(metric), axis=1) for result in some], axis=0) for some in (one, other))
    if len(a) < _MIN_PAIRS or np.array_equal(a, b):
        return None
    return float(stats.wilcoxon(a, b).pvalue)


def p_text(p: float | None) -> str:
    """Format a p-value; an empty text for None."""
    return "" if p is None else f"{p:.1g}" if p < 0.001 else f"{p:.3f}"
