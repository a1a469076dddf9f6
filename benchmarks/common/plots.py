"""Pictures of results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

__all__ = ["figure", "strips"]


def figure(width: float = 8, height: float = 5) -> Figure:
    """Return an empty figure that needs no display."""
    empty = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(empty)
    return empty


def strips(groups: Mapping[str, Sequence[float]], axis: str) -> Figure:
    """Plot a row for each group, best first: a point per seed, and a bar at their mean."""
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
