"""Implementation of ``deformux clicks``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from deformux.cli.common import ProgressBar, console
from deformux.cli.devices import device_name, torch_device, use_threads
from deformux.data.cases import Case
from deformux.interactive.click_benchmark import (
    CLICK_COUNTS,
    CaseResult,
    ClickSummary,
    Robot,
    play_case,
    summarise_clicks,
)
from deformux.interactive.click_report import click_rows, write_click_report
from deformux.networks.model_file import load_model, with_guidance

__all__ = ["correct_by_robots"]


def correct_by_robots(
    model: Path,
    cases: Sequence[Case],
    *,
    title: str,
    output: Path | None,
    cap: int,
    jitter: float,
    seed: int,
    device: str,
    threads: int,
) -> None:
    """Let simulated annotators correct volumes by clicks; print the results, and write them into a folder if given.

    Args:
        model: file of the model.
        cases: labelled volumes.
        title: name of the model in the table.
        output: folder for tables and plot.
        cap: number of clicks after which an annotator gives up.
        jitter: distance from the centre at which the second annotator clicks, 0 to 1.
        seed, device, threads: options of the command.
    """
    use_threads(threads)
    where = torch_device(device)
    network, card = load_model(model, device=where)
    if not network.guidance_channels:
        console.print(f"{title} was not trained with clicks: a click changes little more than its own voxel")
        network = with_guidance(network).to(where).eval()
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
                cap=cap,
                seed=seed + number,
                device=where,
            )
            for result in played:
                results.append(result)
                bar.update(task, advance=1, description=f"{result.case}: Dice {result.after(CLICK_COUNTS[-1]):.3f}")
            if output is not None:
                # A stopped run keeps its results so far.
                write_click_report(output, results, model=title, device=device_name(where))
    console.print(_table(summarise_clicks(results), title=f"{title} on {len(cases)} volumes"))
    if output is not None:
        console.print(f"{output}: per_case.csv, summary.csv, summary.md, clicks.png")


def _table(summary: Sequence[ClickSummary], *, title: str) -> Table:
    head, *rows = click_rows(summary)
    table = Table(*head, title=title)
    for row in rows:
        table.add_row(*row)
    return table
