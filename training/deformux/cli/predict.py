"""Implementation of ``deformux predict``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import typer
from rich.markup import escape
from rich.progress import Progress as ProgressBar
from rich.progress import TaskID

from deformux.cli.common import console, print_sentences, timed_bar
from deformux.cli.devices import torch_device, use_threads
from deformux.cli.locators import locator_beside
from deformux.data.atomic_files import replacing
from deformux.data.cases import volume_id
from deformux.data.loading import filled_voxels
from deformux.data.volume_reader import InvalidVolume
from deformux.inference.captured_network import prepared
from deformux.inference.sliding_window import segment_labels
from deformux.networks.model_file import ModelCard, load_model

__all__ = ["segment_files"]


def segment_files(model: Path, results: Mapping[str, Path], output: Path, *, device: str, threads: int) -> None:
    """Segment volumes into a folder, and list those that could not be read.

    Args:
        model: file of the model.
        results: name of each result, without a suffix, to its scan.
        output: folder for the label volumes.
        device, threads: options of the command.

    Raises:
        typer.Exit: a volume could not be read; all others are written.
    """
    use_threads(threads)
    where = torch_device(device)
    network, card = load_model(model)
    ready = prepared(network, where)
    locator = locator_beside(model, card, device=where)
    failed, said = [], []
    with timed_bar("segmenting") as bar:
        task = bar.add_task("segmenting", total=len(results))
        for name, path in results.items():
            try:
                show = partial(_show_windows, bar, task, name)
                labels = segment_labels(ready, path, card.preprocessing, device=where, locator=locator, on_windows=show)
            except InvalidVolume as error:
                # One bad file must not cost the results of a folder.
                failed.append(str(error))
            else:
                _write_labels(output / f"{name}.nii.gz", labels[0].numpy(), labels.affine.numpy())
                if filled := filled_voxels(labels):
                    said.append(f"{path.name}: {filled}")
                if (stem := volume_id(path)) != name:
                    other = results[stem].name
                    said.append(f"{path.name} is written as {name}.nii.gz: {stem}.nii.gz is for {other}")
            bar.update(task, advance=1)
    print_sentences(said)
    for message in failed:
        console.print(f"[red]skipped:[/red] {escape(message)}")
    written = len(results) - len(failed)
    console.print(f"{written} of {len(results)} volumes written to {output}; labels {_legend(card)}")
    if failed:
        raise typer.Exit(1)


def _show_windows(bar: ProgressBar, task: TaskID, name: str, done: int, of: int) -> None:
    bar.update(task, description=f"{escape(name)}, window {done} of {of}")


def _write_labels(path: Path, labels: np.ndarray, affine: np.ndarray) -> None:
    with replacing(path) as temporary:
        nib.save(nib.Nifti1Image(labels.astype(np.uint8), affine), temporary)


def _legend(card: ModelCard) -> str:
    return ", ".join(f"{value} {name}" for value, name in enumerate(card.labels, start=1))
