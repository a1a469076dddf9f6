"""The strongest model within a budget of minutes, its settings chosen without ``val``.

    python -m benchmarks.quality.best_model                                              # tiny, 60 minutes on the CPU
    python -m benchmarks.quality.best_model --preset base --minutes 20 --device cuda     # base on one GPU
    python -m benchmarks.quality.best_model --minutes 0.1 --choose-seconds 2 --cases 8 --seeds 1 --changes lr=2e-3

Changes to recipe and patches are tried one by one, each for ``--choose-seconds`` of training, on three quarters of
``train``, and scored on the last quarter. A change is kept if the mean over seeds gains ``--least-gain``; the next one
is tried on top of it. Then one model is trained on all of ``train`` for ``--minutes``, with clicks as the shipped ones
are, and scored on ``val`` once, without clicks. The budget is that of the last training. A killed run resumes where it
stopped. Adds each training to data/best_model.json, rewrites the section quality_best_<preset>_<device> of models.md,
and writes the model file to ``--output``.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from benchmarks.common.command import hippocampus, options, placement, run_command, trial_data
from benchmarks.common.plots import strips
from benchmarks.common.report import Section, markdown_table, write_section
from benchmarks.common.trial_report import NOTES, facts, mean_and_deviation, p_text, paired_p
from benchmarks.common.trial_runner import run_trials
from benchmarks.common.trials import Result, Task, Trial, model_file

from deformux.active_learning.simulation import held_out
from deformux.fitting.recipe import RECIPES
from deformux.networks.model_file import load_model, save_model
from deformux.networks.presets import PRESETS

CHANGES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "patches of 32×48×32": {"patch_size": (32, 48, 32)},
        "lr=2e-3": {"learning_rate": 2e-3},
        "lr=4e-3": {"learning_rate": 4e-3},
        "lr=5e-4": {"learning_rate": 5e-4},
        "batch of 1": {"batch_size": 1},
        "batch of 4": {"batch_size": 4},
        "cosine": {"schedule": "cosine"},
        "weight decay 0.08": {"weight_decay": 0.08},
        "rotation 30°": {"rotation_degrees": 30.0},
        "scaling 0.25": {"scaling": 0.25},
        "no elastic deformation": {"elastic_probability": 0.0},
        "elastic deformation of half": {"elastic_probability": 0.5},
        "no coarse scans": {"low_resolution": 1.0},
        "little noise": {"noise_std": 0.03},
        "no gamma": {"gamma": (1.0, 1.0)},
        "mild intensities": {"low_resolution": 1.0, "noise_std": 0.03, "gamma": (0.85, 1.2)},
        "gradients not clipped": {"gradient_clip": None},
    }
)
_FRACTION = 0.25


def main() -> None:
    parser = options("best_model", __doc__, seeds=2)
    parser.add_argument("--preset", choices=tuple(PRESETS), default="tiny", help="of DeformUX-Net")
    parser.add_argument("--minutes", type=float, default=60.0, help="of the last training")
    parser.add_argument(
        "--choose-seconds", type=float, default=300.0, help="of each training that settings are chosen by"
    )
    parser.add_argument("--least-gain", type=float, default=0.001, help="gain in Dice for which a change is kept")
    parser.add_argument("--changes", nargs="*", choices=tuple(CHANGES), default=tuple(CHANGES), help="what is tried")
    parser.add_argument("--output", type=Path, help="model file; default: in the folder of --work")
    arguments = parser.parse_args()
    chosen = Choice(arguments)
    best = chosen.make()
    # A model that is used is corrected with clicks, and has to learn them.
    recipe = best.recipe.replace(clicks=RECIPES["finetune"].clicks)
    last = Trial(
        f"{arguments.preset}, all of train",
        dataclasses.replace(best, recipe=recipe, train=chosen.whole.train, test=chosen.whole.test),
        size=arguments.preset,
        options={"guidance": True},
        seconds=60 * arguments.minutes,
        keep_model=True,
        **placement(arguments),
    )
    results = run_trials([last], chosen.data)
    chosen.report(results)
    if arguments.rewrite:
        return
    trained = model_file(arguments.work, last.name)
    if not trained.is_file():
        # Weights are not committed with a trial.
        raise ValueError(
            "the weights are where they were trained; to train them here too, "
            f"remove {last.name} from {chosen.data.file}"
        )
    output = arguments.output or arguments.work / f"best_{arguments.preset}.safetensors"
    save_model(output, *load_model(trained))
    print(f"{output}: Dice {results[0].mean('dice'):.4f} on val")


class Choice:
    """Choose changes to the recipe by a held-out part of ``train``."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.data = trial_data(arguments, "best_model")
        self.whole: Task = hippocampus(arguments)
        kept_in, out = held_out(self.whole.train, _FRACTION)
        self.task: Task = dataclasses.replace(self.whole, train=tuple(kept_in), test=tuple(out))
        self.tried: dict[str, list[Result]] = {}
        self.kept: list[str] = []

    def make(self) -> Task:
        """Try the changes; return the task with those that are kept."""
        task = self.task
        best = self._try("as it was", task)
        for name in self.arguments.changes:
            changed = _changed(task, **CHANGES[name])
            dice = self._try(name, changed)
            if dice > best + self.arguments.least_gain:
                task, best = changed, dice
                self.kept.append(name)
            self.report([])
        return task

    def _try(self, name: str, task: Task) -> float:
        arguments = self.arguments
        trials = [
            Trial(
                f"{name}, seed {seed}",
                task,
                size=arguments.preset,
                seed=seed,
                seconds=arguments.choose_seconds,
                **placement(arguments),
            )
            for seed in range(arguments.seeds)
        ]
        self.tried[name] = run_trials(trials, self.data, jobs=arguments.jobs)
        return float(np.mean([result.mean("dice") for result in self.tried[name]]))

    def report(self, last: Sequence[Result]) -> None:
        """Write the section; ``last`` is empty until the last training is over."""
        arguments = self.arguments
        results = [*(result for tried in self.tried.values() for result in tried), *last]
        planned = (len(arguments.changes) + 1) * arguments.seeds + 1
        section = Section(
            "models",
            f"quality_best_{arguments.preset}_{arguments.device.partition(':')[0]}",
            f"The strongest `{arguments.preset}` in {arguments.minutes:g} minutes",
            [
                *facts(results, planned, f"settings chosen on {len(self.task.test)} held-out volumes of `train`"),
                *(self._scored(last[0]) if last else []),
                *self._choices(),
                *NOTES,
            ],
            strips({name: [r.mean("dice") for r in own] for name, own in self.tried.items()}, "held-out Dice"),
        )
        write_section(arguments.results, section)

    def _scored(self, last: Result) -> list[str]:
        dice = np.nanmean(last.per_case("dice"), axis=0)
        task = last.trial.task
        patch = "×".join(map(str, task.prep.patch_size))
        each = [f"Dice {label}" for label in task.labels]
        heads = ("trained on", "patch", "steps", "seconds", *each, "mean Dice", "HD95 mm")
        row = [len(task.train), patch, last.steps, f"{last.seconds:.0f}", *(f"{value:.4f}" for value in dice)]
        row += [f"**{last.mean('dice'):.4f}**", f"{last.mean('hd95_mm'):.2f}"]
        return [f"### The model on {len(last.scores)} `val` volumes, scored once", "", *markdown_table(heads, [row])]

    def _choices(self) -> list[str]:
        rows, base = [], self.tried["as it was"]
        for name, own in self.tried.items():
            gain = np.mean([r.mean("dice") for r in own]) - np.mean([r.mean("dice") for r in base])
            kept = "yes" if name in self.kept else ""
            compared = [f"{gain:+.4f}", p_text(paired_p(own, base)), kept] if own is not base else [""] * 3
            rows.append([name, f"{np.mean([r.steps for r in own]):.0f}", mean_and_deviation(own), *compared])
            if kept:
                base = own
        heads = ("change", "steps", "held-out Dice", "against what was kept before", "p", "kept")
        title = f"### Settings, tried in this order for {self.arguments.choose_seconds:g} s each"
        return [title, "", *markdown_table(heads, rows)]


def _changed(task: Task, *, patch_size: tuple[int, int, int] | None = None, **of_recipe: Any) -> Task:
    prep = dataclasses.replace(task.prep, patch_size=patch_size) if patch_size else task.prep
    return dataclasses.replace(task, prep=prep, recipe=task.recipe.replace(**of_recipe))


if __name__ == "__main__":
    run_command(main)
