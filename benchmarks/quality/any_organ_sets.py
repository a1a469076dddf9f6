"""Labelled sets of many organs: which cases train and which are scored, with labels 1..N on the scans' own grids."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import nibabel as nib
import numpy as np
from benchmarks.quality.any_organ_turns import turned
from benchmarks.quality.transfer import halves

from deformux.data.atomic_files import replacing, write_text
from deformux.data.cases import Case, Scan, volume_id
from deformux.data.partial_labels import AnnotatedSlices
from deformux.data.volume_reader import read_volume
from deformux.interactive.simulated_annotator import dense_labels

__all__ = ["DRAWN_SETS", "ORGAN_SETS", "TURNED_SETS", "Organ", "OrganSet", "prepared_organ"]


@dataclass(frozen=True)
class OrganSet:
    """A folder of scans, and how many labelled ones are trained on.

    Args:
        folder: in the folder of all data; the CT is one scan in two halves.
        labelled: training cases, chosen by the seed from ``train`` of its ``split.json``.
        names: of labels 1..N, where the folder has no ``labels.json``.
        turn: turn the scans' affines, and nothing else: ``one`` rotation for all, or one for ``each``.
        drawn: what of the training labels is known: all; ``strokes`` of people; or every third of the ``slices``.
    """

    folder: str
    labelled: int
    names: tuple[str, ...] = ()
    turn: str = ""
    drawn: str = ""


@dataclass(frozen=True)
class Organ:
    """A set that is ready to train on.

    Args:
        labels: names of labels 1..N.
        train: labelled cases to learn from.
        val: cases to score, none of them in ``train``.
        scans: images that a server would hold: all of ``train`` in ``split.json``, labelled or not; of several
            sequences the first.
        sequences: names of several sequences of each case; none for one.
        unlabelled: the scans of ``train`` in ``split.json`` that are not trained on with their labels.
    """

    labels: tuple[str, ...]
    train: tuple[Case, ...]
    val: tuple[Case, ...]
    scans: tuple[Path, ...]
    sequences: tuple[str, ...] = ()
    unlabelled: tuple[Scan, ...] = ()


_HIPPOCAMPUS = ("anterior", "posterior")
_SMALL_CT = "ct"

# The order in which they are run: the most informative first.
ORGAN_SETS: Mapping[str, OrganSet] = MappingProxyType(
    {
        "heart-7": OrganSet("heart_mr_acdc", 7),
        "spine-5": OrganSet("spine_mr", 5),
        "abdomen-4": OrganSet("abdomen_mr", 4),
        "heart-3": OrganSet("heart_mr_acdc", 3),
        "fetal-brain-5": OrganSet("fetal_brain_mr", 5),
        "hippocampus-5": OrganSet("hippocampus", 5, _HIPPOCAMPUS),
        "mouse-brain-4": OrganSet("mouse_brain_mr", 4),
        "brain-tumour-3": OrganSet("brain_tumour_mr", 3),
        "ct": OrganSet(_SMALL_CT, 1),
        "hippocampus-10": OrganSet("hippocampus", 10, _HIPPOCAMPUS),
    }
)
TURNED_SETS: Mapping[str, OrganSet] = MappingProxyType(
    {
        "heart-7-turned-alike": OrganSet("heart_mr_acdc", 7, turn="one"),
        "heart-7-turned-each": OrganSet("heart_mr_acdc", 7, turn="each"),
    }
)
# The same patients, labelled whole or in part.
DRAWN_SETS: Mapping[str, OrganSet] = MappingProxyType(
    {
        "heart-20": OrganSet("heart_mr_acdc", 20),
        "heart-20-strokes": OrganSet("heart_mr_acdc", 20, drawn="strokes"),
        "heart-20-slices": OrganSet("heart_mr_acdc", 20, drawn="slices"),
    }
)
_EVERY_SLICE = 3


def prepared_organ(organ: OrganSet, data: Path, work: Path, *, seed: int) -> Organ:
    """Choose the training cases of a set by a seed; write volumes that the set lacks into a work folder.

    Args:
        organ: the set.
        data: folder of all sets.
        work: for dense labels, turned volumes and the halves of the CT, which are kept.
        seed: of the choice of cases, and of the rotations.
    """
    if organ.folder == _SMALL_CT:
        task = halves(data / organ.folder, work / "ct")
        return Organ(task.labels, task.train, task.test, tuple(case.image for case in task.train))
    folder = data / organ.folder
    split: Mapping[str, Sequence[str]] = json.loads((folder / "split.json").read_text())
    names, values = _labels(folder, organ.names, sorted({*split["train"], *split["val"]}), work)
    chosen = sorted(random.Random(seed).sample(sorted(split["train"]), organ.labelled))
    cases = {case: _case(folder, case, values, work) for case in (*split["train"], *split["val"])}
    if organ.turn:
        place = work / "turned" / f"{organ.folder}-{organ.turn}-{seed}"
        cases = turned(cases, place, alike=organ.turn == "one", seed=seed)
    for case in chosen if organ.drawn else ():
        label = folder / "scribbles" / f"{case}.nii.gz"
        if organ.drawn == "slices":
            label = _of_slices(cases[case].label, work / "slices" / organ.folder / label.name)
        cases[case] = dataclasses.replace(cases[case], label=label)
    of_first = cases[chosen[0]]
    return Organ(
        labels=names,
        train=tuple(cases[case] for case in chosen),
        val=tuple(cases[case] for case in split["val"]),
        scans=tuple(cases[case].image for case in split["train"]),
        sequences=tuple(_sequence(path) for path in of_first.images) if len(of_first.images) > 1 else (),
        unlabelled=tuple(Scan(case, cases[case].images) for case in split["train"] if case not in chosen),
    )


def _labels(
    folder: Path, given: tuple[str, ...], cases: Sequence[str], work: Path
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return names and values of all labels of a set in ascending order of the values."""
    known = work / "values" / f"{folder.name}.json"
    if not known.is_file():
        found = sorted(set().union(*(_values(_label_file(folder, case)) for case in cases)) - {0})
        write_text(known, json.dumps(found))
    values = tuple(json.loads(known.read_text()))
    if given:
        return given, values
    file = folder / "labels.json"
    names: Mapping[str, str] = json.loads(file.read_text()) if file.is_file() else {}
    # Plain, as MONAI Label's option for names needs them.
    return tuple("_".join(names.get(str(value), f"label {value}").split()) for value in values), values


