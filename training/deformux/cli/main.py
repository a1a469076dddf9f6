"""The ``deformux`` command: train, apply and score on plain NIfTI folders."""

from __future__ import annotations

import csv
import io
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import nibabel as nib
import numpy as np
import torch
import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from deformux.cli.clicks import clicks_command
from deformux.cli.common import (
    LARGEST_SEED,
    MOST_THREADS,
    ProgressBar,
    assignments,
    clear_errors,
    console,
    device_name,
    existing_folder,
    model_path,
    named_labels,
    one_of,
    torch_device,
    use_threads,
    writable_file,
    writable_folder,
)
from deformux.cli.simulate import simulate_command
from deformux.cli.versions import app as versions_app
from deformux.data.atomic_files import replacing, write_text
from deformux.data.cases import InvalidFolder, find_cases, find_images, result_names, volume_id
from deformux.data.loading import filled_voxels
from deformux.data.preprocessing import MODALITIES, Preprocessing
from deformux.data.volume_reader import InvalidVolume
from deformux.fitting.checkpoint import label_checksum
from deformux.fitting.distributed import joined
from deformux.fitting.fit import Progress, fit
from deformux.fitting.recipe import RECIPES
from deformux.inference.captured_network import prepared
from deformux.inference.metrics import mean_dice
from deformux.inference.sliding_window import evaluate as evaluate_cases
from deformux.inference.sliding_window import segment
from deformux.networks.deformux_net import DeformUXNet
from deformux.networks.presets import PRESETS
from deformux.networks.model_file import ModelCard, load_model, network_options, save_model, warm_start

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="DeformUX-Net on folders of NIfTI volumes: train, predict, evaluate.",
)
app.add_typer(versions_app, name="versions")
app.command(name="simulate")(simulate_command)
app.command(name="clicks")(clicks_command)

Threads = Annotated[int, typer.Option(help="CPU threads; 0 lets PyTorch choose.", min=0, max=MOST_THREADS)]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N; auto takes the first GPU where there is one.")]
ModelFile = Annotated[
    str, typer.Argument(help="A .safetensors file with its .json card, or the name of a shipped model.")
]


@app.callback()
def _main(verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say what is being done.")] = False) -> None:
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=Console(stderr=True), show_path=False)],
    )


