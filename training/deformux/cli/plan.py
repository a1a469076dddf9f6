"""Implementation of ``deformux plan``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

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
from deformux.data.planning import Plan, make_plan
from deformux.fitting.speed import gpu_gigabytes, measure_speed

__all__ = ["plan_folder"]

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
        plan = make_plan(
            found,
            labels=names,
            given=given,
            device=place,
            minutes=minutes,
            gpu_gigabytes=gpu_gigabytes(place),
            measure=partial(measure_speed, place, n_labels=max(1, len(names))),
        )
        _print_scans(found, names)
        console.print(_table(plan))
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


def _table(plan: Plan) -> Table:
    table = Table("setting", "value", "reason")
    for name, reason in plan.reasons.items():
        table.add_row(name, escape(_value(plan, name)), escape(reason))
    return table


def _value(plan: Plan, name: str) -> str:
    """Return what the table shows for a choice."""
    if name == "budget":
        return f"{plan.facts['steps']} steps of {plan.facts['seconds_per_step']:.2f} s"
    if name == "spacing_mm" and plan.preprocessing.spacing_mm is None:
        return "native"
    if name == "strides":
        return " ".join("".join(map(str, stride)) for stride in plan.strides)
    for values in (plan.preprocessing.to_dict(), plan.recipe_changes, {"preset": plan.preset, "frame": "ras"}):
        if name in values:
            return _text(values[name])
    return ""


def _text(value: Any) -> str:
    return ",".join(f"{part:g}" for part in value) or "none" if isinstance(value, (tuple, list)) else str(value)


def _sizes(values: Sequence[float]) -> str:
    return " × ".join(f"{value:.4g}" for value in values)
