"""Labelled volumes for the demo: a synthetic cohort, or a folder of real volumes with a train and val split."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt

from deformux.data.cases import Case, InvalidFolder, find_cases, label_names, sequence_naming
from deformux.data.choices import AUTO
from deformux.data.fingerprint import declared_modality, read_fingerprint
from deformux.data.header import geometry_difference
from deformux.data.planned_intensities import planned_modality
from deformux.data.synthetic import LABELS, write_cohort
from deformux.data.volume_reader import InvalidVolume, open_volume, read_volume
from deformux.interactive.simulated_annotator import dense_labels

__all__ = ["Cohort", "CohortVolume", "open_cohort", "synthetic_cohort"]

_Labels = npt.NDArray[np.uint8]

# Most voxels of a training patch of synthetic volumes for two CPU cores; it changes in steps of 16.
_PATCH_VOXELS = 165_000
# Scans whose intensities tell the modality.
_READ = 3


@dataclass(frozen=True)
class CohortVolume:
    """A labelled volume; the server gets the image, not the label."""

    case: Case
    values: tuple[int, ...]

    @property
    def id(self) -> str:
        return self.case.id

    @property
    def image(self) -> Path:
        return self.case.image

    @property
    def sequences(self) -> list[Path]:
        """Return the files of all sequences that there are."""
        return [path for path in self.case.images if path.is_file()]

    def shape(self) -> tuple[int, ...]:
        with open_volume(self.image) as opened:
            return opened.header.shape

    def affine(self) -> npt.NDArray[np.float64]:
        with open_volume(self.image) as opened:
            return opened.header.affine

    def truth(self) -> _Labels:
        """Return the true label with values 1..N, on the image's grid and in its axis order."""
        return dense_labels(np.rint(read_volume(self.case.label).values), self.values)

    def canonical_truth(self) -> _Labels:
        """Return the true label in RAS axes."""
        label = nib.Nifti1Image(self.truth(), self.affine())
        return np.asarray(nib.as_closest_canonical(label).dataobj)


@dataclass(frozen=True)
class Cohort:
    """Volumes to annotate, volumes that are only scored, and server options for them."""

    volumes: list[CohortVolume]
    labels: tuple[str, ...]
    modality: str
    description: str
    spacing: str = AUTO
    patch_size: str = AUTO
    held_out: list[CohortVolume] = field(default_factory=list)
    image_channels: str = ""

    def volume(self, name: str) -> CohortVolume:
        """Return the volume with an id."""
        return next(v for v in self.volumes if v.id == name)


def synthetic_cohort(folder: Path, *, volumes: int, seed: int, voxel_scale: float = 1.0) -> Cohort:
    """Draw a cohort of synthetic abdominal CT volumes into `folder`."""
    write_cohort(folder, volumes=volumes, seed=seed, voxel_scale=voxel_scale)
    cases = find_cases(folder)
    values = tuple(range(1, len(LABELS) + 1))
    patch = "80,64,32" if voxel_scale == 1 else _patch_size([80 / voxel_scale, 64 / voxel_scale, 36 / voxel_scale])
    return Cohort(
        [CohortVolume(case, values) for case in cases], LABELS, "ct", f"{volumes} synthetic abdominal CT volumes",
        spacing="native", patch_size=patch,
    )  # fmt: skip


def open_cohort(
    folder: Path,
    *,
    volumes: int,
    held_out: int = 0,
    labels: Sequence[str] = (),
    modality: str = "",
    seed: int = 0,
) -> Cohort:
    """Choose at most `volumes` labelled volumes of a folder with images/ and labels/.

    With a split.json, only its `train` cases are annotated and trained on, and at most `held_out` of its `val` cases
    are scored. Raise InvalidFolder, with one sentence, for an unusable folder or wrong names.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InvalidFolder(f"{folder} is not a folder")
    if volumes < 1 or held_out < 0:
        raise InvalidFolder(f"volumes: got {volumes} and {held_out} held out, expected at least 1 and 0")
    split = _split(folder)
    chosen = _sample(find_cases(folder, subset="train" if "train" in split else None), volumes, seed)
    scored = _sample(find_cases(folder, subset="val"), held_out, seed) if split >= {"train", "val"} else []
    values = sorted(set().union(*(_values(case) for case in (*chosen, *scored))) - {0})
    if not values:
        raise InvalidFolder(f"the labels in {folder} are all background")
    names = _names(folder, values, labels)
    if not modality:
        read = [case.image for case in chosen[:_READ]]
        modality, _ = planned_modality(read_fingerprint(read, modality=declared_modality(folder)))
    description = f"{len(chosen)} volumes of {folder.resolve().name}" + (" (split: train)" if "train" in split else "")
    return Cohort(
        volumes=[CohortVolume(case, tuple(values)) for case in chosen],
        labels=names,
        modality=modality,
        description=description,
        held_out=[CohortVolume(case, tuple(values)) for case in scored],
        image_channels=sequence_naming(folder).text,
    )


def _split(folder: Path) -> set[str]:
    path = folder / "split.json"
    try:
        return set(json.loads(path.read_text())) if path.is_file() else set()
    except ValueError as error:
        raise InvalidFolder(f"{path} is not valid JSON: {error}") from error


def _sample(cases: list[Case], count: int, seed: int) -> list[Case]:
    chosen = random.Random(seed).sample(cases, min(count, len(cases)))
    return sorted(chosen, key=lambda case: case.id)


def _values(case: Case) -> set[int]:
    """Return the label values of a case; its label must be readable and lie on the image's grid."""
    try:
        with open_volume(case.image) as opened:
            image = opened.header
        label = read_volume(case.label)
    except InvalidVolume as error:
        raise InvalidFolder(f"case {case.id} cannot be used: {error}") from error
    if label.values.ndim != 3:
        raise InvalidFolder(f"case {case.id} cannot be used: its label has several layers")
    if difference := geometry_difference(image.shape, image.affine, label.header.shape, label.affine):
        raise InvalidFolder(f"case {case.id} cannot be used: image and label must lie on one grid, but {difference}")
    values = np.unique(label.values)
    return {int(v) for v in np.rint(values)}


def _names(folder: Path, values: list[int], given: Sequence[str]) -> tuple[str, ...]:
    if given:
        if len(given) != len(values):
            raise InvalidFolder(f"--labels: got {len(given)} names, expected {len(values)} for the values {values}")
        return tuple(given)
    known = label_names(folder)
    if known is not None and values[-1] <= len(known):
        return tuple(_plain(known[value - 1]) for value in values)
    return tuple(f"label_{value}" for value in values)


def _plain(name: str) -> str:
    return "_".join(name.lower().replace(",", " ").split())


def _patch_size(shape: Sequence[float]) -> str:
    """Return a patch for a volume of `shape` within a CPU's budget, in multiples of 16."""
    patch = [max(16, 16 * int(np.ceil(n / 16 - 0.1))) for n in shape]
    while np.prod(patch) > _PATCH_VOXELS:
        patch[int(np.argmax(patch))] -= 16
    return ",".join(map(str, patch))
