"""Implementation of ``deformux predict``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import typer
from rich.markup import escape

from deformux.cli.common import console, print_sentences, timed_bar
from deformux.cli.devices import torch_device, use_threads
from deformux.data.atomic_files import replacing
from deformux.data.cases import folder_naming, result_names, volume_id
from deformux.data.loading import filled_voxels, missing_sequences
from deformux.data.sequences import SequenceNaming, first_present, split_stem
from deformux.data.volume_reader import InvalidVolume
from deformux.inference.captured_network import prepared
from deformux.inference.sliding_window import segment
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
    scans = _scans(results, card.preprocessing.sequences)
    ready = prepared(network, where)
    failed, said = [], []
    with timed_bar("segmenting") as bar:
        task = bar.add_task("segmenting", total=len(scans))
        for name, files in scans.items():
            path = first_present(files)
            try:
                labels, _ = segment(ready, files, card.preprocessing, device=where)
            except InvalidVolume as error:
                # One bad file must not cost the results of a folder.
                failed.append(str(error))
            else:
                _write_labels(output / f"{name}.nii.gz", labels[0].numpy(), labels.affine.numpy())
                notes = filter(None, (filled_voxels(labels), missing_sequences(labels)))
                said += [f"{path.name}: {note}" for note in notes]
                if (stem := volume_id(path)) != name and stem in scans:
                    other = first_present(scans[stem]).name
                    said.append(f"{path.name} is written as {name}.nii.gz: {stem}.nii.gz is for {other}")
            bar.update(task, advance=1)
    print_sentences(said)
    for message in failed:
        console.print(f"[red]skipped:[/red] {escape(message)}")
    written = len(scans) - len(failed)
    console.print(f"{written} of {len(scans)} volumes written to {output}; labels {_legend(card)}")
    if failed:
        raise typer.Exit(1)


def _scans(results: Mapping[str, Path], sequences: Sequence[str]) -> dict[str, tuple[Path, ...]]:
    """Return the files of each result: those of a case's sequences together, if the model takes several."""
    if not sequences:
        return {name: (path,) for name, path in results.items()}
    naming = folder_naming(list(results.values()), sequences)
    cases = [naming.files_of(first_present(files)) for files in naming.group(results.values())]
    names = result_names([path.with_name(_case_name(path, naming)) for path in map(first_present, cases)])
    return dict(zip(names, cases, strict=True))


def _case_name(path: Path, naming: SequenceNaming) -> str:
    stem, suffix = split_stem(path.name)
    return naming.split(stem)[0] + suffix


def _write_labels(path: Path, labels: np.ndarray, affine: np.ndarray) -> None:
    with replacing(path) as temporary:
        nib.save(nib.Nifti1Image(labels.astype(np.uint8), affine), temporary)


def _legend(card: ModelCard) -> str:
    return ", ".join(f"{value} {name}" for value, name in enumerate(card.labels, start=1))
