"""One round of the loop on a GPU: a few labelled volumes, from scratch to a published version.

    python -m benchmarks.quality.gpu_round                                        # 10 labels, three draws of them
    python -m benchmarks.quality.gpu_round --device cpu --steps 2 --seeds 1 --cases 3 --labelled 3    # to try it

The server's own round (``Learner``): volumes held out for validation, clicks, the gate. The seed draws the labelled
volumes. ``val`` is scored once, outside the measured time. Writes data/gpu_round.json and the section quality_gpu_round
of learning.md after each round.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from benchmarks.common.command import hippocampus, options, run_command
from benchmarks.common.machine import machine_lines
from benchmarks.common.plots import figure
from benchmarks.common.report import Section, bullets, markdown_table, measure_and_write
from benchmarks.common.scores import score
from matplotlib.figure import Figure

from deformux.cli.devices import torch_device
from deformux.fitting.recipe import RECIPES
from deformux.inference.metrics import mean_dice
from deformux.networks.model_file import load_model
from deformux.publishing.learner import Learner, Round

TARGET_DICE, TARGET_SECONDS = 0.85, 60.0


def main() -> None:
    parser = options("gpu_round", __doc__)
    parser.add_argument("--labelled", type=int, default=10, help="labelled volumes")
    parser.add_argument("--steps", type=int, default=RECIPES["finetune"].steps, help="of the training")
    parser.add_argument("--preset", default="tiny", help="of DeformUX-Net")
    parser.set_defaults(device="cuda")
    arguments = parser.parse_args()
    measure_and_write(arguments, "gpu_round", lambda: measured(arguments), section)


def measured(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Run one round for each seed; yield the data so far after each."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    task = hippocampus(arguments, patch_size=(32, 48, 32))
    device = torch_device(arguments.device)
    # Everything but the anatomy is the default of a server.
    recipe = RECIPES["finetune"].replace(
        flip_axes=task.recipe.flip_axes, foreground_ratio=1.0, affine_probability=0.8, steps=arguments.steps
    )
    rounds: list[dict[str, Any]] = []
    for seed in range(arguments.seeds):
        chosen = np.random.default_rng(seed).permutation(len(task.train))[: arguments.labelled]
        cases = [task.train[int(i)] for i in chosen]
        with TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            learner = Learner(
                Path(folder), labels=task.labels, preprocessing=task.prep, preset=arguments.preset, keep=2
            )
            began = time.monotonic()
            outcome = learner.learn(cases, Round(scratch_recipe=recipe, device=str(device), seed=seed))
            seconds = time.monotonic() - began
            network, _ = load_model(learner.versions.path(outcome.version))
            scores = score(network, task.test, task.prep, n_labels=len(task.labels), device=str(device))
        dice = mean_dice(np.array([values["dice"] for values in scores.values()], dtype=float))
        rounds.append(
            {
                "seed": seed,
                "seconds": seconds,
                "training_s": outcome.card.seconds or 0.0,
                "published": outcome.published,
                "dice": dice,
            }
        )
        print(rounds[-1], flush=True)
        yield {
            "machine": machine_lines(),
            "labelled": arguments.labelled,
            "preset": arguments.preset,
            "steps": recipe.steps,
            "tested": len(task.test),
            "rounds": rounds,
        }


def section(data: Mapping[str, Any]) -> Section:
    """Write the rounds as a table and a plot."""
    heads = ("seed", "round s", "of it training s", "published", "mean Dice")
    rows = [
        (
            *(r["seed"], f"{r['seconds']:.1f}", f"{r['training_s']:.1f}", "yes" if r["published"] else "no"),
            f"{r['dice']:.4f}",
        )
        for r in data["rounds"]
    ]
    return Section(
        "learning",
        "quality_gpu_round",
        "A round of the loop on a GPU",
        [
            *bullets(data["machine"]),
            f"- {data['labelled']} labelled hippocampus volumes, `{data['preset']}` from scratch, {data['steps']} "
            "steps at most, with clicks",
            f"- tested on {data['tested']} volumes of `val`, once, outside the measured time",
            f"- target: a Dice of {TARGET_DICE:g} within {TARGET_SECONDS:g} s, published",
            "",
            *markdown_table(heads, rows),
        ],
        _plot(data["rounds"]),
    )


def _plot(rounds: Sequence[Mapping[str, Any]]) -> Figure:
    plot = figure(height=3.0)
    axes = plot.add_subplot()
    axes.scatter([r["seconds"] for r in rounds], [r["dice"] for r in rounds])
    axes.axhline(TARGET_DICE, linestyle=":", color="gray")
    axes.axvline(TARGET_SECONDS, linestyle=":", color="gray")
    axes.set_xlabel("seconds of a round")
    axes.set_ylabel("mean Dice on val")
    return plot


if __name__ == "__main__":
    run_command(main)
