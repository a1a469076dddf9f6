"""Implementation of ``deformux fit``."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from deformux.cli.common import clear_errors, console, timed_bar, writable_file
from deformux.cli.devices import device_name, torch_device, use_threads
from deformux.data.cases import Case
from deformux.data.preprocessing import Preprocessing
from deformux.fitting.checkpoint import label_checksum
from deformux.fitting.distributed import Ranks, joined
from deformux.fitting.fit import FitResult, Progress, TrainingError, fit
from deformux.fitting.recipe import Recipe
from deformux.networks.deformux_net import DeformUXNet
from deformux.networks.model_file import ModelCard, network_options, save_model, warm_start

__all__ = ["train_on_folder"]


def train_on_folder(
    cases: Sequence[Case],
    output: Path,
    *,
    labels: Sequence[str],
    prep: Preprocessing,
    preset: str,
    recipe: Recipe,
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
        labels, prep, preset, recipe: of the network and its training.
        start_from: name and file of the model to fine-tune.
        validate: number of cases to hold out.
        resume: keep a checkpoint beside the model file, and resume from it.
        seed, device, threads: options of the command.
    """
    with clear_errors(TrainingError), joined(torch_device(device)) as ranks:
        use_threads(threads)
        if ranks.is_writer:
            writable_file(output, suffix=".safetensors")
        torch.manual_seed(seed)
        network = DeformUXNet(prep.channels, len(labels) + 1, preset, guidance=recipe.clicks > 0)
        if start_from:
            warm_start(network, start_from[1])
        training, held_out = _split(cases, validate)
        # In its own folder: unfinished files of killed processes are deleted with it.
        kept = output.with_suffix(".resume")
        result = _fit(
            network,
            training,
            held_out,
            labels=labels,
            prep=prep,
            recipe=recipe,
            seed=seed,
            checkpoint=kept / "checkpoint.safetensors" if resume else None,
            ranks=ranks,
        )
        if not ranks.is_writer:
            return
        card = ModelCard(
            tuple(labels),
            prep.with_dropout(recipe.sequence_dropout),
            preset,
            prep.channels,
            parent=start_from[0] if start_from else None,
            seed=seed,
        )
        save_model(output, network, _card(card, network, training, recipe, result, device=ranks.device))
        shutil.rmtree(kept, ignore_errors=True)
        if result.resumed_from:
            console.print(f"resumed after step {result.resumed_from}")
        console.print(f"{output}: {len(training)} volumes, {result.seconds:.0f} s, last loss {result.losses[-1]:.3f}")


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
            ranks=ranks,
        )
