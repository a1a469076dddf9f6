"""Dictionary transforms from a scan on disk to network input, and from the network's output to the scan's grid."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import (
    ClipIntensityPercentilesd,
    MapTransform,
    NormalizeIntensityd,
    Orientationd,
    ScaleIntensityRanged,
    Spacingd,
    Transform,
)
from nibabel.affines import voxel_sizes
from torch import Tensor

from deformux.data.frame import frame_codes, frame_grid
from deformux.data.grid import ScanGrid
from deformux.data.header import InvalidVolume, max_voxels, shown_shape
from deformux.data.label_values import UNLABELLED
from deformux.data.loading import LoadLabeld, LoadVolumed
from deformux.data.partial_labels import spread_labels
from deformux.data.preprocessing import Preprocessing

__all__ = [
    "RestoreGridd",
    "inference_transforms",
    "label_grid_transforms",
    "labelled_transforms",
    "labels_of_scan",
    "restore_transforms",
    "run_transforms",
]

# Axes whose spacing is nearer than this part of itself to the wanted one are not resampled.
_SAME_SPACING = 1e-3
# Added to half the ratio of two spacings, in voxels: where a resampled grid lies between voxels, more are needed.
_BETWEEN_VOXELS = 0.25


class RestoreGridd(MapTransform):
    """Turn logits ``(C, x, y, z)`` of a preprocessed image into labels ``(1, X, Y, Z)``, uint8, on its scan's grid."""

    def __init__(self, keys: str | tuple[str, ...] = "pred", *, image_key: str = "image") -> None:
        super().__init__(keys)
        self.image_key = image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        image = d[self.image_key]
        grid = ScanGrid.of(image)
        for key in self.key_iterator(d):
            labels = grid.labels(torch.as_tensor(d[key]).float())
            d[key] = labels_of_scan(labels, image)
        return d


def labels_of_scan(labels: Tensor, image: MetaTensor) -> MetaTensor:
    """Return labels ``(X, Y, Z)`` on the grid of a scan's file as ``(1, X, Y, Z)`` with its geometry and facts.

    Args:
        labels: on the file's grid.
        image: the scan, preprocessed.
    """
    return MetaTensor(labels[None], affine=torch.as_tensor(ScanGrid.of(image).affine), meta=_meta_of(image))


def inference_transforms(prep: Preprocessing, *, device: str | torch.device = "cpu") -> list[Transform]:
    """Return dictionary transforms that turn ``image`` (``ScanFiles``) into network input ``(C, x, y, z)``, float32.

    On a GPU with enough memory everything but reading is computed there, and the result stays there.
    """
    steps = [*_to_network_grid(prep, ("image",)), *_intensity(prep)]
    if torch.device(device).type == "cuda":
        steps = [_OnDevice(steps, device)]
    return [_load(prep), _BoundedGrid(prep), *steps]


def labelled_transforms(prep: Preprocessing, *, n_labels: int) -> list[Transform]:
    """Return ``inference_transforms`` that also bring the path under ``label`` to the same grid, for training."""
    return [
        _load(prep),
        _BoundedGrid(prep),
        LoadLabeld("label", n_labels=n_labels, unlabelled=True),
        *_to_network_grid(prep, ("image", "label")),
        *_intensity(prep),
    ]


def label_grid_transforms(prep: Preprocessing, key: str = "label") -> list[Transform]:
    """Return dictionary transforms that bring label values ``(1, X, Y, Z)`` on a scan's grid to the network's."""
    return _to_network_grid(prep, (key,))


