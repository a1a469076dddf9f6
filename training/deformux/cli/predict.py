"""Implementation of ``deformux predict``."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import typer
from rich.markup import escape
from rich.progress import TaskID

from deformux.cli.common import ProgressBar, console, print_sentences, timed_bar
from deformux.cli.devices import torch_device, use_threads
from deformux.cli.locators import locator_beside
from deformux.data.cases import folder_naming, result_names, volume_id
from deformux.data.loading import filled_voxels, missing_sequences
from deformux.data.result_record import ResultRecord, read_record, write_recorded
from deformux.data.sequences import SequenceNaming, first_present, split_stem
from deformux.data.volume_reader import InvalidVolume
from deformux.inference.captured_network import prepared
from deformux.inference.locate import Locator
from deformux.inference.slabs import WindowsDone
from deformux.inference.sliding_window import Network, segment_labels
from deformux.networks.model_file import ModelCard, load_model
from deformux.networks.model_identity import model_identity

__all__ = ["Predicted", "print_predicted", "results_to_make", "scans_of", "segment_files"]

logger = logging.getLogger(__name__)

# Results are written in seconds: an unfinished file that has not grown for so long is of a killed process.
_ABANDONED_S = 3600


@dataclass
class Predicted:
    """What became of the scans of a run.

    Args:
        written: number of results written.
        kept: number of results that were there already.
        failed: sentence for each scan without a result.
        notes: sentences on scans with a result.
    """

    written: int = 0
    kept: int = 0
    failed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def scans_of(results: Mapping[str, Path], sequences: Sequence[str]) -> dict[str, tuple[Path, ...]]:
    """Return the files of each result: those of a case's sequences together, if the model takes several.

    Those of missing sequences do not exist.
    """
    if not sequences:
        return {name: (path,) for name, path in results.items()}
    naming = folder_naming(list(results.values()), sequences)
    cases = [naming.files_of(first_present(files)) for files in naming.group(results.values())]
    names = result_names([path.with_name(_case_name(path, naming)) for path in map(first_present, cases)])
    return dict(zip(names, cases, strict=True))


def _case_name(path: Path, naming: SequenceNaming) -> str:
    stem, suffix = split_stem(path.name)
    return naming.split(stem)[0] + suffix


def results_to_make(
    model: str, scans: Mapping[str, Sequence[Path]], output: Path, *, overwrite: bool = False
) -> dict[str, tuple[Path, ...]]:
    """Return the results that are not in a folder yet, or whose scan has changed since.

    Args:
        model: identity of the model.
        scans: name of each result, without a suffix, to the files of its scan.
        output: folder of the results.
        overwrite: also make those again that another model, or something else, has made.

    Raises:
        ValueError: there are such results, and ``overwrite`` is not set.
    """
    missing, foreign = {}, []
    for name, files in scans.items():
        path = output / f"{name}.nii.gz"
        record = read_record(path) if path.exists() else None
        if path.exists() and (record is None or record.model != model):
            foreign.append(path.name)
        elif record is not None and record.holds_for(files):
            continue
        missing[name] = tuple(files)
    if foreign and not overwrite:
        count = "a result" if len(foreign) == 1 else f"{len(foreign)} results"
        raise ValueError(
            f"{output} has {count} that this model did not make (such as {foreign[0]}); "
            "name another folder, or give --overwrite to replace such files"
        )
    return missing


def segment_files(
    model: Path,
    scans: Mapping[str, Sequence[Path]],
    output: Path,
    *,
    overwrite: bool = False,
    device: str = "auto",
    threads: int = 0,
) -> Predicted:
    """Segment volumes into a folder, except those whose result is there.

    A scan that cannot be segmented does not end the run. Processes may write different results into one folder at once.

    Args:
        model: file of the model.
        scans: name of each result, without a suffix, to the files of its scan.
        output: folder for the label volumes.
        overwrite: replace results of other models.
        device, threads: options of the command.

    Raises:
        ValueError: the model cannot be used, or the folder has results that it did not make.
        OSError: a result cannot be written.
    """
    use_threads(threads)
    where = torch_device(device)
    network, card = load_model(model)
    identity = model_identity(model)
    missing = results_to_make(identity, scans, output, overwrite=overwrite)
    _remove_abandoned(output)
    done = Predicted(kept=len(scans) - len(missing))
    if not missing:
        return done
    ready = prepared(network, where)
    locator = locator_beside(model, card, device=where)
    # Scans take minutes each on a CPU: the time left is a mean over all of them.
    with timed_bar("segmenting", mean_over_s=float("inf")) as bar:
        task = bar.add_task("", total=len(missing))
        for name, files in missing.items():
            path = first_present(files)
            bar.update(task, description=escape(path.name))
            try:
                record = ResultRecord.of(identity, files)
                show = partial(_show_windows, bar, task, path.name)
                labels, affine, notes = _labels(ready, files, card, where, locator, show)
            # One bad file must not cost the results of a folder, whatever is wrong with it.
            except Exception as error:
                logger.info("%s", path.name, exc_info=True)
                done.failed.append(_sentence(path, error))
            else:
                write_recorded(output / f"{name}.nii.gz", labels, affine, record)
                done.written += 1
                done.notes += [f"{path.name}: {note}" for note in notes]
                if (stem := volume_id(path)) != name and stem in scans:
                    other = first_present(scans[stem]).name
                    done.notes.append(f"{path.name} is written as {name}.nii.gz: {stem}.nii.gz is for {other}")
            bar.update(task, advance=1)
    return done


def print_predicted(done: Predicted, model: ModelCard, output: Path) -> None:
    """Print what became of the scans; raise typer.Exit(1) if some have no result."""
    print_sentences(done.notes)
    for message in done.failed:
        console.print(f"[red]skipped:[/red] {escape(message)}", soft_wrap=True, highlight=False)
    total = done.written + done.kept + len(done.failed)
    kept = f", {done.kept} were there already" if done.kept else ""
    said = f"{done.written} of {total} volumes written to {output}{kept}; labels {_legend(model)}"
    console.print(escape(said), soft_wrap=True)
    if done.failed:
        raise typer.Exit(1)


def _show_windows(bar: ProgressBar, task: TaskID, name: str, done: int, of: int) -> None:
    bar.update(task, description=f"{escape(name)}, window {done} of {of}")


def _labels(
    network: Network,
    files: Sequence[Path],
    card: ModelCard,
    device: str,
    locator: Locator | None,
    on_windows: WindowsDone,
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return the labels of a scan ``(X, Y, Z)``, their affine, and sentences on what it lacks."""
    labels = segment_labels(network, files, card.preprocessing, device=device, locator=locator, on_windows=on_windows)
    notes = [note for note in (filled_voxels(labels), missing_sequences(labels)) if note]
    return labels[0].numpy().astype(np.uint8), labels.affine.numpy(), notes


def _sentence(path: Path, error: Exception) -> str:
    """Say why a scan has no result."""
    if isinstance(error, InvalidVolume):
        return str(error)
    words = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, MemoryError) or "memory" in words[0].lower():
        return f"{path.name} needs more memory than there is ({words[0]})"
    if isinstance(error, OSError):
        return f"{path.name} cannot be read: {error.strerror or words[0]}"
    return f"{path.name} cannot be segmented ({type(error).__name__}: {words[0]})"


def _remove_abandoned(output: Path) -> None:
    """Delete the unfinished files of killed processes; those of running ones are younger."""
    for path in output.glob(".writing-*"):
        try:
            if time.time() - path.stat().st_mtime > _ABANDONED_S:
                path.unlink()
        except OSError:  # another process was faster
            continue


def _legend(card: ModelCard) -> str:
    return ", ".join(f"{value} {name}" for value, name in enumerate(card.labels, start=1))
