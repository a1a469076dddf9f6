"""The page of the benchmark of any organ: tables of Dice, surface Dice, costs and parts of the plan, and a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from benchmarks.common.plots import figure
from benchmarks.common.report import Section, bullets, markdown_table
from benchmarks.common.trial_report import spread
from benchmarks.quality.any_organ_contenders import ABLATIONS, MAIN_CONTENDERS, PLAN, UNLABELLED
from benchmarks.quality.any_organ_records import OrganRecord, OrganRun
from benchmarks.quality.any_organ_sets import DRAWN_SETS, ORGAN_SETS, TURNED_SETS
from matplotlib.figure import Figure

__all__ = ["any_organ_section"]

# Set and contender to the records of all seeds.
Groups = Mapping[tuple[str, str], Sequence[OrganRecord]]

# Two settings of one peer: its rank is that of the better one on each set.
_PEERS = {"dynunet-adamw": "dynunet"}
_TURNED_FROM = "heart-7"
_NOTES = (
    "- Dice and surface Dice: mean over labels of the mean over the set's `val` scans, on their own grids; ± is the "
    "standard deviation over seeds, which also choose the training cases",
    "- surface Dice: share of both surfaces within one voxel of the other; where slices are thick, one voxel of the "
    "plane of highest resolution (the larger of its sides)",
    "- minutes: of training on the same threads. Reading scans before does not count; measuring and choosing a plan "
    "does. DeformUX-Net takes a number of steps that is timed before, so that its seconds differ a little",
    "- `fixed`: the defaults of `make demo` before there was a plan, which took the first of several sequences; the "
    "recipe of both holds steps with clicks",
    "- `plan`: nothing set by hand; `plan-without-…`: one part replaced by that of `fixed`; = where both are the same",
    f"- `{UNLABELLED}`: the plan, which also learns from those scans of `train` that are not trained on with their "
    "labels",
    "- `dynunet`: MONAI's DynUNet with strides, kernels, spacing and patch by nnU-Net's published rules, except that a "
    "step has at most the voxels of the plan's step instead of a GPU's memory; nnU-Net's augmentation with MONAI's "
    "transforms, oversampling, deep supervision, SGD with its polynomial rate over the minutes; `dynunet-adamw` with "
    "AdamW in one cycle instead. Windows overlap by half, without mirroring",
    "- `monailabel`: the radiology app of MONAI Label, unchanged, with the set's label names, trained and asked "
    "through its own server: its SegResNet, spacing, trainer and validation split. Its pretrained weights are for "
    "other labels and come from the internet: not used. The first sequence of several only",
    "- ranks: of the mean Dice over seeds, on sets where all of plan, fixed, dynunet and monailabel are done; the "
    "better of both optimizers counts for dynunet",
    "- `ct`: one scan, trained on the lower half of the slices and scored on the upper; labels with at least 50 voxels "
    "in each",
)


def any_organ_section(records: Mapping[str, OrganRecord], runs: Sequence[OrganRun]) -> Section:
    """Write the section of all runs that share minutes, device and threads.

    Args:
        records: by the names of their runs; runs without one are not done yet.
        runs: of which the section is.
    """
    groups: dict[tuple[str, str], list[OrganRecord]] = {}
    for run in runs:
        if run.name in records:
            groups.setdefault((run.organ, run.contender), []).append(records[run.name])
    first = runs[0]
    place = "" if first.device == "cpu" else f"_{first.device.partition(':')[0]}"
    done = sum(run.name in records for run in runs)
    lines = [
        *bullets(_facts(groups, done, len(runs))),
        "",
        *_sets(groups),
        *_table("Mean Dice", groups, MAIN_CONTENDERS, tuple(ORGAN_SETS), lambda own: _mean(own, "dice")),
        *_ranks(groups),
        *_table(
            "Surface Dice at one voxel",
            groups,
            MAIN_CONTENDERS,
            tuple(ORGAN_SETS),
            lambda own: _mean(own, "surface_dice"),
        ),
        *_with_unlabelled(groups),
        *_parts(groups),
        *_turned(groups),
        *_drawn(groups),
        *_table("Steps and seconds of training", groups, MAIN_CONTENDERS, tuple(ORGAN_SETS), _cost),
        *_plans(groups),
        *_NOTES,
    ]
    return Section(
        "any_organ",
        f"any_organ_{first.minutes:g}_minutes{place}",
        f"{first.minutes:g} minutes on {f'{first.threads} CPU threads' if not place else first.device}",
        lines,
        _plot(groups) if groups else None,
    )


def _facts(groups: Groups, done: int, planned: int) -> list[str]:
    records = [record for own in groups.values() for record in own]
    machine = dict.fromkeys(line for record in records for line in record.machine)
    hours = sum(record.seconds + record.scoring_seconds for record in records) / 3600
    state = "all" if done == planned else "**so far**"
    return [*machine, f"{done} of {planned} runs, {state}; training and scoring took {hours:.1f} hours"]


def _sets(groups: Groups) -> list[str]:
    """Return a table of how many cases are trained on and scored."""
    firsts = {organ: own[0] for (organ, _), own in groups.items() if own[0].scores}
    rows = [
        (organ, ORGAN_SETS[organ].folder, len(first.training_cases), len(first.scores), len(first.labels))
        for organ in ORGAN_SETS
        if (first := firsts.get(organ)) is not None
    ]
    return markdown_table(("set", "folder", "training cases", "scored", "labels"), rows) if rows else []


def _table(
    title: str,
    groups: Groups,
    contenders: Sequence[str],
    sets: Sequence[str],
    cell: Callable[[Sequence[OrganRecord]], str],
) -> list[str]:
    """Return a table with a row per set and a column per contender."""
    used = [name for name in contenders if any((organ, name) in groups for organ in sets)]
    rows = [
        [organ, *(cell(groups[organ, name]) if (organ, name) in groups else "" for name in used)]
        for organ in sets
        if any((organ, name) in groups for name in used)
    ]
    return [f"### {title}", "", *markdown_table(("set", *used), rows)] if rows else []


def _mean(own: Sequence[OrganRecord], metric: str) -> str:
    scored = [record.mean(metric) for record in own if record.scores]
    return spread(scored, 3) if scored else "="


def _cost(own: Sequence[OrganRecord]) -> str:
    steps, seconds = (np.mean([getattr(record, name) for record in own]) for name in ("steps", "seconds"))
    return f"{steps:.0f} in {seconds:.0f} s, {np.mean([r.scoring_seconds for r in own]):.0f} s to score"


def _dice(groups: Groups, organ: str, name: str) -> float | None:
    scored = [record.mean("dice") for record in groups.get((organ, name), ()) if record.scores]
    return float(np.mean(scored)) if scored else None


def _ranks(groups: Groups) -> list[str]:
    """Return a line with the mean rank of the plan, the fixed defaults and both peers."""
    families = tuple(dict.fromkeys(_PEERS.get(name, name) for name in MAIN_CONTENDERS))
    ranks: dict[str, list[float]] = {family: [] for family in families}
    for organ in ORGAN_SETS:
        best: dict[str, float] = {}
        for name in MAIN_CONTENDERS:
            family, dice = _PEERS.get(name, name), _dice(groups, organ, name)
            if dice is not None:
                best[family] = max(dice, best.get(family, -1.0))
        if len(best) == len(families):
            for family, dice in best.items():
                ranks[family].append(1 + sum(other > dice for other in best.values()))
    count = len(ranks[PLAN])
    if not count:
        return []
    means = sorted((float(np.mean(own)), family) for family, own in ranks.items())
    gained = [
        (a, b) for organ in ORGAN_SETS if (a := _dice(groups, organ, PLAN)) and (b := _dice(groups, organ, "fixed"))
    ]
    return [
        f"Mean rank over {count} sets: {', '.join(f'{family} {rank:.2f}' for rank, family in means)}. "
        f"The plan is better than the fixed defaults on {sum(a > b for a, b in gained)} of {len(gained)} sets, by at "
        f"least 0.10 on {sum(a >= b + 0.1 for a, b in gained)}.",
        "",
    ]


def _with_unlabelled(groups: Groups) -> list[str]:
    """Return a table of the plan with and without the scans that have no label, and what those took and gave."""
    sets = tuple(organ for organ in ORGAN_SETS if (organ, UNLABELLED) in groups)
    if not sets:
        return []
    title = "Mean Dice without and with the scans that have no label"
    return _table(title, groups, (PLAN, UNLABELLED), sets, lambda own: f"{_mean(own, 'dice')} ({_cost(own)})")


def _parts(groups: Groups) -> list[str]:
    """Return a table of the plan without each of its parts: Dice, and what is lost against the plan."""

    def cell(organ: str, name: str) -> str:
        own, whole = groups.get((organ, name)), groups.get((organ, PLAN))
        if not own or not whole:
            return ""
        if not any(record.scores for record in own):
            return "="
        # The seeds that both have.
        of_plan = {record.training_cases: record.mean("dice") for record in whole}
        pairs = [(r.mean("dice"), of_plan[r.training_cases]) for r in own if r.scores and r.training_cases in of_plan]
        lost = np.mean([a - b for a, b in pairs]) if pairs else np.nan
        return f"{_mean(own, 'dice')} ({lost:+.3f})"

    names = [name for name in ABLATIONS if any((organ, name) in groups for organ in ORGAN_SETS)]
    rows = [
        [organ, *(cell(organ, name) for name in names)]
        for organ in ORGAN_SETS
        if any((organ, name) in groups for name in names)
    ]
    heads = ("set", *(name.removeprefix(f"{PLAN}-") for name in names))
    return ["### Mean Dice of the plan without one of its parts", "", *markdown_table(heads, rows)] if rows else []


def _turned(groups: Groups) -> list[str]:
    """Return a table of scans with turned headers beside those as they are."""
    if not any(organ in TURNED_SETS for organ, _ in groups):
        return []
    table = _table(
        "Headers turned to short-axis angles, voxels as they are",
        groups,
        (PLAN, "fixed"),
        (_TURNED_FROM, *TURNED_SETS),
        lambda own: _mean(own, "dice"),
    )
    return [*table, "One rotation for all scans (`alike`), or one for each.", ""]


def _drawn(groups: Groups) -> list[str]:
    """Return a table of labels of which only a part was drawn beside whole ones."""
    sets = tuple(organ for organ in DRAWN_SETS if any(own == organ for own, _ in groups))
    if not sets:
        return []
    title = "Whole labels of 20 hearts, strokes that people drew in them, and every third slice of them"
    return _table(title, groups, (PLAN, UNLABELLED), sets, lambda own: f"{_mean(own, 'dice')} ({_cost(own)})")


def _plans(groups: Groups) -> list[str]:
    """Return a list of what was planned for each set, by its first seed."""
    lines = []
    for organ in ORGAN_SETS:
        if (organ, PLAN) in groups:
            settings = groups[organ, PLAN][0].settings
            prep = settings["preprocessing"]
            spacing = " × ".join(f"{size:.3g}" for size in prep["spacing_mm"] or ()) or "the scans' own"
            batch = settings["recipe"].get("batch_size", "")
            lines.append(
                (organ, prep.get("frame", "ras"), spacing, "×".join(map(str, prep["patch_size"])), str(batch),
                 _strides(settings.get("strides")), f"{groups[organ, PLAN][0].plan_seconds:.0f}")
            )  # fmt: skip
    heads = ("set", "frame", "spacing mm", "patch", "batch", "strides", "seconds")
    return ["### The plan of the first seed", "", *markdown_table(heads, lines)] if lines else []


def _strides(strides: Sequence[Sequence[int]] | None) -> str:
    return "published" if strides is None else " ".join("".join(map(str, stage)) for stage in strides)


def _plot(groups: Groups) -> Figure:
    """Plot a row per set and a colour per contender, with a point per seed."""
    sets = [organ for organ in ORGAN_SETS if any(organ == own for own, _ in groups)] or [
        organ for organ in TURNED_SETS if any(organ == own for own, _ in groups)
    ]
    plot = figure(height=1.6 + 0.5 * len(sets))
    axes = plot.add_subplot()
    for number, name in enumerate(MAIN_CONTENDERS):
        points = [
            (record.mean("dice"), row + 0.13 * (number - 2))
            for row, organ in enumerate(sets)
            for record in groups.get((organ, name), ())
            if record.scores
        ]
        if points:
            axes.plot(*zip(*points, strict=True), "o", color=f"C{number}", alpha=0.7, label=name)
    axes.set_yticks(range(len(sets)), sets)
    axes.invert_yaxis()
    axes.set_xlabel("mean Dice")
    axes.grid(alpha=0.3, axis="x")
    if axes.lines:
        axes.legend(loc="best", fontsize="small")
    return plot
