"""Implementation of ``deformux plan``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.orientations import aff2axcodes
from rich.markup import escape
from rich.table import Table

from deformux.cli.common import clear_errors, console, print_sentences, timed_bar
from deformux.cli.devices import torch_device, use_threads
from deformux.data.atomic_files import write_text
from deformux.data.cases import Case
from deformux.data.choices import Choices
from deformux.data.fingerprint import Fingerprint, declared_modality, read_fingerprint
from deformux.data.planning import Plan
from deformux.fitting.speed import plan_on

__all__ = ["plan_folder", "plan_table"]

# More sentences about files than this are counted.
_MAX_SENTENCES = 10


def plan_folder(
    data: Path,
    images: Sequence[Path],
    cases: Sequence[Case],
    *,
    labels: Sequence[str],
    given: Choices,
    minutes: float | None,
    json_file: Path | None,
    device: str,
    threads: int,
) -> None:
    """Read all scans, measure the device, and print the plan with its reasons.

    Args:
        data: the folder, which is not written to.
        images, cases: its scans, and those that are labelled.
        labels: names of labels 1..N; none for the numbers that occur.
        given: what the user decided.
        minutes: of a training, or None.
        json_file: where to write the plan; the facts of the scans are kept beside it, for the next time.
        device, threads: options of the command.
    """
    with clear_errors():
        use_threads(threads)
        place = torch_device(device)
        found = _read(data, images, cases, cache=json_file and json_file.with_suffix(".scans.json"))
        largest = max((label for facts in found.labels.values() for label in facts.voxels), default=0)
        names = labels or [str(label) for label in range(1, largest + 1)]
        plan = plan_on(place, found, labels=names, given=given, minutes=minutes)
        _print_scans(found, names)
        console.print(plan_table(plan))
        if json_file is not None:
            write_text(json_file, json.dumps(plan.to_dict(), indent=2) + "\n")
            console.print(f"{json_file}: the plan", soft_wrap=True, highlight=False)


def _read(data: Path, images: Sequence[Path], cases: Sequence[Case], *, cache: Path | None) -> Fingerprint:
    with timed_bar("reading") as bar:
        task = bar.add_task("scans", total=len(images))

        def show(done: int, total: int) -> None:
            bar.update(task, total=total, completed=done)

        return read_fingerprint(images, cases, cache=cache, modality=declared_modality(data), on_progress=show)


def _print_scans(found: Fingerprint, labels: Sequence[str]) -> None:
    """Print a summary of the scans, and what is wrong with some files."""
    print_sentences(found.unusable[:_MAX_SENTENCES])
    if len(found.unusable) > _MAX_SENTENCES:
        print_sentences([f"{len(found.unusable) - _MAX_SENTENCES} more files cannot be used"])
    table = Table("scans", "smallest", "median", "largest")
    spacings = np.array([voxel_sizes(affine) for affine in found.affines])
    for name, values in (("voxels", np.array(found.shapes, dtype=float)), ("spacing mm", spacings)):
        table.add_row(name, *(_sizes(function(values, axis=0)) for function in (np.min, np.median, np.max)))
    console.print(table)
    codes = ["".join(aff2axcodes(affine)) for affine in found.affines]
    counts = ", ".join(f"{code} {codes.count(code)}" for code in sorted(set(codes), key=codes.count, reverse=True))
    in_labels = found.labelled_percentiles((0.5, 50.0, 99.5))
    sentences = [
        f"{len(found.scans)} scans, {len(found.labels)} of them labelled: {', '.join(labels) or 'no labels'}",
        f"nearest directions of the files' axes: {counts}",
    ]
    if in_labels is not None:
        low, middle, high = in_labels
        sentences.append(f"intensities in labels: median {middle:.4g}, percentiles 0.5 and 99.5: {low:.4g}, {high:.4g}")
    print_sentences(sentences)


def plan_table(plan: Plan) -> Table:
    """Return a plan as a table of setting, value and reason."""
    table = Table("setting", "value", "reason")
    for row in plan.rows():
        table.add_row(*map(escape, row))
    return table


def _sizes(values: Sequence[float]) -> str:
    return " × ".join(f"{value:.4g}" for value in values)
