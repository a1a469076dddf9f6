"""Implementation of ``deformux fit``."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deformux.cli.common import clear_errors, console, timed_bar, writable_file
from deformux.cli.devices import device_name, torch_device, use_threads
from deformux.cli.plan import plan_table
from deformux.data.cases import Case
from deformux.data.checked_json import kept_or_made
from deformux.data.choices import Choices
from deformux.data.fingerprint import read_fingerprint
from deformux.data.planning import Plan, default_minutes
from deformux.data.preprocessing import Preprocessing
from deformux.fitting.checkpoint import label_checksum
from deformux.fitting.distributed import Ranks, joined
from deformux.fitting.fit import FitResult, Progress, TrainingError, fit
from deformux.fitting.locator_training import fit_locator
from deformux.fitting.minutes import in_minutes
from deformux.fitting.recipe import Recipe
from deformux.fitting.speed import plan_on
from deformux.inference.locator_file import save_locator
from deformux.networks.deformux_net import DeformUXNet
from deformux.networks.model_file import ModelCard, network_options, planned_network, save_model, warm_start
from deformux.publishing.project_plan import continued_plan

__all__ = ["Settings", "train_on_folder"]


@dataclass(frozen=True)
class Settings:
    """What a user decided of a training.

    Args:
        given: of network and input; the rest is planned.
        modality: of the scans, as the folder states it; empty if it states none.
        sequences: of a case, the network's channels; none for one.
        recipe: of the training.
        fixed: its fields that the user set, which a plan does not change.
        timed: take as many steps as fit into ``minutes``, or the default ones, instead of the recipe's.
        minutes: of the training, or None.
    """

    given: Choices
    modality: str
    sequences: tuple[str, ...]
    recipe: Recipe
    fixed: Mapping[str, object]
    timed: bool
    minutes: float | None


def train_on_folder(
    cases: Sequence[Case],
    output: Path,
    *,
    labels: Sequence[str],
    settings: Settings,
    start_from: tuple[str, Path] | None,
    validate: int,
    resume: bool,
    seed: int,
    device: str,
    threads: int,
) -> None:
    """Train a network, under ``torchrun`` with the other processes, and save it with its card.

    Args:
        cases: all labelled volumes.
        output: the model file.
        labels: names of labels 1..N.
        settings: of the network and its training.
        start_from: name and file of the model to fine-tune.
        validate: number of cases to hold out.
        resume: keep a checkpoint beside the model file, and resume from it.
        seed, device, threads: options of the command.
    """
    with clear_errors(TrainingError), joined(torch_device(device)) as ranks:
        use_threads(threads)
        if ranks.is_writer:
            writable_file(output, suffix=".safetensors")
        training, held_out = _split(cases, validate)
        kept = output.with_suffix(".resume")
        file = kept / "plan.json" if resume else None
        plan = _kept(ranks, file, lambda: _planned(cases, labels, settings, start_from, ranks))
        setup = Plan.from_dict(plan)
        recipe = settings.recipe.replace(**{**setup.recipe_changes, **settings.fixed})
        torch.manual_seed(seed)
        network = planned_network(setup, len(labels), guidance=recipe.clicks > 0)
        if start_from:
            warm_start(network, start_from[1])
        if settings.timed:
            recipe = Recipe.from_dict(
                _kept(
                    ranks,
                    kept / "recipe.json" if resume else None,
                    lambda: in_minutes(
                        settings.minutes or default_minutes(ranks.device),
                        network,
                        training,
                        recipe=recipe,
                        prep=setup.preprocessing,
                        labels=labels,
                        val_cases=held_out,
                        device=ranks.device,
                    ).to_dict(),
                )
            )
        result = _fit(
            network,
            training,
            held_out,
            labels=labels,
            prep=setup.preprocessing,
            recipe=recipe,
            seed=seed,
            checkpoint=kept / "checkpoint.safetensors" if resume else None,
            store=kept / "preprocessed",
            ranks=ranks,
        )
        if not ranks.is_writer:
            return
        card = ModelCard(
            tuple(labels),
            setup.preprocessing.with_dropout(recipe.sequence_dropout),
            setup.preset,
            setup.preprocessing.channels,
            plan=setup.for_card(),
            parent=start_from[0] if start_from else None,
            seed=seed,
        )
        card = _card(card, network, training, recipe, result, device=ranks.device)
        shutil.rmtree(kept / "preprocessed", ignore_errors=True)
        fitted = fit_locator(
            training,
            prep=setup.preprocessing,
            labels=labels,
            val_cases=held_out,
            sequence_dropout=recipe.sequence_dropout,
            device=ranks.device,
            seed=seed,
        )
        card = dataclasses.replace(card, locator=fitted.facts)
        save_model(output, network, card if fitted.locator is None else save_locator(output, fitted.locator, card))
        shutil.rmtree(kept, ignore_errors=True)
        if result.resumed_from:
            console.print(f"resumed after step {result.resumed_from}")
        console.print(f"{output}: {len(training)} volumes, {result.seconds:.0f} s, last loss {result.losses[-1]:.3f}")


def _planned(
    cases: Sequence[Case],
    labels: Sequence[str],
    settings: Settings,
    start_from: tuple[str, Path] | None,
    ranks: Ranks,
) -> dict[str, Any]:
    """Plan by the cases of the training, and print the plan; one that starts from a model keeps most of the model's."""
    facts = read_fingerprint([case.image for case in cases], cases, modality=settings.modality)
    if start_from is not None:
        model, given = start_from[1], settings.given
        return continued_plan(model, given, settings.sequences, facts=facts, n_labels=len(labels)).to_dict()
    plan = plan_on(
        str(ranks.device),
        facts,
        labels=labels,
        given=settings.given,
        minutes=settings.minutes,
        sequences=settings.sequences,
        measured=not settings.given.fixes_the_patch,
    )
    console.print(plan_table(plan))
    return plan.to_dict()


