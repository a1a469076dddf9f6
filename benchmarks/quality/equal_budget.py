"""DeformUX-Net against MONAI's networks of like size, with the same data, augmentation, optimiser and batch.

    python -m benchmarks.quality.equal_budget                                  # 400 steps each
    python -m benchmarks.quality.equal_budget --budget seconds --seconds 300   # as many steps as fit into 300 s
    python -m benchmarks.quality.equal_budget --budget seconds --seconds 600 --patch-size 32 48 32
    python -m benchmarks.quality.equal_budget --learning-rate 2e-3 --patch-size 32 48 32   # another recipe
    python -m benchmarks.quality.equal_budget --steps 2 --cases 2 --seeds 1    # to try it

Trains on ``train`` and scores ``val`` once at the end of each training. A run that was killed goes on where it
stopped; the same command, started a second time meanwhile, shares the work (give each --threads 1; not where the
budget is seconds). Writes quality_equal_steps or, for 300 s, quality_equal_300_seconds (.md, .csv, .png) after each
training, with its learning rate in the name where that is given.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.common.command import PATCH_SIZE, at_learning_rate, hippocampus, options, placement, run
from benchmarks.common.comparison import COST_NOTES, comparison, comparison_plot, network_trials
from benchmarks.common.networks import NETWORKS, SIZES
from benchmarks.common.report import NOTES, case_rows, facts, write_report
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
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=SIZES, help="which sizes")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS, help="which networks")
    arguments = parser.parse_args()
    seconds = arguments.seconds if arguments.budget == "seconds" else None
    if seconds is None:
        name, budget = "equal_steps", f"{arguments.steps} steps"
    else:
        name = f"equal_{seconds:g}_seconds"
        budget = f"{seconds:g} seconds of training, in steps by the time of some that were measured before"
    task = hippocampus(arguments, patch_size=tuple(arguments.patch_size))
    task, name = at_learning_rate(task, name, arguments.learning_rate)
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
        write_report(
            arguments.results,
            name,
            title=f"Equal {arguments.budget} on the hippocampus data",
            lines=[
                *facts(results, len(trials), f"each network had {budget}, at a rate of {task.recipe.learning_rate:g}"),
                *comparison(results),
                *NOTES,
                *COST_NOTES,
            ],
            rows=case_rows(results),
            plot=comparison_plot(results),
        )

    run_trials(trials, arguments.work, report, jobs=arguments.jobs)


if __name__ == "__main__":
    run(main)
