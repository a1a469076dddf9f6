"""DeformUX-Net and MONAI's networks of like size, with the same data, augmentation, optimiser and batch.

    python -m benchmarks.quality.equal_budget                                  # 400 steps each
    python -m benchmarks.quality.equal_budget --budget seconds --seconds 300   # as many steps as fit into 300 s
    python -m benchmarks.quality.equal_budget --budget seconds --seconds 600 --patch-size 32 48 32
    python -m benchmarks.quality.equal_budget --learning-rate 2e-3 --patch-size 32 48 32   # another recipe
    python -m benchmarks.quality.equal_budget --steps 2 --cases 2 --seeds 1    # to try it

Trains on ``train`` and scores ``val`` once at the end of each training. A killed run resumes where it stopped. Start
the same command twice to share the work (with --threads 1 each; not if the budget is seconds). Adds each training to
data/equal_budget.json and rewrites a section of comparison.md: quality_equal_steps or, for 300 s,
quality_equal_300_seconds, with the learning rate in its name if it is given. ``--variant captured`` keeps trials of
another implementation apart, in data/equal_budget_captured.json and a section quality_equal_…_captured.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.common.command import (
    PATCH_SIZE,
    at_learning_rate,
    hippocampus,
    options,
    placement,
    run_command,
    trial_data,
)
from benchmarks.common.comparison import COST_NOTES, comparison_plot, comparison_tables, network_trials
from benchmarks.common.networks import NETWORKS, SIZES
from benchmarks.common.report import Section, write_section
from benchmarks.common.trial_report import NOTES, facts
from benchmarks.common.trial_runner import run_trials
from benchmarks.common.trials import Result


def main() -> None:
    parser = options("equal_budget", __doc__)
    parser.add_argument("--budget", choices=("steps", "seconds"), default="steps", help="what is equal")
    parser.add_argument("--steps", type=int, default=400, help="of each training")
    parser.add_argument("--seconds", type=float, default=300.0, help="of each training, with --budget seconds")
    parser.add_argument(
        "--patch-size", nargs=3, type=int, default=PATCH_SIZE, help="by default one that holds a whole volume"
    )
    parser.add_argument("--learning-rate", type=float, help="instead of that of all benchmarks")
    parser.add_argument("--variant", help="name of another implementation, whose trials are kept apart")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=SIZES, help="which sizes")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS, help="which networks")
    arguments = parser.parse_args()
    seconds = arguments.seconds if arguments.budget == "seconds" else None
    if seconds is None:
        name, budget = "quality_equal_steps", f"{arguments.steps} steps"
    else:
        name = f"quality_equal_{seconds:g}_seconds"
        budget = f"{seconds:g} seconds of training, in steps by the time of some that were measured before"
    task = hippocampus(arguments, patch_size=tuple(arguments.patch_size))
    task, name = at_learning_rate(task, name, arguments.learning_rate)
    title = f"{arguments.steps} equal steps" if seconds is None else f"{seconds:g} equal seconds"
    benchmark = "equal_budget"
    if arguments.learning_rate is not None:
        title += f", learning rate {arguments.learning_rate:g}"
    if arguments.variant:
        title += f", {arguments.variant}"
        name += f"_{arguments.variant}"
        benchmark += f"_{arguments.variant}"
        arguments.work /= arguments.variant
    trials = network_trials(
        task,
        arguments.networks,
        arguments.sizes,
        arguments.seeds,
        steps=arguments.steps,
        seconds=seconds,
        **placement(arguments),
    )

    def report(results: Sequence[Result]) -> None:
        section = Section(
            "comparison",
            name,
            title,
            [
                *facts(results, len(trials), f"each network had {budget}, at a rate of {task.recipe.learning_rate:g}"),
                *comparison_tables(results),
                *NOTES,
                *COST_NOTES,
            ],
            comparison_plot(results),
        )
        write_section(arguments.results, section)

    run_trials(trials, trial_data(arguments, benchmark), report, jobs=arguments.jobs)


if __name__ == "__main__":
    run_command(main)