def run_transforms(transforms: Sequence[Transform], data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
    """Run transforms one after another; their errors pass unchanged, unlike in MONAI's Compose."""
    d = dict(data)
    for transform in transforms:
        d = transform(d)
    return d


def restore_transforms() -> list[Transform]:
    """Return dictionary transforms that turn logits under ``pred`` into labels on the original grid of ``image``."""
    return [RestoreGridd("pred")]


class _OnDevice(Transform):
    """Runs other transforms of an image on a GPU, or in place if the GPU has too little memory."""

    def __init__(self, steps: Sequence[Transform], device: str | torch.device) -> None:
        self.steps, self.device = steps, device

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        try:
            return run_transforms(self.steps, {**data, "image": data["image"].to(self.device)})
        except torch.OutOfMemoryError:
            return run_transforms(self.steps, data)


class _BoundedGrid(Transform):
    """Refuses a scan that would be too large once resampled, such as one whose voxels are metres wide."""

    def __init__(self, prep: Preprocessing) -> None:
        self.prep = prep

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        image = data["image"]
        if self.prep.spacing_mm is not None:
            shape, spacing = frame_grid(self.prep.frame, image.shape[1:], image.affine)
            extent = np.array(shape) * spacing
            size = np.ceil(extent / self.prep.spacing_mm)
            if size.prod() > max_voxels():
                name, mm = Path(image.meta["filename_or_obj"]).name, shown_shape([f"{length:.4g}" for length in extent])
                raise InvalidVolume(
                    f"{name} measures {mm} mm, too large for the spacing of {shown_shape(self.prep.spacing_mm)} mm: "
                    f"these are {size.prod():.2g} voxels, at most {max_voxels():,} are read (option max-voxels)"
                )
        return dict(data)


def _load(prep: Preprocessing) -> Transform:
    return LoadVolumed("image", sequences=prep.sequences, may_miss=prep.missing_sequences)


class _IntoFrame(Transform):
    """Turns the axes of volumes on one grid into a frame, without resampling."""

    def __init__(self, frame: str, keys: tuple[str, ...]) -> None:
        self.frame, self.keys = frame, keys

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        first = data[self.keys[0]]
        codes = frame_codes(self.frame, first.shape[1:], first.affine)
        axes = (("L", "R"), ("P", "A"), ("I", "S"))
        d: dict[Hashable, Any] = dict(Orientationd(self.keys, axcodes=codes, labels=axes)(dict(data)))
        if self.frame == "acquisition":
            # A mean sums in the order of memory: the last bits would depend on the order in which a file is stored.
            d.update({key: d[key].contiguous() for key in self.keys})
        return d


class _ToSpacing(Transform):
    """Resamples volumes on one grid along its axes, from the centre of the first voxel; beyond the last it repeats.

    The image is interpolated linearly, other keys take the nearest voxel. Unlike MONAI's ``Spacingd`` it depends on the
    spacing alone: there, rounding in the header of an oblique scan moves the grid by parts of a voxel.
    """

    def __init__(self, spacing_mm: tuple[float, float, float], keys: tuple[str, ...]) -> None:
        self.spacing_mm, self.keys = spacing_mm, keys

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        affine = np.array(d[self.keys[0]].affine, dtype=float)
        # Five digits: a turned header has the same ones, although the spacing is a sum of rounded squares.
        own = np.array([float(f"{size:.5g}") for size in voxel_sizes(affine)])
        steps = np.array(self.spacing_mm) / own
        steps[np.abs(steps - 1) < _SAME_SPACING] = 1.0
        affine[:3, :3] *= steps
        for key in self.keys:
            values = d[key].as_tensor()
            for axis in np.flatnonzero(steps != 1):
                values = _resampled(values, int(axis) + 1, float(steps[axis]), linear=key == "image")
            d[key] = MetaTensor(values, affine=torch.as_tensor(affine), meta=_meta_of(d[key]))
        return d


class _SpreadLabels(Transform):
    """Lets 255 in ``label`` have the value of a labelled voxel within about half a voxel of a coarser spacing."""

    def __init__(self, spacing_mm: tuple[float, float, float]) -> None:
        self.spacing_mm = spacing_mm

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        label = data["label"]
        if not bool((label == UNLABELLED).any()):
            return dict(data)
        reach = np.array(self.spacing_mm) / voxel_sizes(np.array(label.affine, dtype=float)) / 2
        values = spread_labels(label.as_tensor()[0].numpy(), [int(voxels + _BETWEEN_VOXELS) for voxels in reach])
        return {**data, "label": MetaTensor(torch.from_numpy(values)[None]).copy_meta_from(label)}


def _resampled(values: Tensor, axis: int, step: float, *, linear: bool) -> Tensor:
    """Return values at positions 0, step, 2 * step, … of an axis."""
    length = values.shape[axis]
    at = torch.arange(round((length - 1) / step) + 1, dtype=torch.float64, device=values.device) * step
    at = at.clamp(max=length - 1)
    if not linear:
        return values.index_select(axis, at.round().long())
    below = at.floor().long()
    weight = (at - below).to(values.dtype).reshape([-1 if a == axis else 1 for a in range(values.ndim)])
    low = values.index_select(axis, below)
    return low.lerp_(values.index_select(axis, (below + 1).clamp(max=length - 1)), weight)


def _meta_of(volume: MetaTensor) -> dict[str, Any]:
    return {name: value for name, value in volume.meta.items() if name != "affine"}


def _to_network_grid(prep: Preprocessing, keys: tuple[str, ...]) -> list[Transform]:
    transforms: list[Transform] = [_IntoFrame(prep.frame, keys)]
    if prep.spacing_mm is not None and "label" in keys:
        transforms.append(_SpreadLabels(prep.spacing_mm))
    if prep.spacing_mm is not None and prep.frame == "acquisition":
        transforms.append(_ToSpacing(prep.spacing_mm, keys))
    elif prep.spacing_mm is not None:
        mode = tuple("bilinear" if key == "image" else "nearest" for key in keys)
        transforms.append(Spacingd(keys, pixdim=prep.spacing_mm, mode=mode, padding_mode="border", dtype=np.float32))
    return transforms


class _EachSequence(Transform):
    """Normalises the channels of ``image`` (C, x, y, z), each in its sequence's way; those of missing ones become 0."""

    def __init__(self, steps: Sequence[Sequence[Transform]]) -> None:
        self.steps = steps

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        image = data["image"]
        values = torch.zeros_like(image.as_tensor())
        for number, steps in enumerate(self.steps):
            if number not in image.meta["missing"]:
                values[number] = run_transforms(steps, {"image": image[number : number + 1]})["image"].as_tensor()[0]
        # Copies affine and everything else that describes the image.
        return {**data, "image": MetaTensor(values).copy_meta_from(image)}


def _intensity(prep: Preprocessing) -> list[Transform]:
    each = [_normalisation(prep, modality) for modality in prep.modalities]
    return each[0] if len(each) == 1 else [_EachSequence(each)]


def _normalisation(prep: Preprocessing, modality: str) -> list[Transform]:
    if modality == "ct":
        low, high = prep.window_hu
        return [ScaleIntensityRanged("image", a_min=low, a_max=high, b_min=0.0, b_max=1.0, clip=True)]
    lower, upper = prep.percentiles
    return [ClipIntensityPercentilesd("image", lower=lower, upper=upper), NormalizeIntensityd("image")]