def _kept(ranks: Ranks, file: Path | None, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the same values to all processes, and again when a training is resumed; ``file`` keeps them."""
    return dict(ranks.from_writer(make if file is None else lambda: kept_or_made(file, make)))


def _card(
    card: ModelCard,
    network: DeformUXNet,
    training: Sequence[Case],
    recipe: Recipe,
    result: FitResult,
    *,
    device: str,
) -> ModelCard:
    """Add a training and its result to a card."""
    return dataclasses.replace(
        card,
        network_options=network_options(network),
        training_cases=tuple(case.id for case in training),
        training_labels={case.id: label_checksum(case) for case in training},
        recipe=recipe.to_dict(),
        validation={"mean_dice": result.best_dice, "per_case": result.per_case},
        seconds=round(result.seconds, 1),
        device=device_name(device),
    )


def _split(cases: Sequence[Case], validate: int) -> tuple[list[Case], list[Case]]:
    """Return the cases to train on, and those held out to choose the best weights."""
    # Evenly through the list: neighbours in a folder often come from one site.
    held_out = {int(i) for i in np.linspace(0, len(cases) - 1, validate)} if validate else set()
    return [case for i, case in enumerate(cases) if i not in held_out], [cases[i] for i in sorted(held_out)]


def _fit(
    network: DeformUXNet,
    training: Sequence[Case],
    held_out: Sequence[Case],
    *,
    labels: Sequence[str],
    prep: Preprocessing,
    recipe: Recipe,
    seed: int,
    checkpoint: Path | None,
    store: Path,
    ranks: Ranks,
) -> FitResult:
    """Train with a progress bar."""
    with timed_bar("training", shown=ranks.is_writer) as bar:
        task = bar.add_task(f"preparing {len(training)} volumes", total=None)

        def show(p: Progress) -> None:
            dice = "" if p.best_dice is None else f", best Dice {p.best_dice:.3f}"
            bar.update(task, total=p.total_steps, completed=p.step, description=f"loss {p.loss:.3f}{dice}")

        return fit(
            network,
            training,
            recipe=recipe,
            prep=prep,
            labels=labels,
            val_cases=held_out,
            device=ranks.device,
            on_progress=show,
            seed=seed,
            checkpoint=checkpoint,
            store=store,
            ranks=ranks,
        )
