"""The shipped hippocampus weights on the ``val`` cases, which took no part in training or choosing them.

    python -m benchmarks.quality.hippocampus [--data FOLDER] [--threads 2]

benchmarks/README.md describes how the weights are made. Writes data/hippocampus.json and the section hippocampus of
models.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.common.machine import machine_lines
from benchmarks.common.places import HIPPOCAMPUS
from benchmarks.common.report import Section, add_results, bullets, markdown_table, measure_and_write

from deformux.data.cases import find_cases
from deformux.inference.evaluate import evaluate
from deformux.inference.metrics import mean_dice
from deformux.networks.model_file import load_model
from deformux.networks.pretrained import pretrained_path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HIPPOCAMPUS, help="a folder of labelled NIfTI")
    parser.add_argument("--threads", type=int, default=2)
    add_results(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    measure_and_write(arguments, "hippocampus", lambda: scored(arguments.data), section)


def scored(folder: Path) -> dict[str, Any]:
    """Segment and score the ``val`` cases of a folder."""
    network, card = load_model(pretrained_path("hippocampus"))
    cases = find_cases(folder, subset="val")
    scores = evaluate(network, cases, card.preprocessing, n_labels=len(card.labels))
    per_case = np.array(list(scores.values()))
    return {
        "machine": machine_lines(),
        "preset": card.preset,
        "cases": len(cases),
        "notes": card.notes,
        "labels": {
            name: {"mean": np.nanmean(column), "median": np.nanmedian(column), "worst": np.nanmin(column)}
            for name, column in zip(card.labels, per_case.T, strict=True)
        },
        "mean_dice": mean_dice(per_case),
    }


def section(data: Mapping[str, Any]) -> Section:
    """Write the Dice of each label as a table."""
    rows = [
        (name, *(f"{own[which]:.4f}" for which in ("mean", "median", "worst"))) for name, own in data["labels"].items()
    ]
    return Section(
        "models",
        "hippocampus",
        f"Shipped `hippocampus` weights ({data['preset']}) on {data['cases']} `val` cases",
        [
            *bullets((*data["machine"], data["notes"])),
            "",
            *markdown_table(
                ("label", "mean Dice", "median", "worst"),
                [*rows, ("**mean**", f"**{data['mean_dice']:.4f}**", "", "")],
            ),
        ],
    )


if __name__ == "__main__":
    main()
