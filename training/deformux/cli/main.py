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
    MAX_THREADS,
    assignments,
    clear_errors,
    ended_by_sigterm,
    existing_folder,
    model_path,
    named_labels,
    valid_device,
    with_sequences,
    writable_file,
    writable_folder,
)
from deformux.cli.shards import Shard, sbatch_options
from deformux.cli.simulate_options import chosen_strategies, short_recipes
from deformux.cli.versions import app as versions_app
from deformux.data.cases import (
    InvalidFolder,
    find_cases,
    find_images,
    label_names,
    result_names,
    sequence_naming,
    split_label_names,
)
from deformux.data.choices import AUTO, Choices
from deformux.data.fingerprint import declared_modality
from deformux.data.preprocessing import FRAMES, MODALITIES, Preprocessing
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

Threads = Annotated[int, typer.Option(help="CPU threads; 0 lets PyTorch choose.", min=0, max=MAX_THREADS)]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N; auto takes the first GPU if there is one.")]
ModelFile = Annotated[
    str, typer.Argument(help="A .safetensors file with its .json card, or the name of a shipped model.")
]
ScanFolder = Annotated[Path, typer.Argument(help="A volume, or a folder of volumes.")]
ResultFolder = Annotated[Path, typer.Argument(help="Folder for the label volumes (.nii.gz).")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace results that another model has made.")]
LabelNames = Annotated[str, typer.Option(help="Names of labels 1..N, comma separated; default: from dataset.json.")]
Modality = Annotated[str, typer.Option(help=" or ".join(MODALITIES))]
PresetName = Annotated[str, typer.Option(help=", ".join(PRESETS))]
Spacing = Annotated[str, typer.Option(help="Voxel size R,A,S in mm, or native.")]
PatchSize = Annotated[str, typer.Option(help="Patch R,A,S in voxels.")]
Window = Annotated[str, typer.Option(help="CT window low,high in HU, e.g. -1000,400 for lung.")]
Percentiles = Annotated[str, typer.Option(help="Percentiles low,high to which MR is clipped.")]
Frame = Annotated[
    str, typer.Option(help=f"{' or '.join(FRAMES)}: anatomical axes, or the scan's own with the slices last.")
]
FirstSeed = Annotated[
    int, typer.Option(help="To share a folder between processes, give each different seeds.", min=0, max=MAX_SEED)
]
ContinueSteps = Annotated[
    int, typer.Option(help="Continue from the previous round for this number of steps; 0: train from scratch.", min=0)
]
TestFraction = Annotated[
    float, typer.Option(help="Share of the volumes to test on, chosen by a hash of their ids.", min=0, max=1)
]


@app.callback()
def _main(verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log each step.")] = False) -> None:
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=Console(stderr=True), show_path=False)],
    )


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
        given = Choices.from_options(
            modality=modality,
            spacing=spacing,
            patch_size=patch_size,
            window=window,
            percentiles=percentiles,
            frame=frame,
            preset=preset,
        )
        if given.preset is not None and given.preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}; got {preset!r}")
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
        given = Choices.from_options(
            modality=modality,
            spacing=spacing,
            patch_size=patch_size,
            window=window,
            percentiles=percentiles,
            frame=frame,
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


@app.command(name="predict")
def predict_command(
    model: ModelFile,
    images: ScanFolder,
    output: ResultFolder,
    shard: Annotated[str, typer.Option(help="i/n: only share i of n, for n processes on one folder.")] = "1/1",
    overwrite: Overwrite = False,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Segment volumes; each result lies on its scan's own grid. Run it again to go on: results that exist stay."""
    with clear_errors(), ended_by_sigterm():
        valid_device(device)
        share = Shard.parse(shard)
        file = model_path(model)
        results = _results(images, output)
        from deformux.cli.predict import print_predicted, scans_of, segment_files
        from deformux.networks.model_file import read_card

        card = read_card(file)
        scans = share.of(scans_of(results, card.preprocessing.sequences))
        done = segment_files(file, scans, output, overwrite=overwrite, device=device, threads=threads)
        print_predicted(done, card, output)


@app.command(name="predict-cluster")
def predict_cluster_command(
    model: ModelFile,
    images: ScanFolder,
    output: ResultFolder,
    cluster: Annotated[str, typer.Option(help="slurm, or local: processes on this machine.")] = "slurm",
    shards: Annotated[int, typer.Option(help="Number of jobs.", min=1, max=10_000)] = 8,
    max_parallel: Annotated[int, typer.Option(help="Most jobs at once; 0: no limit, locally by cores.", min=0)] = 0,
    retries: Annotated[int, typer.Option(help="How often a job that died is sent again.", min=0, max=100)] = 2,
    timeout_min: Annotated[int, typer.Option(help="Time limit of a job in minutes.", min=1, max=100_000)] = 240,
    partition: Annotated[str, typer.Option(help="SLURM's partition.")] = "",
    gres: Annotated[str, typer.Option(help="SLURM's resources of a job, e.g. gpu:1.")] = "",
    slurm: Annotated[list[str] | None, typer.Option(help="Further options of sbatch, e.g. --slurm mem=16G.")] = None,
    overwrite: Overwrite = False,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Segment volumes in several jobs, on SLURM or on this machine; jobs that die are sent again."""
    with clear_errors(), ended_by_sigterm():
        valid_device(device)
        if cluster not in ("slurm", "local"):
            raise ValueError(f"cluster must be slurm or local; got {cluster!r}")
        chosen = {"partition": partition, "gres": gres} | sbatch_options(slurm or [])
        file = model_path(model)
        results = _results(images, output)
        from deformux.cli.predict import print_predicted, scans_of
        from deformux.cli.predict_cluster import ClusterOptions, predict_on_cluster
        from deformux.networks.model_file import read_card

        options = ClusterOptions(
            cluster,
            shards,
            max_parallel,
            retries,
            timeout_min,
            {name: value for name, value in chosen.items() if value},
        )
        card = read_card(file)
        scans = scans_of(results, card.preprocessing.sequences)
        done = predict_on_cluster(
            file, scans, output, options=options, overwrite=overwrite, device=device, threads=threads
        )
        print_predicted(done, card, output)


def _results(images: Path, output: Path) -> dict[str, Path]:
    """Return the name of each result, without a suffix, and its scan; make the folder for them.

    Raises:
        InvalidFolder: there is no scan, or a result would replace one.
    """
    paths = [images] if images.is_file() else find_images(existing_folder(images))
    results = dict(zip(result_names(paths), paths, strict=True))
    scans = {path.resolve() for path in paths}
    for name in results:
        if (target := output / f"{name}.nii.gz").resolve() in scans:
            raise InvalidFolder(f"a result would replace the scan {target}; name a different output folder")
    writable_folder(output)
    return results


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
