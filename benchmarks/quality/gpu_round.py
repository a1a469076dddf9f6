"""One round of the loop on a GPU: a few labelled volumes, from scratch to a published version.

    python -m benchmarks.quality.gpu_round                                        # 10 labels, three draws of them
    python -m benchmarks.quality.gpu_round --device cpu --steps 2 --seeds 1 --cases 3 --labelled 3    # to try it

The server's own round (``Learner``): volumes held out for validation, clicks, the gate. Which volumes
are labelled follows from the seed. ``val`` is scored once, outside the measured time. Writes
quality_gpu_round.md, .csv and .png.
"""

from __future__ import annotations

import logging
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from benchmarks.common.command import hippocampus, options, run
from benchmarks.common.machine import machine_lines
from benchmarks.common.report import figure, table, write_report
from benchmarks.common.scores import score
from matplotlib.figure import Figure

from deformux.cli.devices import torch_device
from deformux.fitting.recipe import RECIPES
from deformux.inference.metrics import mean_dice
from deformux.networks.model_file import load_model
from deformux.publishing.learner import Learner, Round

TARGET_DICE, TARGET_SECONDS = 0.85, 60.0


@dataclass(frozen=True)
class Measured:
    """One round."""

    seed: int
    seconds: float
    training_s: float
    published: bool
    dice: float


def main() -> None:
    parser = options("gpu_round", __doc__)
    parser.add_argument("--labelled", type=int, default=10, help="labelled volumes")
    parser.add_argument("--steps", type=int, default=RECIPES["finetune"].steps, help="of the training")
    parser.add_argument("--preset", default="tiny", help="of DeformUX-Net")
    parser.set_defaults(device="cuda")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    task = hippocampus(arguments, patch_size=(32, 48, 32))
    device = torch_device(arguments.device)
    # Everything but the anatomy is the default of a server.
    recipe = RECIPES["finetune"].replace(
        flip_axes=task.recipe.flip_axes, foreground_ratio=1.0, affine_probability=0.8, steps=arguments.steps
    )
    measured: list[Measured] = []
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
        measured.append(Measured(seed, seconds, outcome.card.seconds or 0.0, outcome.published, dice))
        print(measured[-1], flush=True)
        _write(arguments.results, measured, arguments.labelled, arguments.preset, recipe.steps, len(task.test))


def _write(folder: Path, measured: list[Measured], labelled: int, preset: str, steps: int, tested: int) -> None:
    heads = ("seed", "round s", "of it training s", "published", "mean Dice")
    rows = [
        (m.seed, f"{m.seconds:.1f}", f"{m.training_s:.1f}", "yes" if m.published else "no", f"{m.dice:.4f}")
        for m in measured
    ]
    write_report(
        folder,
        "gpu_round",
        title="A round of the loop on a GPU",
        lines=[
            *(f"- {line}" for line in machine_lines()),
            f"- {labelled} labelled hippocampus volumes, `{preset}` from scratch, {steps} steps at most, with clicks",
            f"- tested on {tested} volumes of `val`, once, outside the measured time",
            f"- target: a Dice of {TARGET_DICE:g} within {TARGET_SECONDS:g} s, published",
            "",
            *table(heads, rows),
        ],
        rows=[heads, *rows],
        plot=_plot(measured),
    )


def _plot(measured: list[Measured]) -> Figure:
    plot = figure(height=3.0)
    axes = plot.add_subplot()
    axes.scatter([m.seconds for m in measured], [m.dice for m in measured])
    axes.axhline(TARGET_DICE, linestyle=":", color="gray")
    axes.axvline(TARGET_SECONDS, linestyle=":", color="gray")
    axes.set_xlabel("seconds of a round")
    axes.set_ylabel("mean Dice on val")
    return plot


if __name__ == "__main__":
    run(main)
