"""Dice over the number of labelled volumes: from scratch, and from weights that learnt something else before.

    python -m benchmarks.quality.few_labels                                     # 7 counts, 3 starts, 3 seeds
    python -m benchmarks.quality.few_labels --starts scratch --counts 1 10 --learning-rate 2e-3  # another recipe
    python -m benchmarks.quality.few_labels --steps 2 --earlier-steps 2 --cases 2 --seeds 1 --counts 1 2  # to try it

The starts are ``scratch``; ``synthetic``, weights that learnt the four labels of the synthetic abdominal cohort; and
``other label``, weights that learnt the anterior part alone on all of ``train``. The last have seen the volumes and
one of the two labels: only the posterior part's Dice compares them fairly. The seed draws the volumes, smaller sets
being part of larger ones; every training has the same number of steps. ``val`` is scored once at the end of each. A
killed run resumes where it stopped. Adds each training to data/few_labels.json and rewrites a section of few_labels.md:
quality_few_labels or, with another learning rate, quality_few_labels_at_0.002.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from benchmarks.common.command import at_learning_rate, hippocampus, options, placement, run_command, trial_data
from benchmarks.common.plots import figure
from benchmarks.common.report import Section, markdown_table, write_section
from benchmarks.common.trial_report import NOTES, facts
from benchmarks.common.trial_runner import run_trials
from benchmarks.common.trials import Result, Task, Trial, model_file
from filelock import FileLock
from matplotlib.figure import Figure

from deformux.data.atomic_files import replacing
from deformux.data.cases import Case, find_cases
from deformux.data.synthetic import LABELS, write_cohort
from deformux.interactive.simulated_annotator import dense_labels

COUNTS = (1, 2, 5, 10, 20, 40, 160)
STARTS = ("scratch", "synthetic", "other label")
_COHORT = 40
_SEEN = "- `other label` had learnt the anterior part on all training volumes: compare its posterior part only"


def main() -> None:
    parser = options("few_labels", __doc__)
    parser.add_argument("--counts", nargs="+", type=int, default=COUNTS, help="labelled volumes")
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=STARTS, help="from which weights")
    parser.add_argument("--learning-rate", type=float, help="instead of that of all benchmarks")
    parser.add_argument("--steps", type=int, default=300, help="of each training on few labels")
    parser.add_argument("--earlier-steps", type=int, default=600, help="of the two trainings to start from")
    arguments = parser.parse_args()
    # Which best_model chose: more steps in the same time.
    task = hippocampus(arguments, patch_size=(32, 48, 32))
    data = trial_data(arguments, "few_labels")
    weights: dict[str, Path | None] = {"scratch": None}
    if set(arguments.starts) - set(weights):
        earlier = run_trials(_earlier_trials(task, arguments), data, jobs=arguments.jobs)
        weights |= {r.trial.title: model_file(arguments.work, r.trial.name) for r in earlier}
    task, name = at_learning_rate(task, "quality_few_labels", arguments.learning_rate)
    trials = [
        Trial(
            f"{start}, {count} labelled, seed {seed}",
            dataclasses.replace(task, train=_drawn(task.train, count, seed)),
            seed=seed,
            steps=arguments.steps,
            start_from=weights[start],
            **placement(arguments),
        )
        for seed in range(arguments.seeds)
        for count in arguments.counts
        for start in arguments.starts
    ]

    rate = "" if arguments.learning_rate is None else f", learning rate {arguments.learning_rate:g}"

    def report(results: Sequence[Result]) -> None:
        steps = f"`tiny`, {arguments.steps} steps each, learning rate {task.recipe.learning_rate:g}"
        if len(weights) > 1:
            steps += f"; weights to start from learnt {arguments.earlier_steps} steps"
        section = Section(
            "few_labels",
            name,
            f"Few labelled volumes of the hippocampus data{rate}",
            [
                *facts(results, len(trials), steps),
                *_tables(results, arguments.counts, arguments.starts),
                *NOTES,
                *([_SEEN] if "other label" in arguments.starts else []),
            ],
            _plot(results, arguments.starts),
        )
        write_section(arguments.results, section)

    run_trials(trials, data, report, jobs=arguments.jobs)


def _earlier_trials(task: Task, arguments: argparse.Namespace) -> list[Trial]:
    folder = arguments.work / "data"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        synthetic = folder / "synthetic"
        if not (synthetic / "dataset.json").is_file():  # which is written last
            write_cohort(synthetic, volumes=min(_COHORT, arguments.cases or _COHORT))
        anterior = [_anterior_only(case, folder / "anterior") for case in (*task.train, *task.test)]
    phantoms = tuple(find_cases(synthetic))
    given = {"steps": arguments.earlier_steps, "keep_model": True, **placement(arguments)}
    # An abdomen is not symmetric. The preprocessing is that of the task that follows.
    unmirrored = task.recipe.replace(flip_axes=(), foreground_ratio=0.75)
    seen = dataclasses.replace(task, labels=LABELS, recipe=unmirrored, train=phantoms, test=phantoms[-5:])
    part = dataclasses.replace(
        task, labels=("anterior",), train=tuple(anterior[: len(task.train)]), test=tuple(anterior[len(task.train) :])
    )
    return [Trial("synthetic", seen, **given), Trial("other label", part, **given)]


def _anterior_only(case: Case, folder: Path) -> Case:
    """Return the case with the label of its anterior part alone."""
    path = folder / case.label.name
    if not path.is_file():
        file = nib.load(case.label)
        with replacing(path) as temporary:
            nib.save(nib.Nifti1Image(dense_labels(np.asarray(file.dataobj), [1]), file.affine), temporary)
    return dataclasses.replace(case, label=path)


def _drawn(cases: Sequence[Case], count: int, seed: int) -> tuple[Case, ...]:
    order = np.random.default_rng(seed).permutation(len(cases))
    return tuple(cases[index] for index in order[:count])


def _start(result: Result) -> str:
    return result.trial.title.partition(",")[0]


def _values(results: Sequence[Result], start: str, count: int, column: int | None) -> list[float]:
    """Return the Dice of each seed: of a label, or the mean over labels."""
    own = [r for r in results if _start(r) == start and len(r.trial.task.train) == count]
    return [r.mean("dice") if column is None else float(np.nanmean(r.per_case("dice")[:, column])) for r in own]


def _tables(results: Sequence[Result], counts: Sequence[int], starts: Sequence[str]) -> list[str]:
    lines = []
    for what, column in (("mean Dice", None), ("Dice of the anterior part", 0), ("Dice of the posterior part", 1)):
        rows = []
        for count in counts:
            scratch = _values(results, "scratch", count, column)
            cells = []
            for start in starts:
                values = _values(results, start, count, column)
                spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
                gain = (
                    f" ({np.mean(values) - np.mean(scratch):+.4f})" if values and start != "scratch" and scratch else ""
                )
                cells.append(f"{np.mean(values):.4f}{spread}{gain}" if values else "")
            rows.append([count, *cells])
        lines += [f"### {what}", "", *markdown_table(("labelled", *starts), rows)]
    return lines


def _plot(results: Sequence[Result], starts: Sequence[str]) -> Figure:
    plot = figure(width=10, height=4.2)
    for index, (what, column) in enumerate((("mean Dice", None), ("Dice of the posterior part", 1))):
        axes = plot.add_subplot(1, 2, index + 1)
        for start in starts:
            counts = sorted({len(r.trial.task.train) for r in results if _start(r) == start})
            values = [_values(results, start, count, column) for count in counts]
            axes.errorbar(counts, [np.mean(v) for v in values], [np.std(v) for v in values], marker="o", label=start)
        axes.set_xscale("log")
        axes.set_xticks(COUNTS, [str(count) for count in COUNTS])
        axes.set_xlabel("labelled volumes")
        axes.set_ylabel(what)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    return plot


if __name__ == "__main__":
    run_command(main)
