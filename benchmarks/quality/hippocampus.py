"""The shipped hippocampus weights on the ``val`` cases, which took no part in training or choosing them.

    python -m benchmarks.quality.hippocampus --data ../shared/data/hippocampus [--threads 2]

CONTRIBUTING.md says how the weights were made.
Writes benchmarks/results/hippocampus.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from benchmarks.common.machine import machine_lines

from deformux.data.atomic_files import write_text
from deformux.data.cases import find_cases
from deformux.inference.evaluate import evaluate
from deformux.inference.metrics import mean_dice
from deformux.networks.model_file import load_model
from deformux.networks.pretrained import pretrained_path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    network, card = load_model(pretrained_path("hippocampus"))
    cases = find_cases(arguments.data, subset="val")
    scores = evaluate(network, cases, card.preprocessing, n_labels=len(card.labels))
    per_case = np.array(list(scores.values()))
    lines = [
        f"# Shipped `hippocampus` weights ({card.preset}) on {len(cases)} `val` cases",
        "",
        *(f"- {line}" for line in machine_lines()),
        f"- {card.notes}",
        "",
        "| label | mean Dice | median | worst |",
        "|---|---|---|---|",
        *(
            f"| {name} | {np.nanmean(column):.4f} | {np.nanmedian(column):.4f} | {np.nanmin(column):.4f} |"
            for name, column in zip(card.labels, per_case.T, strict=True)
        ),
        f"| **mean** | **{mean_dice(per_case):.4f}** | | |",
    ]
    write_text(Path(__file__).parents[1] / "results" / "hippocampus.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
