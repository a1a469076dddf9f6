"""The ``deformux`` command: train, apply and score on plain NIfTI folders.

This module and its imports stay light: PyTorch and MONAI take seconds to import, and ``--help`` or a wrong argument
needs neither. Each command checks its arguments first, then imports the module that does the work.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.logging import RichHandler

from deformux.active_learning.strategy_names import STRATEGIES
from deformux.cli.common import (
    MAX_SEED,
    assignments,
    clear_errors,
    existing_folder,
    model_path,
    named_labels,
    valid_device,
    with_sequences,
    writable_file,
    writable_folder,
)
from deformux.cli.options import (
    ContinueSteps,
    Device,
    FirstSeed,
    Frame,
    KeepLargest,
    LabelNames,
    Modality,
    ModelFile,
    PatchSize,
    Percentiles,
    PresetName,
    Spacing,
    TestFraction,
    Threads,
    Window,
)
from deformux.cli.predict_commands import predict_cluster_command, predict_command
from deformux.cli.simulate_options import chosen_strategies, short_recipes
from deformux.cli.versions import app as versions_app
from deformux.data.cases import (
    InvalidFolder,
    find_cases,
    label_names,
    sequence_naming,
    split_label_names,
)
from deformux.data.choices import AUTO, Choices
from deformux.data.preprocessing import Preprocessing
from deformux.data.scan_folder import scans_and_cases
from deformux.fitting.recipe import RECIPES
from deformux.networks.presets import PRESETS

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="DeformUX-Net on folders of NIfTI volumes: train, predict, evaluate.",
)
app.add_typer(versions_app, name="versions")


@app.callback()
def _main(verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log each step.")] = False) -> None:
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=Console(stderr=True), show_path=False)],
    )


def _choices(*, preset: str, **texts: str) -> Choices:
    """Parse what a user decided; raise ValueError if a value is not valid."""
    if preset not in (*PRESETS, AUTO):
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, or {AUTO}; got {preset!r}")
    return Choices.from_options(preset=preset, **texts)


@app.command(name="plan")
def plan_command(
    data: Annotated[
        Path, typer.Argument(help="Folder with images/ and perhaps labels/, of scans, or of a server's studies.")
    ],
    labels: Annotated[
        str, typer.Option(help="Names of labels 1..N, comma separated; default: from dataset.json, else numbers.")
    ] = "",
    subset: Annotated[str, typer.Option(help="Subset of split.json to plan from, e.g. train.")] = "",
    minutes: Annotated[
        float | None, typer.Option(help="Minutes of a training; default: 10 on a CPU, 3 on a GPU.", min=0.1)
    ] = None,
    modality: Modality = AUTO,
    window: Window = AUTO,
    percentiles: Percentiles = AUTO,
    frame: Frame = AUTO,
    keep_largest: KeepLargest = AUTO,
    spacing: Spacing = AUTO,
    patch_size: PatchSize = AUTO,
    preset: PresetName = AUTO,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the plan; facts of the scans are kept beside it.")
    ] = None,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Choose every setting of a training from the scans, and print why; whatever is given is kept."""
    with clear_errors():
        valid_device(device)
        names = list(split_label_names(labels)) if labels.strip() else label_names(existing_folder(data)) or []
        given = _choices(
            modality=modality,
            spacing=spacing,
            patch_size=patch_size,
            window=window,
            percentiles=percentiles,
            frame=frame,
            keep_largest=keep_largest,
            preset=preset,
        )
        images, cases = scans_and_cases(existing_folder(data), subset=subset or None)
        if json_file is not None:
            writable_file(json_file, suffix=".json")
        from deformux.cli.plan import plan_folder

        plan_folder(
            data,
            images,
            cases,
            labels=names,
            given=given,
            minutes=minutes,
            json_file=json_file,
            device=device,
            threads=threads,
        )


