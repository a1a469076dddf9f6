"""Tables and a plot of the click benchmark."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from deformux.data.atomic_files import replacing, write_text
from deformux.interactive.click_benchmark import CLICK_COUNTS, THRESHOLDS, CaseResult, ClickSummary, summarise_clicks

__all__ = ["click_rows", "plot_clicks", "write_click_report"]


def write_click_report(folder: Path, results: Sequence[CaseResult], *, model: str, device: str) -> None:
    """Replace per_case.csv, summary.csv, summary.md and clicks.png in a folder."""
    summary = summarise_clicks(results)
    _write_per_case(folder / "per_case.csv", results)
    _write_summary(folder / "summary.csv", summary)
    _write_markdown(folder / "summary.md", summary, model=model, device=device)
    plot_clicks(folder / "clicks.png", results)


def _columns() -> list[str]:
    return [
        *(f"dice_{count}" for count in CLICK_COUNTS),
        *(f"surface_dice_{count}" for count in CLICK_COUNTS),
        "auc_1_to_5",
        *(f"noc_{round(100 * threshold)}" for threshold in THRESHOLDS),
    ]


def _write_per_case(path: Path, results: Sequence[CaseResult]) -> None:
    """Replace a CSV file with one row per robot and volume; a threshold that was not reached is empty."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["robot", "case", *_columns(), "clicks", "median_s"])
    for result in results:
        values = [*(result.after(count) for count in CLICK_COUNTS), *result.surface_dice, result.area]
        needed = [result.clicks_to(threshold) for threshold in THRESHOLDS]
        median = f"{np.median(result.seconds):.4f}" if result.seconds else ""
        writer.writerow(
            [result.robot, result.case, *(f"{v:.6f}" for v in values), *needed, len(result.seconds), median]
        )
    write_text(path, text.getvalue())


def _write_summary(path: Path, summary: Sequence[ClickSummary]) -> None:
    """Replace a CSV file with one row per robot."""
    text = io.StringIO()
    writer = csv.writer(text)
    failures = [f"failures_{round(100 * threshold)}" for threshold in THRESHOLDS]
    writer.writerow(["robot", "cases", *_columns(), *failures, "median_s", "p95_s"])
    for line in summary:
        values = (*line.dice, *line.surface_dice, line.area, *line.clicks_to)
        times = (f"{line.median_s:.4f}", f"{line.p95_s:.4f}")
        writer.writerow([line.robot, line.cases, *(f"{v:.6f}" for v in values), *line.failures, *times])
    write_text(path, text.getvalue())


def click_rows(summary: Sequence[ClickSummary]) -> list[list[str]]:
    """Return the rows of a human-readable table; the first column names what a row shows."""
    rows = [["", *(line.robot for line in summary)]]
    for i, count in enumerate(CLICK_COUNTS):
        rows.append(
            [f"Dice (surface Dice 2 mm), {count} clicks"]
            + [f"{line.dice[i]:.4f} ({line.surface_dice[i]:.4f})" for line in summary]
        )
    rows.append(["area under Dice, 1 to 5 clicks"] + [f"{line.area:.4f}" for line in summary])
    for i, threshold in enumerate(THRESHOLDS):
        rows.append(
            [f"clicks to Dice {threshold:.2f} (volumes that fail)"]
            + [f"{line.clicks_to[i]:.2f} ({line.failures[i]} of {line.cases})" for line in summary]
        )
    rows.append(["seconds per click, median (p95)"] + [f"{line.median_s:.3f} ({line.p95_s:.3f})" for line in summary])
    return rows


def _write_markdown(path: Path, summary: Sequence[ClickSummary], *, model: str, device: str) -> None:
    """Replace a Markdown file with the summary as a table."""
    head, *rows = click_rows(summary)
    lines = [f"Simulated annotators, {summary[0].cases} volumes, model `{model}`, device {device}.", ""]
    lines += ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    write_text(path, "\n".join(lines) + "\n")


def plot_clicks(path: Path, results: Sequence[CaseResult]) -> None:
    """Replace a PNG file: Dice and surface Dice over clicks, the mean of each robot and the middle half of volumes."""
    figure = Figure(figsize=(9, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    dice_axes, surface_axes = figure.subplots(1, 2)
    for index, robot in enumerate(dict.fromkeys(result.robot for result in results)):
        own = [result for result in results if result.robot == robot]
        numbers = range(CLICK_COUNTS[-1] + 1)
        for axes, clicks, values in (
            (dice_axes, numbers, np.array([[result.after(n) for n in numbers] for result in own])),
            (surface_axes, CLICK_COUNTS, np.array([result.surface_dice for result in own])),
        ):
            low, high = np.nanpercentile(values, (25, 75), axis=0)
            axes.fill_between(clicks, low, high, color=f"C{index}", alpha=0.15, linewidth=0)
            axes.plot(clicks, np.nanmean(values, axis=0), color=f"C{index}", marker="o", markersize=3.5, label=robot)
    dice_axes.set_ylabel("mean Dice")
    surface_axes.set_ylabel("mean surface Dice at 2 mm")
    for axes in (dice_axes, surface_axes):
        axes.set_xlabel("clicks")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
