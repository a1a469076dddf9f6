"""Tables and a plot that compare DeformUX-Net with other networks of its size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from benchmarks.common.networks import NETWORKS, OURS, SIZES
from benchmarks.common.plots import strips
from benchmarks.common.report import markdown_table
from benchmarks.common.trial_report import SURFACE, mean_and_deviation, p_text, paired_p
from benchmarks.common.trials import Result, Task, Trial
from matplotlib.figure import Figure

__all__ = ["COST_NOTES", "comparison_plot", "comparison_tables", "network_trials"]

_MAX_LABELS = 4  # with a column each
COST_NOTES = (
    "- GMAC: of one patch, convolutions and matrix products as PyTorch counts them, plus the deformable convolutions "
    "with their interpolation; normalisation, activations and sums are not counted",
    "- memory: the largest of the training process (on a GPU: what PyTorch had allocated), volumes included",
    "- where several trainings ran at a time, they waited for each other: their times are not comparable",
    "- float32 convolutions on CPUs are those of `deformux.networks.fast_cpu_conv` in every network",
    "- p is against DeformUX-Net of the same size",
)


def network_trials(
    task: Task, networks: Sequence[str], sizes: Sequence[str], seeds: int, **options: object
) -> list[Trial]:
    """Return trials of every network, size and seed, all networks before the next seed: early tables compare too."""
    return [
        Trial(f"{network} {size}, seed {seed}", task, network, size, seed=seed, **options)  # type: ignore[arg-type]
        for seed in range(seeds)
        for size in sizes
        for network in networks
    ]


def comparison_tables(results: Sequence[Result]) -> list[str]:
    """Return a Markdown table for each size, best Dice first."""
    lines = []
    for size in SIZES:
        groups = _groups(results, size)
        if not groups:
            continue
        labels = next(iter(groups.values()))[0].trial.task.labels
        labels = labels if len(labels) <= _MAX_LABELS else ()
        heads = ("network", "parameters", "GMAC", "steps", "s per step", "training s", "memory")
        heads += (*(f"Dice {label}" for label in labels), "mean Dice", SURFACE, "HD95 mm", "seeds", "p")
        ranked = sorted(groups.items(), key=lambda item: -np.mean([r.mean("dice") for r in item[1]]))
        rows = [_row(name, own, groups.get(OURS), len(labels)) for name, own in ranked]
        lines += [f"### {size}", "", *markdown_table(heads, rows)]
    return lines


def comparison_plot(results: Sequence[Result]) -> Figure:
    """Plot the mean Dice of each network, a point per seed."""
    groups = {
        f"{name} {size}": [result.mean("dice") for result in own]
        for size in SIZES
        for name, own in _groups(results, size).items()
    }
    return strips(groups, "mean Dice")


def _groups(results: Sequence[Result], size: str) -> dict[str, list[Result]]:
    groups = {name: [r for r in results if r.trial.network == name and r.trial.size == size] for name in NETWORKS}
    return {name: own for name, own in groups.items() if own}


def _row(name: str, own: Sequence[Result], ours: Sequence[Result] | None, labels: int) -> list[str]:
    first = own[0]
    paces = [result.seconds_per_step for result in own if result.seconds_per_step is not None]
    per_label = np.mean([np.nanmean(result.per_case("dice"), axis=0) for result in own], axis=0)[:labels]
    return [
        f"**{name}**" if name == OURS else name,
        f"{first.parameters / 1e6:.2f} M",
        f"{first.gmac:.1f}",
        f"{np.mean([result.steps for result in own]):.0f}",
        f"{np.median(paces):.3f}" if paces else "",
        f"{np.mean([result.seconds for result in own]):.0f}",
        f"{max(result.peak_gb for result in own):.2f} GB",
        *(f"{dice:.4f}" for dice in per_label),
        *(mean_and_deviation(own, metric) for metric in ("dice", "surface_dice", "hd95_mm")),
        str(len(own)),
        p_text(paired_p(own, ours)) if ours and name != OURS else "",
    ]
