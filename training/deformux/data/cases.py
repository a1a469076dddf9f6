"""Cases in plain folders: each image with its label."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from deformux.data.sequences import SequenceNaming, first_present, named_in, nnunet_naming
from deformux.data.volume_reader import VOLUME_SUFFIXES, volume_suffix

__all__ = [
    "Case",
    "InvalidFolder",
    "Scan",
    "find_cases",
    "find_images",
    "folder_naming",
    "label_names",
    "result_names",
    "sequence_naming",
    "split_label_names",
    "volume_id",
]

# Results are uint8, and 255 in a label marks an unlabelled voxel.
_MAX_LABELS = 254
_FOLDERS = (("images", "labels"), ("imagesTr", "labelsTr"))


class InvalidFolder(ValueError):
    """A folder does not hold what it should; the message says what is missing."""


@dataclass(frozen=True)
class Case:
    """One labelled volume: its id, image file and label file.

    Voxels of value 255 in the label are unlabelled. ``annotated`` names the labels that were annotated, if not all
    were: the others may be present anywhere in the volume. ``images`` are the files of several sequences, of which
    ``image``, the first that exists, gives the grid; a file that does not exist is a missing sequence.
    """

    id: str
    image: Path
    label: Path
    annotated: tuple[str, ...] | None = None
    images: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        if not self.images:
            object.__setattr__(self, "images", (self.image,))

    def annotates(self, labels: Sequence[str], n_labels: int) -> npt.NDArray[np.bool_]:
        """Return which of labels 1..n_labels, named by ``labels``, were annotated in this volume, ``(n_labels,)``.

        Raises:
            ValueError: ``annotated`` names something that is not a label.
        """
        if self.annotated is None:
            return np.ones(n_labels, dtype=bool)
        foreign = sorted(set(self.annotated) - set(labels))
        if foreign:
            raise ValueError(
                f"case {self.id} was annotated for {foreign[0]!r}, which is not a label; "
                f"the labels are {', '.join(labels)}"
            )
        return np.array([name in self.annotated for name in labels])


@dataclass(frozen=True)
class Scan:
    """One volume without a label: its id, and its file or those of its sequences."""

    id: str
    images: tuple[Path, ...]


def volume_id(path: Path) -> str:
    """Return a file name without its volume suffix: ``liver_1`` for ``liver_1.nii.gz``."""
    suffix = volume_suffix(path.name)
    return path.name.removesuffix(suffix) if suffix else path.stem


def result_names(paths: Sequence[Path]) -> list[str]:
    """Return a unique name, without a suffix, for the result of each volume.

    The first volume of a stem gets the stem. Any other gets its whole file name, with a number if that is taken too.
    """
    names: dict[str, None] = {}
    for path in paths:
        whole = path.name
        candidates = itertools.chain((volume_id(path), whole), (f"{whole}-{number}" for number in itertools.count(2)))
        names[next(name for name in candidates if name not in names)] = None
    return list(names)


def find_images(folder: Path) -> list[Path]:
    """Return the volumes directly in a folder, sorted by name.

    Raises:
        InvalidFolder: the folder does not exist or holds no volume.
    """
    if not folder.is_dir():
        raise InvalidFolder(f"{folder} is not a folder")
    # Archives made on a Mac carry hidden companions with the same suffix.
    found = sorted(p for p in folder.iterdir() if volume_suffix(p.name) and not p.name.startswith("."))
    if not found:
        raise InvalidFolder(f"{folder} holds no volume ({', '.join(VOLUME_SUFFIXES)})")
    return found


def find_cases(folder: Path, *, subset: str | None = None) -> list[Case]:
    """Return the cases of a folder with ``images/`` and ``labels/`` (or ``imagesTr/`` and ``labelsTr/``).

    Files are paired by name. If several share a stem, such as ``a.nii.gz`` and ``a.nrrd``, the suffix must match too.
    A label ``a`` without an image ``a`` belongs to the sequences ``a_0000``, ``a_0001``, …, as in nnU-Net, or to those
    that ``image_channels`` in ``dataset.json`` names.

    Args:
        folder: the data set.
        subset: a key of ``split.json`` in that folder, such as ``train`` or ``val``; None takes all cases.

    Raises:
        InvalidFolder: no such layout, no image with a label, no such subset, or several files of one stem that
            pair in more than one way.
    """
    images, labels = _image_and_label_folders(folder)
    labels_of = _by_stem(find_images(labels))
    images_of = _by_stem(find_images(images))
    naming = _naming(folder, images_of, labels_of)
    names = dict.fromkeys(stem if stem in labels_of else naming.split(stem)[0] for stem in images_of)
    chosen = labels_of.keys() if subset is None else labels_of.keys() & set(_subset(folder, subset))
    cases = [_case(name, images_of, labels_of[name], naming) for name in names if name in chosen]
    if not cases:
        raise InvalidFolder(
            f"no image in {images} has a label of the same file name in {labels}"
            + (f" in the subset {subset!r}" if subset else "")
        )
    return cases


def sequence_naming(folder: Path) -> SequenceNaming:
    """Return how the sequences of a data set's cases are named, as ``find_cases`` groups them.

    Raises:
        InvalidFolder: as ``find_cases``, or ``dataset.json`` has unusable ``image_channels``.
    """
    images, labels = _image_and_label_folders(folder)
    labelled = _by_stem(find_images(labels))
    return _naming(folder, _by_stem(find_images(images)), labelled)


def folder_naming(scans: Sequence[Path], sequences: Sequence[str]) -> SequenceNaming:
    """Return how the files of several sequences are named among unlabelled scans.

    That is what ``image_channels`` says in a ``dataset.json`` beside the scans or in the folder above, else nnU-Net's
    ``_0000``, ``_0001``, …, else the names of the sequences as endings; of the last two, what fits more files.

    Raises:
        InvalidFolder: ``dataset.json`` is damaged, or its ``image_channels`` are of other sequences.
    """
    for folder in dict.fromkeys(parent for scan in scans[:1] for parent in list(scan.absolute().parents)[:2]):
        path = folder / "dataset.json"
        setting = named_in(_object(path))[0] if path.is_file() else None
        if setting is not None:
            naming = SequenceNaming.parse(setting)
            if len(naming.suffixes) != len(sequences):
                raise InvalidFolder(
                    f"{path} names {len(naming.suffixes)} sequences, the model takes {', '.join(sequences)}"
                )
            return naming
    names = tuple(sequences)
    numbered = SequenceNaming(tuple(f"_{number:04d}" for number in range(len(names))), names)
    named = SequenceNaming(tuple(f"_{name.rpartition(':')[2]}" for name in names), names)
    stems = [volume_id(scan) for scan in scans]
    return max((numbered, named), key=lambda naming: sum(naming.split(stem)[1] is not None for stem in stems))


def _image_and_label_folders(folder: Path) -> tuple[Path, Path]:
    for images, labels in _FOLDERS:
        if (folder / images).is_dir() and (folder / labels).is_dir():
            return folder / images, folder / labels
    raise InvalidFolder(f"{folder} must hold the folders images/ and labels/ (or imagesTr/ and labelsTr/)")


def _naming(folder: Path, images: Iterable[str], labels: Iterable[str]) -> SequenceNaming:
    path = folder / "dataset.json"
    try:
        values = _object(path)
    except InvalidFolder:
        # There may be none; ``label_names`` reports a damaged one.
        values = {}
    try:
        setting, names = named_in(values)
        return nnunet_naming(images, labels, names) if setting is None else SequenceNaming.parse(setting)
    except ValueError as error:
        raise InvalidFolder(f"{path}: {error}") from error


def _case(name: str, images: Mapping[str, list[Path]], labels: Sequence[Path], naming: SequenceNaming) -> Case:
    if name in images:
        return Case(name, *_pair(images[name], labels))
    found = [images[name + suffix] for suffix in naming.suffixes if name + suffix in images]
    if twice := next((files for files in found if len(files) > 1), None):
        raise _ambiguous(*twice[:2])
    image, label = _pair(found[0], labels)
    files = naming.files_of(image)
    return Case(name, first_present(files), label, images=files)


def _by_stem(paths: Sequence[Path]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in paths:
        found.setdefault(volume_id(path), []).append(path)
    return found


def _pair(images: Sequence[Path], labels: Sequence[Path]) -> tuple[Path, Path]:
    """Choose the image and the label of a case among the files of its stem."""
    pairs = list(itertools.product(images, labels))
    # Capitals in a suffix matter only where two files differ in nothing else.
    for same in (str, str.lower):
        equal = [pair for pair in pairs if len({same(volume_suffix(path.name) or "") for path in pair}) == 1]
        if len(pairs) > 1 and equal:
            pairs = equal
    if len(pairs) > 1:
        # Blame the images, or the labels if there is one image only.
        first, second, *_ = max((list(dict.fromkeys(files)) for files in zip(*pairs, strict=True)), key=len)
        raise _ambiguous(first, second)
    return pairs[0]


def _ambiguous(first: Path, second: Path) -> InvalidFolder:
    return InvalidFolder(
        f"{first} and {second} differ only in their suffix, and either may be meant: keep one of them there"
    )


def _subset(folder: Path, subset: str) -> list[str]:
    path = folder / "split.json"
    if not path.is_file():
        raise InvalidFolder(f"{folder} has no split.json to take the subset {subset!r} from")
    split = _object(path)
    if subset not in split:
        raise InvalidFolder(f"{path} has no subset {subset!r}; it has {', '.join(sorted(split))}")
    return [str(name) for name in split[subset]]


def _object(path: Path) -> dict[str, Any]:
    """Read a JSON object; raise InvalidFolder if the file holds anything else."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InvalidFolder(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise InvalidFolder(f"{path} must hold a JSON object")
    return values


