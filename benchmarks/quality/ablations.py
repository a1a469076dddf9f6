"""The ablations of the DeformUX-Net paper (arXiv 2310.00199, table 3) at ``tiny``, beside the paper's numbers.

    python -m benchmarks.quality.ablations                              # 8 variants, 3 seeds, 400 steps each
    python -m benchmarks.quality.ablations --steps 2 --cases 2 --seeds 1    # to try it

Trains on ``train`` and scores ``val`` once at the end of each training. A killed run resumes where it stopped. Adds
each training to data/ablations.json and rewrites the section quality_ablations of ablations.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from benchmarks.common.command import hippocampus, options, placement, run_command, trial_data
from benchmarks.common.plots import strips
from benchmarks.common.report import Section, markdown_table, write_section
from benchmarks.common.trial_report import NOTES, facts, mean_and_deviation, p_text, paired_p
from benchmarks.common.trial_runner import run_trials
from benchmarks.common.trials import Result, Trial


@dataclass(frozen=True)
class Row:
    """A variant: its question, the options of DeformUXNet, and the paper's Dice on three data sets."""

    question: str
    name: str
    amos_kits_pancreas: tuple[float, float, float]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def published_mean(self) -> float:
        """Return the mean over the three data sets, which gives the paper's order."""
        return float(np.mean(self.amos_kits_pancreas))


_BEST = (0.908, 0.720, 0.717)
ROWS = (
    Row("convolution", "depthwise", _BEST),
    Row("convolution", "dense", (0.878, 0.701, 0.682), {"convolution": "dense"}),
    Row("offset kernel", "1×1×1", _BEST),
    Row("offset kernel", "3×3×3", (0.894, 0.713, 0.698), {"offset_kernel": 3}),
    Row("offset planes", "tri-planar", _BEST),
    Row("offset planes", "x-z only", (0.893, 0.694, 0.681), {"offset_planes": "xz"}),
    Row("offset planes", "y-z only", (0.883, 0.712, 0.697), {"offset_planes": "yz"}),
    Row("offset planes", "x-y only", (0.878, 0.701, 0.689), {"offset_planes": "xy"}),
    Row("channel mixing", "MLP", _BEST),
    Row("channel mixing", "depthwise scaling", (0.889, 0.684, 0.679), {"mlp": "depthwise"}),
    Row("channel mixing", "none", (0.879, 0.659, 0.661), {"mlp": "none"}),
)
_HEADS = ("variant", "AMOS", "KiTS", "Pancreas", "paper's place", "parameters", "s per step", "mean Dice here")
_HEADS += ("less the published", "p", "place here", "seeds")


def main() -> None:
    parser = options("ablations", __doc__)
    parser.add_argument("--steps", type=int, default=400, help="of each training")
    arguments = parser.parse_args()
    task = hippocampus(arguments)
    variants = {_title(row): row.options for row in ROWS}
    trials = [
        Trial(f"{title}, seed {seed}", task, options=given, seed=seed, steps=arguments.steps, **placement(arguments))
        for seed in range(arguments.seeds)
        for title, given in variants.items()
    ]

    def report(results: Sequence[Result]) -> None:
        shown = {title: _of(results, given) for title, given in variants.items()}
        shown = {title: own for title, own in shown.items() if own}
        section = Section(
            "ablations",
            "quality_ablations",
            "The paper's ablations on the hippocampus data",
            [
                *facts(results, len(trials), f"`tiny`, {arguments.steps} steps each"),
                *_tables(results),
                *_verdict(results),
                *NOTES,
                "- the paper's numbers are Dice on other data, of its `base` network after 40,000 steps; p is against "
                "the published network, the first row of each table",
            ],
            strips({title: [r.mean("dice") for r in own] for title, own in shown.items()}, "mean Dice"),
        )
        write_section(arguments.results, section)

    run_trials(trials, trial_data(arguments, "ablations"), report, jobs=arguments.jobs)


def _title(row: Row) -> str:
    return f"{row.question} {row.name}" if row.options else "published"


def _of(results: Sequence[Result], given: Mapping[str, Any]) -> list[Result]:
    return [result for result in results if result.trial.options == given]


def _dice(own: Sequence[Result]) -> float:
    return float(np.mean([result.mean("dice") for result in own]))


def _tables(results: Sequence[Result]) -> list[str]:
    lines = []
    published = _of(results, {})
    for question in dict.fromkeys(row.question for row in ROWS):
        group = [row for row in ROWS if row.question == question]
        measured = {row.name: own for row in group if (own := _of(results, row.options))}
        rows = []
        for row in group:
            paper = [f"{value:.3f}" for value in row.amos_kits_pancreas]
            place = 1 + sum(other.published_mean > row.published_mean for other in group)
            own = measured.get(row.name)
            rows.append([row.name, *paper, place, *(_measured(own, published, measured) if own else [""] * 7)])
        lines += [f"### {question}", "", *markdown_table(_HEADS, rows)]
    return lines


def _measured(own: Sequence[Result], published: Sequence[Result], group: Mapping[str, Sequence[Result]]) -> list[str]:
    same = own[0].trial.options == {}
    paces = [result.seconds_per_step for result in own if result.seconds_per_step is not None]
    return [
        f"{own[0].parameters / 1e6:.2f} M",
        f"{np.median(paces):.3f}" if paces else "",
        mean_and_deviation(own),
        f"{_dice(own) - _dice(published):+.4f}" if published and not same else "",
        p_text(paired_p(own, published)) if published and not same else "",
        str(1 + sum(_dice(other) > _dice(own) for other in group.values())),
        str(len(own)),
    ]


def _verdict(results: Sequence[Result]) -> list[str]:
    """State in one sentence how many of the paper's comparisons hold here."""
    published = _of(results, {})
    others = [own for row in ROWS if row.options and (own := _of(results, row.options))]
    if not published or not others:
        return []
    worse = [own for own in others if _dice(own) < _dice(published)]
    clearly = [own for own in worse if (p := paired_p(own, published)) is not None and p < 0.05]
    return [
        f"In the paper the published network is better than each of {len(others)} variants that were measured; here it "
        f"is better than {len(worse)} of them, than {len(clearly)} with p < 0.05.",
        "",
    ]


if __name__ == "__main__":
    run_command(main)
