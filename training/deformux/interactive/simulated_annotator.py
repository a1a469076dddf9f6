"""Simulated annotators for demos and benchmarks: they know the truth and correct as a radiologist would."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from deformux.data.label_values import UNLABELLED

__all__ = ["Click", "ClickAnnotator", "Correction", "WholeLabelAnnotator", "dense_labels"]

_Labels = npt.NDArray[np.uint8]


def dense_labels(label: npt.NDArray[np.generic], values: Sequence[int]) -> _Labels:
    """Return ``label`` ``(D, H, W)`` with ``values[0]`` as 1, ``values[1]`` as 2, … and everything else as 0.

    MONAI Label's clients number labels by position, so sparse values would silently lose classes.

    Raises:
        ValueError: there are more than 255 values, repeated ones, or the background value 0.
    """
    if len(values) > 255 or len(set(values)) != len(values) or 0 in values:
        raise ValueError(f"label values: got {list(values)}, expected at most 255 different values other than 0")
    dense = np.zeros(label.shape, np.uint8)
    for position, value in enumerate(values, start=1):
        dense[label == value] = position
    return dense


@dataclass(frozen=True)
class Correction:
    """A submitted label, and how much of the prediction the annotator changed.

    Args:
        label: ``(D, H, W)``.
        edited: label name to the share of changed voxels, among those that prediction or truth give to that label:
            0 untouched, 1 redrawn. Labels absent from both are left out.
        edited_voxels: number of changed voxels.
    """

    label: _Labels
    edited: Mapping[str, float]
    edited_voxels: int


class WholeLabelAnnotator:
    """An annotator who corrects every voxel of a volume before submitting it."""

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = tuple(labels)

    def correct(self, truth: _Labels, prediction: _Labels | None = None) -> Correction:
        """Return the true label and its difference from the ``prediction``, both ``(D, H, W)`` with values 0..N.

        Without a prediction the annotator draws everything. Raises ValueError if shapes differ or values exceed N.
        """
        shown = np.zeros_like(truth) if prediction is None else prediction
        if shown.shape != truth.shape:
            raise ValueError(f"prediction: got shape {shown.shape}, expected the truth's shape {truth.shape}")
        highest = max(int(truth.max(initial=0)), int(shown.max(initial=0)))
        if highest > len(self.labels):
            raise ValueError(
                f"label values: got {highest}, expected 0 to {len(self.labels)} for {', '.join(self.labels)}"
            )
        edited = {}
        for value, name in enumerate(self.labels, start=1):
            is_true, is_shown = truth == value, shown == value
            either = int(np.count_nonzero(is_true | is_shown))
            if either:
                edited[name] = float(np.count_nonzero(is_true != is_shown)) / either
        return Correction(truth.copy(), edited, int(np.count_nonzero(truth != shown)))


@dataclass(frozen=True)
class Click:
    """One click of an annotator: the voxel, and the label it should have, 0 for background."""

    label: int
    voxel: tuple[int, int, int]


class ClickAnnotator:
    """An annotator who clicks into the largest errors, each time with the label that should be there.

    An error is a face-connected component of voxels of one true label that are shown as another. The click goes where
    the error is thickest, by the Euclidean distance transform, and of several such voxels to the one nearest the middle
    (like the robot of Xu et al., CVPR 2016, and of benchmarks since).

    Args:
        n_labels: labels 1..N.
        jitter: 0 clicks at the centre, 1 anywhere in the component; between, on a random voxel that is at least
            ``1 - jitter`` times as deep inside as the centre. Never outside.
        spacing: voxel size along each axis, in any unit.
        seed: of the jitter; or a generator.
    """

    def __init__(
        self,
        n_labels: int,
        *,
        jitter: float = 0.0,
        spacing: Sequence[float] = (1.0, 1.0, 1.0),
        seed: int | np.random.Generator = 0,
    ) -> None:
        if not 0 <= jitter <= 1:
            raise ValueError(f"jitter must be between 0 and 1; got {jitter}")
        self.n_labels, self.jitter, self.spacing = n_labels, jitter, np.asarray(spacing, dtype=float)
        self.rng = np.random.default_rng(seed)

    def clicks(
        self,
        truth: _Labels,
        shown: _Labels,
        *,
        most: int = 1,
        label: int | None = None,
        annotated: npt.NDArray[np.bool_] | None = None,
    ) -> list[Click]:
        """Return clicks into the ``most`` largest errors, or into all if there are fewer, largest first.

        Args:
            truth: ``(D, H, W)``, values 0..N; 255 is unlabelled, and never an error.
            shown: the segmentation on the screen, ``(D, H, W)``.
            most: number of clicks.
            label: only errors that should be this label, 0 for background.
            annotated: whether the truth tells each class apart, ``(N + 1,)``. Another class shown on the truth's
                background is not an error.

        Raises:
            ValueError: shapes differ, or a label beyond N.
        """
        if shown.shape != truth.shape:
            raise ValueError(f"shown: got shape {shown.shape}, expected the truth's shape {truth.shape}")
        if label is not None and not 0 <= label <= self.n_labels:
            raise ValueError(f"label: got {label}, expected 0 (background) to {self.n_labels}")
        wrong = (truth != shown) & (truth != UNLABELLED)
        if annotated is not None:
            unknown = np.flatnonzero(~np.asarray(annotated, dtype=bool)[1:]) + 1
            wrong &= (truth != 0) | ~np.isin(shown, unknown)
        if label is not None:
            wrong &= truth == label
        errors = _largest(np.where(wrong, truth.astype(np.int32) + 1, 0), most)
        return [Click(error.label, self._inside(error, truth.shape)) for error in errors]

    def _inside(self, error: _Component, shape: tuple[int, ...]) -> tuple[int, int, int]:
        # The volume's border ends a component too, except along an axis of one voxel, where everything is border.
        around = [(1, 1) if length > 1 else (0, 0) for length in shape]
        padded = np.pad(error.inside, around)
        depth = ndimage.distance_transform_edt(padded, sampling=self.spacing)
        if self.jitter:
            candidates = np.argwhere(padded & (depth >= (1 - self.jitter) * depth.max()))
            chosen = candidates[self.rng.integers(len(candidates))]
        else:
            candidates = np.argwhere(depth == depth.max())
            away = (candidates - np.argwhere(padded).mean(0)) * self.spacing
            chosen = candidates[np.argmin((away**2).sum(1))]
        x, y, z = (int(v) - p[0] + o for v, p, o in zip(chosen, around, error.origin, strict=True))
        return x, y, z


@dataclass(frozen=True)
class _Component:
    label: int
    voxels: int
    origin: tuple[int, ...]
    inside: npt.NDArray[np.bool_]


def _largest(wanted: npt.NDArray[np.int32], most: int) -> list[_Component]:
    """Return the largest face-connected components of wrong voxels: ``wanted`` is their label plus 1, 0 elsewhere."""
    found: list[_Component] = []
    if most < 1:
        return found
    boxes = ndimage.find_objects(wanted)
    wrong = np.bincount(wanted.ravel(), minlength=len(boxes) + 1)[1:]
    for label in np.argsort(-wrong, kind="stable"):
        # A label with fewer wrong voxels in total has no larger component, so that few of 40 labels are examined.
        if wrong[label] == 0 or (len(found) == most and wrong[label] < found[-1].voxels):
            break
        box = boxes[label]
        numbered, count = ndimage.label(wanted[box] == label + 1)
        sizes = np.bincount(numbered.ravel(), minlength=count + 1)[1:]
        parts = ndimage.find_objects(numbered)
        # An untrained network makes thousands of errors.
        for index in np.argsort(-sizes, kind="stable")[:most]:
            part = parts[index]
            origin = tuple(outer.start + inner.start for outer, inner in zip(box, part, strict=True))
            found.append(_Component(int(label), int(sizes[index]), origin, numbered[part] == index + 1))
        # Of equally large components, the one of the lowest label always comes first.
        found = sorted(found, key=lambda component: (-component.voxels, component.label))[:most]
    return found
