"""Implementation of ``deformux evaluate``."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import typer
from rich.table import Table

from deformux.cli.common import console, print_sentences, timed_bar
from deformux.cli.devices import torch_device, use_threads
from deformux.cli.locators import locator_beside
from deformux.data.atomic_files import write_text
from deformux.data.cases import Case
from deformux.data.volume_reader import InvalidVolume
from deformux.inference.evaluate import evaluate
from deformux.inference.metrics import mean_dice
from deformux.networks.model_file import load_model

__all__ = ["score_on_folder"]


def score_on_folder(
    model: Path, cases: Sequence[Case], *, title: str, csv_file: Path | None, device: str, threads: int
) -> None:
    """Print the Dice of each label, and write that of each case to a CSV file if one is given.

    Args:
        model: file of the model.
        cases: labelled volumes.
        title: name of the model in the table.
        csv_file: one row per case.
        device, threads: options of the command.

    Raises:
        typer.Exit: a case could not be used; all others are scored.
    """
    use_threads(threads)
    where = torch_device(device)
    network, card = load_model(model)
    said: list[str] = []
    skipped: list[str] = []
    with timed_bar("scoring", mean_over_s=float("inf")) as bar:
        task = bar.add_task("scoring", total=len(cases))

        def skip(case: Case, error: InvalidVolume) -> None:
            skipped.append(f"skipped: {case.id}: {error}")
            bar.update(task, advance=1)

        scores = evaluate(
            network,
            cases,
            card.preprocessing,
            n_labels=len(card.labels),
            device=where,
            locator=locator_beside(model, card, device=where),
            on_case=lambda *_: bar.update(task, advance=1),
            on_warning=lambda case, filled: said.append(f"{case.image.name}: {filled}"),
            on_invalid=skip,
        )
    print_sentences(said)
    if scores:
        _print_scores(scores, card.labels, title=title, csv_file=csv_file)
    # Below the table, where a long run ends.
    print_sentences(skipped)
    if skipped:
        raise typer.Exit(1)


def _print_scores(
    scores: Mapping[str, Sequence[float]], labels: Sequence[str], *, title: str, csv_file: Path | None
) -> None:
    per_case = np.array(list(scores.values()))
    table = Table("label", "mean Dice", "median", "worst", title=f"{title} on {len(scores)} volumes")
    for index, name in enumerate(labels):
        values = per_case[:, index][~np.isnan(per_case[:, index])]
        if len(values):
            table.add_row(name, f"{values.mean():.4f}", f"{np.median(values):.4f}", f"{values.min():.4f}")
        else:
            table.add_row(name, "in no case", "", "")
    console.print(table)
    console.print(f"mean Dice {mean_dice(per_case):.4f}")
    if csv_file is not None:
        _write_csv(csv_file, labels, scores)


def _write_csv(path: Path, labels: Sequence[str], scores: Mapping[str, Sequence[float]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["case", *labels])
    writer.writerows([name, *(f"{value:.6f}" for value in row)] for name, row in scores.items())
    write_text(path, text.getvalue())