def _case(folder: Path, name: str, values: Sequence[int], work: Path) -> Case:
    label = _label_file(folder, name)
    if list(values) != list(range(1, len(values) + 1)):
        label = _dense(label, values, work / "dense" / folder.name / label.name)
    images = _images(folder, name)
    return Case(name, images[0], label, images=tuple(images))


def _of_slices(label: Path, path: Path) -> Path:
    """Write a label that is 255 between every third slice, counted from the first that shows the organ, once."""
    if not path.is_file():
        file: Any = nib.load(label)
        labels = np.asarray(file.dataobj).astype(np.uint8)
        first = int(np.flatnonzero(labels.any((0, 1)))[0])
        slices = AnnotatedSlices(2, tuple(range(first % _EVERY_SLICE, labels.shape[2], _EVERY_SLICE)))
        with replacing(path) as temporary:
            nib.save(nib.Nifti1Image(slices.apply(labels), file.affine), temporary)
    return path


def _images(folder: Path, name: str) -> list[Path]:
    """Return the image of a case, or its sequences."""
    single = folder / "images" / f"{name}.nii.gz"
    return [single] if single.is_file() else sorted((folder / "images").glob(f"{name}_[0-9][0-9][0-9][0-9].nii.gz"))


def _sequence(path: Path) -> str:
    """Return the name of a sequence, such as ``0001``."""
    return volume_id(path).rpartition("_")[2]


def _label_file(folder: Path, name: str) -> Path:
    return folder / "labels" / f"{name}.nii.gz"


def _values(path: Path) -> set[int]:
    return {int(value) for value in np.unique(np.rint(read_volume(path).values))}


def _dense(label: Path, values: Sequence[int], path: Path) -> Path:
    """Write a label with values 1..N, once."""
    if not path.is_file():
        file: Any = nib.load(label)
        with replacing(path) as temporary:
            nib.save(nib.Nifti1Image(dense_labels(np.asarray(file.dataobj), values), file.affine), temporary)
    return path