def label_names(folder: Path) -> list[str] | None:
    """Return the names of labels 1..N from a decathlon ``dataset.json``, or None if there is none.

    Raises:
        InvalidFolder: the file does not give each of the labels 1..N a name of its own.
    """
    path = folder / "dataset.json"
    if not path.is_file():
        return None
    names = _object(path).get("labels", {})
    try:
        values = sorted(int(value) for value in names)
    except (TypeError, ValueError) as error:
        raise InvalidFolder(f'{path}: "labels" must be like {{"0": "background", "1": "liver"}}') from error
    if values[1:] != list(range(1, len(values))):
        raise InvalidFolder(f"{path}: label values must be 0..N without gaps, got {values}")
    found = [str(names[str(value)]) for value in values[1:]]
    unnamed = [value for value, name in enumerate(found, start=1) if not name.strip()]
    if unnamed:
        raise InvalidFolder(f"{path}: label {unnamed[0]} has no name")
    try:
        _check_label_names(found)
    except ValueError as error:
        raise InvalidFolder(f"{path}: {error}") from error
    return found


def split_label_names(text: str) -> tuple[str, ...]:
    """Return the names of labels 1..N in a comma-separated list.

    Raises:
        ValueError: a name is empty or repeated, or there are too many.
    """
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise ValueError(f"labels must be a comma-separated list of names without gaps; got {text!r}")
    _check_label_names(names)
    return names


def _check_label_names(names: Sequence[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"each label must have its own name; got {twice[0]!r} twice")
    if len(names) > _MAX_LABELS:
        raise ValueError(f"at most {_MAX_LABELS} labels are possible; got {len(names)}")
