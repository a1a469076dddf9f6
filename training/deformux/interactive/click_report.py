"""The ``deformux clicks`` command."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from deformux.cli.common import (
    LARGEST_SEED,
    MOST_THREADS,
    ProgressBar,
    clear_errors,
    console,
    device_name,
    existing_folder,
    model_path,
    torch_device,
    use_threads,
    writable_folder,
)
from deformux.data.atomic_files import replacing, write_text
from deformux.data.cases import find_cases
from deformux.interactive.click_benchmark import COUNTS, THRESHOLDS, CaseResult, Robot, Summary, play_case, summarise
from deformux.networks.model_file import load_model, with_guidance

__all__ = ["clicks_command", "plot", "summary_rows", "write_markdown", "write_per_case", "write_summary"]


def clicks_command(
    data: Annotated[Path, typer.Argument(help="Folder with images/ and labels/ (or imagesTr/ and labelsTr/).")],
    model: Annotated[str, typer.Option(help="Model file with its card, or the name of a shipped model.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder for per_case.csv, summary.csv, summary.md and clicks.png.")
    ] = None,
    subset: Annotated[str, typer.Option(help="Subset of split.json, e.g. val.")] = "",
    limit: Annotated[int, typer.Option(help="Volumes at most, evenly through the list; 0 takes all.", min=0)] = 0,
    noc_cap: Annotated[int, typer.Option(help="Clicks after which the robot gives up.", min=1)] = 20,
    jitter: Annotated[
        float, typer.Option(help="How far from the centre the second robot clicks, 0 to 1.", min=0, max=1)
    ] = 0.5,
    seed: Annotated[int, typer.Option(help="Of the second robot's jitter.", min=0, max=LARGEST_SEED)] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N; auto takes the first GPU.")] = "auto",
    threads: Annotated[int, typer.Option(help="CPU threads; 0 lets PyTorch choose.", min=0, max=MOST_THREADS)] = 0,
) -> None:
    """Measure what clicks buy: robots correct a labelled folder, at the centres of errors and beside them."""
    with clear_errors():
        use_threads(threads)
        where = torch_device(device)
        network, card = load_model(model_path(model), device=where)
        if not network.guidance_channels:
            console.print(f"{model} was not trained with clicks: a click changes little more than its own voxel")
            network = with_guidance(network).to(where).eval()
        cases = find_cases(existing_folder(data), subset=subset or None)
        if output is not None:
            writable_folder(output)
        if limit:
            cases = [cases[i] for i in np.unique(np.linspace(0, len(cases) - 1, min(limit, len(cases))).astype(int))]
        robots = [Robot("centred"), Robot("jittered", jitter)]
        results: list[CaseResult] = []
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with ProgressBar(*columns) as bar:
            task = bar.add_task("clicking", total=len(cases) * len(robots))
            for number, case in enumerate(cases):
                played = play_case(
                    network,
                    case,
                    card.preprocessing,
                    labels=card.labels,
                    robots=robots,
                    cap=noc_cap,
                    seed=seed + number,
                    device=where,
                )
                for result in played:
                    results.append(result)
                    bar.update(task, advance=1, description=f"{result.case}: Dice {result.after(COUNTS[-1]):.3f}")
                if output is not None:
                    # A run that is stopped leaves what it has.
                    _write(output, results, model, device_name(where))
        console.print(summary_table(summarise(results), title=f"{model} on {len(cases)} volumes"))
        if output is not None:
            console.print(f"{output}: per_case.csv, summary.csv, summary.md, clicks.png")


def _write(output: Path, results: Sequence[CaseResult], model: str, device: str) -> None:
    summary = summarise(results)
    write_per_case(output / "per_case.csv", results)
    write_summary(output / "summary.csv", summary)
    write_markdown(output / "summary.md", summary, model=model, device=device)
    plot(output / "clicks.png", results)


def _columns() -> list[str]:
    return [
        *(f"dice_{count}" for count in COUNTS),
        *(f"surface_dice_{count}" for count in COUNTS),
        "auc_1_to_5",
        *(f"noc_{round(100 * threshold)}" for threshold in THRESHOLDS),
    ]


def write_per_case(path: Path, results: Sequence[CaseResult]) -> None:
    """Replace a CSV file with one row per robot and volume; a threshold that was never reached is empty."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["robot", "case", *_columns(), "clicks", "median_s"])
    for result in results:
        values = [*(result.after(count) for count in COUNTS), *result.surface_dice, result.area]
        needed = [result.clicks_to(threshold) for threshold in THRESHOLDS]
        median = f"{np.median(result.seconds):.4f}" if result.seconds else ""
        writer.writerow(
            [result.robot, result.case, *(f"{v:.6f}" for v in values), *needed, len(result.seconds), median]
        )
    write_text(path, text.getvalue())


def write_summary(path: Path, summary: Sequence[Summary]) -> None:
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


def summary_rows(summary: Sequence[Summary]) -> list[list[str]]:
    """What the tables for people show, the first column naming it."""
    rows = [["", *(line.robot for line in summary)]]
    for i, count in enumerate(COUNTS):
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


def summary_table(summary: Sequence[Summary], *, title: str) -> Table:
    """What each robot reached."""
    head, *rows = summary_rows(summary)
    table = Table(*head, title=title)
    for row in rows:
        table.add_row(*row)
    return table


def write_markdown(path: Path, summary: Sequence[Summary], *, model: str, device: str) -> None:
    """Replace a Markdown file with the summary as a table."""
    head, *rows = summary_rows(summary)
    lines = [f"Robot annotators, {summary[0].cases} volumes, model `{model}`, device {device}.", ""]
    lines += ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    write_text(path, "\n".join(lines) + "\n")


def plot(path: Path, results: Sequence[CaseResult]) -> None:
    """Replace a PNG file: Dice and surface Dice over clicks, the mean of each robot and the middle half of volumes."""
    figure = Figure(figsize=(9, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    dice_axes, surface_axes = figure.subplots(1, 2)
    for index, robot in enumerate(dict.fromkeys(result.robot for result in results)):
        own = [result for result in results if result.robot == robot]
        numbers = range(COUNTS[-1] + 1)
        for axes, clicks, values in (
            (dice_axes, numbers, np.array([[result.after(n) for n in numbers] for result in own])),
            (surface_axes, COUNTS, np.array([result.surface_dice for result in own])),
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