@app.command(name="fit")
def fit_command(
    data: Annotated[Path, typer.Argument(help="Folder with images/ and labels/ (or imagesTr/ and labelsTr/).")],
    output: Annotated[Path, typer.Argument(help="Model file to write (.safetensors; its .json card goes beside it).")],
    labels: LabelNames = "",
    modality: Modality = AUTO,
    preset: PresetName = AUTO,
    spacing: Spacing = AUTO,
    patch_size: PatchSize = AUTO,
    window: Window = AUTO,
    percentiles: Percentiles = AUTO,
    frame: Frame = AUTO,
    keep_largest: KeepLargest = AUTO,
    minutes: Annotated[
        float | None,
        typer.Option(
            help="Take as many steps as fit; default: 10 on a CPU, 3 on a GPU, unless steps are set.", min=0.1
        ),
    ] = None,
    recipe: Annotated[str, typer.Option(help=", ".join(RECIPES))] = "finetune",
    set_: Annotated[list[str] | None, typer.Option("--set", help="Change the recipe, e.g. --set steps=2000.")] = None,
    start_from: Annotated[str, typer.Option(help="Model file or shipped name to fine-tune from.")] = "",
    subset: Annotated[str, typer.Option(help="Subset of split.json to train on, e.g. train.")] = "",
    validate: Annotated[int, typer.Option(help="Hold out this many cases to choose the best weights.", min=0)] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep a checkpoint beside the model file, and resume from it.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of every random choice.", min=0, max=MAX_SEED)] = 0,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Train a network on a labelled folder; under torchrun, in several processes together."""
    with clear_errors():
        valid_device(device)
        names = named_labels(labels, existing_folder(data))
        given = _choices(
            modality=modality,
            spacing=spacing,
            patch_size=patch_size,
            window=window,
            percentiles=percentiles,
            frame=frame,
            keep_largest=keep_largest,
            preset=preset,
        )
        cases = find_cases(data, subset=subset or None)
        if len(cases) <= validate:
            raise InvalidFolder(f"{data} has {len(cases)} cases; --validate {validate} leaves none to train on")
        if recipe not in RECIPES:
            raise ValueError(f"recipe must be one of {', '.join(RECIPES)}; got {recipe!r}")
        changes = assignments(set_ or [])
        start = (start_from, model_path(start_from)) if start_from else None
        if minutes is not None and "steps" in changes:
            raise ValueError("give either --minutes or --set steps=..., not both")
        from deformux.cli.fit import Settings, train_on_folder
        from deformux.data.fingerprint import declared_modality

        settings = Settings(
            given=given,
            modality=declared_modality(data),
            sequences=sequence_naming(data).channels,
            recipe=RECIPES[recipe].replace(**changes),
            fixed=changes,
            # The paper's recipe is defined by its steps.
            timed=minutes is not None or ("steps" not in changes and recipe != "paper"),
            minutes=minutes,
        )

        train_on_folder(
            cases,
            output,
            labels=names,
            settings=settings,
            start_from=start,
            validate=validate,
            resume=resume,
            seed=seed,
            device=device,
            threads=threads,
        )


app.command(name="predict")(predict_command)
app.command(name="predict-cluster")(predict_cluster_command)


@app.command(name="evaluate")
def evaluate_command(
    model: ModelFile,
    data: Annotated[Path, typer.Argument(help="Folder with images/ and labels/.")],
    subset: Annotated[str, typer.Option(help="Subset of split.json, e.g. val.")] = "",
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Write one row per case.")] = None,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Score a model on a labelled folder: Dice per label and case."""
    with clear_errors():
        valid_device(device)
        file = model_path(model)
        cases = find_cases(existing_folder(data), subset=subset or None)
        if csv_file is not None:
            writable_file(csv_file)
        from deformux.cli.evaluate import score_on_folder

        score_on_folder(file, cases, title=model, csv_file=csv_file, device=device, threads=threads)


@app.command(name="clicks")
def clicks_command(
    data: Annotated[Path, typer.Argument(help="Folder with images/ and labels/ (or imagesTr/ and labelsTr/).")],
    model: Annotated[str, typer.Option(help="Model file with its card, or the name of a shipped model.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder for per_case.csv, summary.csv, summary.md and clicks.png.")
    ] = None,
    subset: Annotated[str, typer.Option(help="Subset of split.json, e.g. val.")] = "",
    limit: Annotated[int, typer.Option(help="Number of volumes, spread evenly over the list; 0 takes all.", min=0)] = 0,
    noc_cap: Annotated[int, typer.Option(help="Clicks after which a simulated annotator gives up.", min=1)] = 20,
    jitter: Annotated[
        float, typer.Option(help="How far from the centre the second annotator clicks, 0 to 1.", min=0, max=1)
    ] = 0.5,
    seed: Annotated[int, typer.Option(help="Seed of the second annotator's jitter.", min=0, max=MAX_SEED)] = 0,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Measure what clicks gain: simulated annotators correct a labelled folder, at or beside the centres of errors."""
    with clear_errors():
        valid_device(device)
        file = model_path(model)
        cases = find_cases(existing_folder(data), subset=subset or None)
        if output is not None:
            writable_folder(output)
        if limit:
            cases = [cases[i] for i in np.unique(np.linspace(0, len(cases) - 1, min(limit, len(cases))).astype(int))]
        from deformux.cli.clicks import correct_by_robots

        correct_by_robots(
            file,
            cases,
            title=model,
            output=output,
            cap=noc_cap,
            jitter=jitter,
            seed=seed,
            device=device,
            threads=threads,
        )


@app.command(name="simulate")
def simulate_command(
    data: Annotated[Path, typer.Option(help="Folder with images/ and labels/ (or imagesTr/ and labelsTr/).")],
    output: Annotated[Path, typer.Option(help="Folder for rounds.csv, summary.csv, curves.png and kept results.")],
    strategy: Annotated[str, typer.Option(help=f"all, or some of {', '.join(STRATEGIES)}, comma separated.")] = "all",
    rounds: Annotated[int, typer.Option(help="Trainings per strategy and seed.", min=1)] = 6,
    batch: Annotated[int, typer.Option(help="Volumes labelled after each training.", min=1)] = 5,
    start: Annotated[int, typer.Option(help="Volumes labelled before the first training.", min=1)] = 5,
    seeds: Annotated[int, typer.Option(help="Number of repetitions of everything.", min=1, max=1000)] = 5,
    first_seed: FirstSeed = 0,
    steps: Annotated[int, typer.Option(help="Optimizer steps of each training.", min=1)] = 400,
    continue_steps: ContinueSteps = 0,
    test_fraction: TestFraction = 0.25,
    subset: Annotated[str, typer.Option(help="Subset of split.json to simulate on, e.g. train.")] = "",
    labels: LabelNames = "",
    modality: Modality = "ct",
    preset: PresetName = "tiny",
    spacing: Spacing = "native",
    patch_size: PatchSize = "96,96,96",
    set_: Annotated[list[str] | None, typer.Option("--set", help="Change the recipe, e.g. --set flip_axes=0,")] = None,
    snapshots: Annotated[int, typer.Option(help="Number of latest models whose predictions are compared.", min=1)] = 1,
    start_from: Annotated[str, typer.Option(help="Model file or shipped name that every training starts from.")] = "",
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Compare strategies for choosing what to label, on a fully labelled folder."""
    with clear_errors():
        valid_device(device)
        names = named_labels(labels, existing_folder(data))
        recipe, continue_recipe = short_recipes(steps, continue_steps, set_ or [])
        strategies = chosen_strategies(strategy, several_samples=snapshots > 1 or bool(recipe.flip_axes))
        prep = with_sequences(Preprocessing.from_options(modality, spacing, patch_size), data)
        prep = prep.with_dropout(recipe.sequence_dropout)
        first_model = model_path(start_from) if start_from else None
        cases = find_cases(data, subset=subset or None)
        writable_folder(output)
        from deformux.cli.simulate import simulate_on_folder

        simulate_on_folder(
            cases,
            output,
            test_fraction=test_fraction,
            strategies=strategies,
            rounds=rounds,
            batch=batch,
            start=start,
            seeds=tuple(range(first_seed, first_seed + seeds)),
            recipe=recipe,
            continue_recipe=continue_recipe,
            prep=prep,
            labels=tuple(names),
            preset=preset,
            snapshots=snapshots,
            start_from=first_model,
            device=device,
            threads=threads,
        )


if __name__ == "__main__":
    app()