@app.command(name="fit")
def fit_command(
    data: Annotated[Path, typer.Argument(help="Folder with images/ and labels/ (or imagesTr/ and labelsTr/).")],
    output: Annotated[Path, typer.Argument(help="Model file to write (.safetensors; its .json card goes beside it).")],
    labels: Annotated[
        str, typer.Option(help="Names of labels 1..N, comma separated; default: from dataset.json.")
    ] = "",
    modality: Annotated[str, typer.Option(help=" or ".join(MODALITIES))] = "ct",
    preset: Annotated[str, typer.Option(help=", ".join(PRESETS))] = "tiny",
    spacing: Annotated[str, typer.Option(help="Voxel size R,A,S in mm, or native.")] = "native",
    patch_size: Annotated[str, typer.Option(help="Patch R,A,S in voxels.")] = "96,96,96",
    recipe: Annotated[str, typer.Option(help=", ".join(RECIPES))] = "finetune",
    set_: Annotated[list[str] | None, typer.Option("--set", help="Change the recipe, e.g. --set steps=2000.")] = None,
    start_from: Annotated[str, typer.Option(help="Model file or shipped name to fine-tune from.")] = "",
    subset: Annotated[str, typer.Option(help="Subset of split.json to train on, e.g. train.")] = "",
    validate: Annotated[int, typer.Option(help="Hold out this many cases to choose the best weights.", min=0)] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep a checkpoint beside the model file, and go on from it.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of every random choice.", min=0, max=LARGEST_SEED)] = 0,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Train a network on a labelled folder; under torchrun, in several processes together."""
    with clear_errors(), joined(torch_device(device)) as ranks:
        use_threads(threads)
        where = ranks.device
        names = named_labels(labels, existing_folder(data))
        prep = Preprocessing.from_options(modality, spacing, patch_size)
        cases = find_cases(data, subset=subset or None)
        if len(cases) <= validate:
            raise InvalidFolder(f"{data} has {len(cases)} cases; --validate {validate} leaves none to train on")
        # Evenly through the list: neighbours in a folder often come from one site.
        held_out = {int(i) for i in np.linspace(0, len(cases) - 1, validate)} if validate else set()
        if ranks.is_writer:
            writable_file(output, suffix=".safetensors")
        plan = RECIPES[one_of("recipe", recipe, tuple(RECIPES))].replace(**assignments(set_ or []))
        torch.manual_seed(seed)
        network = DeformUXNet(1, len(names) + 1, preset, guidance=plan.clicks > 0)
        if start_from:
            warm_start(network, model_path(start_from))
        train_cases = [case for i, case in enumerate(cases) if i not in held_out]
        # A folder of its own: what a killed process was writing goes with it.
        kept = output.with_suffix(".resume")
        with _bar("training", shown=ranks.is_writer) as bar:
            task = bar.add_task(f"preparing {len(train_cases)} volumes", total=None)

            def show(p: Progress) -> None:
                dice = "" if p.best_dice is None else f", best Dice {p.best_dice:.3f}"
                bar.update(task, total=p.total_steps, completed=p.step, description=f"loss {p.loss:.3f}{dice}")

            result = fit(
                network,
                train_cases,
                recipe=plan,
                prep=prep,
                labels=names,
                val_cases=[cases[i] for i in sorted(held_out)],
                device=where,
                on_progress=show,
                seed=seed,
                checkpoint=kept / "checkpoint.safetensors" if resume else None,
                ranks=ranks,
            )
        if not ranks.is_writer:
            return
        card = ModelCard(
            labels=tuple(names),
            preprocessing=prep,
            preset=preset,
            network_options=network_options(network),
            parent=start_from or None,
            training_cases=tuple(case.id for case in train_cases),
            training_labels={case.id: label_checksum(case) for case in train_cases},
            recipe=plan.to_json(),
            seed=seed,
            validation={"mean_dice": result.best_dice, "per_case": result.per_case},
            seconds=round(result.seconds, 1),
            device=device_name(where),
        )
        save_model(output, network, card)
        shutil.rmtree(kept, ignore_errors=True)
        if result.resumed_from:
            console.print(f"went on after step {result.resumed_from}")
        console.print(
            f"{output}: {len(train_cases)} volumes, {result.seconds:.0f} s, last loss {result.losses[-1]:.3f}"
        )


@app.command()
def predict(
    model: ModelFile,
    images: Annotated[Path, typer.Argument(help="A volume, or a folder of volumes.")],
    output: Annotated[Path, typer.Argument(help="Folder for the label volumes (.nii.gz).")],
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Segment volumes; each result lies on its scan's own grid."""
    with clear_errors():
        use_threads(threads)
        where = torch_device(device)
        network, card = load_model(model_path(model))
        ready = prepared(network, where)
        paths = [images] if images.is_file() else find_images(existing_folder(images))
        names = result_names(paths)
        scans = {path.resolve() for path in paths}
        for name in names:
            if (target := output / f"{name}.nii.gz").resolve() in scans:
                raise InvalidFolder(f"a result would replace the scan {target}; give another folder than the scans'")
        writable_folder(output)
        failed, said = [], []
        with _bar("segmenting") as bar:
            task = bar.add_task("segmenting", total=len(paths))
            for path, name in zip(paths, names, strict=True):
                try:
                    labels, _ = segment(ready, path, card.preprocessing, device=where)
                except InvalidVolume as error:
                    # One bad file must not cost the results of a folder.
                    failed.append(str(error))
                else:
                    _write_labels(output / f"{name}.nii.gz", labels[0].numpy(), labels.affine.numpy())
                    if filled := filled_voxels(labels):
                        said.append(f"{path.name}: {filled}")
                    if (stem := volume_id(path)) != name:
                        other = paths[names.index(stem)].name
                        said.append(f"{path.name} is written as {name}.nii.gz: {stem}.nii.gz is for {other}")
                bar.update(task, advance=1)
        _say(said)
        for message in failed:
            console.print(f"[red]skipped:[/red] {escape(message)}")
        console.print(f"{len(paths) - len(failed)} of {len(paths)} volumes written to {output}; labels {_legend(card)}")
        if failed:
            raise typer.Exit(1)


@app.command()
def evaluate(
    model: ModelFile,
    data: Annotated[Path, typer.Argument(help="Folder with images/ and labels/.")],
    subset: Annotated[str, typer.Option(help="Subset of split.json, e.g. val.")] = "",
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Write one row per case.")] = None,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Score a model on a labelled folder: Dice per label and case."""
    with clear_errors():
        use_threads(threads)
        where = torch_device(device)
        network, card = load_model(model_path(model))
        cases = find_cases(existing_folder(data), subset=subset or None)
        if csv_file is not None:
            writable_file(csv_file)
        said: list[str] = []
        with _bar("scoring") as bar:
            task = bar.add_task("scoring", total=len(cases))
            scores = evaluate_cases(
                network,
                cases,
                card.preprocessing,
                n_labels=len(card.labels),
                device=where,
                on_case=lambda *_: bar.update(task, advance=1),
                on_warning=lambda case, filled: said.append(f"{case.image.name}: {filled}"),
            )
        _say(said)
        per_case = np.array(list(scores.values()))
        table = Table("label", "mean Dice", "median", "worst", title=f"{model} on {len(cases)} volumes")
        for index, name in enumerate(card.labels):
            values = per_case[:, index][~np.isnan(per_case[:, index])]
            if len(values):
                table.add_row(name, f"{values.mean():.4f}", f"{np.median(values):.4f}", f"{values.min():.4f}")
            else:
                table.add_row(name, "in no case", "", "")
        console.print(table)
        console.print(f"mean Dice {mean_dice(per_case):.4f}")
        if csv_file is not None:
            text = io.StringIO()
            writer = csv.writer(text)
            writer.writerow(["case", *card.labels])
            writer.writerows([name, *(f"{value:.6f}" for value in row)] for name, row in scores.items())
            write_text(csv_file, text.getvalue())


@contextmanager
def _bar(what: str, *, shown: bool = True) -> Iterator[ProgressBar]:
    columns = (
        TextColumn(f"{what}: {{task.description}}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("elapsed"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with ProgressBar(*columns, disable=not shown) as bar:
        yield bar


def _say(sentences: Sequence[str]) -> None:
    """Print sentences about files, each in a line."""
    for sentence in sentences:
        console.print(escape(sentence), soft_wrap=True, highlight=False)


def _write_labels(path: Path, labels: np.ndarray, affine: np.ndarray) -> None:
    with replacing(path) as temporary:
        nib.save(nib.Nifti1Image(labels.astype(np.uint8), affine), temporary)


def _legend(card: ModelCard) -> str:
    return ", ".join(f"{value} {name}" for value, name in enumerate(card.labels, start=1))


if __name__ == "__main__":
    app()
