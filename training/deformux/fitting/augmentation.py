"""Augmentation: random patches and random changes to them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from monai.data import MetaTensor
from monai.transforms import (
    EnsureTyped,
    Identityd,
    OneOf,
    Rand3DElastic,
    Rand3DElasticd,
    RandAdjustContrastd,
    RandAffined,
    RandCropByPosNegLabeld,
    RandFlipd,
    RandGaussianNoised,
    RandScaleIntensityd,
    RandShiftIntensityd,
    RandSimulateLowResolution,
    RandSimulateLowResolutiond,
    SelectItemsd,
    SpatialPadd,
    Transform,
)

from deformux.data.label_values import UNLABELLED
from deformux.data.preprocessing import Preprocessing
from deformux.fitting.recipe import Recipe
from deformux.fitting.sequence_augmentation import EachSequenced, RandDropSequencesd

__all__ = ["SamplingMapsd", "training_augmentation"]

_KEYS = ("image", "label")
# An axis more than this times as coarse as the finest is not made coarser still.
_COARSE_ASPECT = 2.0


class SamplingMapsd(Transform):
    """Adds maps of where patches may be centred, from ``label`` (1, x, y, z) with 255 for unlabelled.

    ``foreground`` and ``known`` are uint8, which cost two bytes per voxel besides the label's one.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        label = torch.as_tensor(data["label"]).to(torch.uint8)
        known = label != UNLABELLED
        maps = {"label": label, "foreground": (label > 0) & known, "known": known}
        return {**data, **{key: MetaTensor(value.to(torch.uint8)) for key, value in maps.items()}}


def training_augmentation(
    prep: Preprocessing, recipe: Recipe, *, device: str | torch.device = "cpu"
) -> list[Transform]:
    """Return random transforms of dictionaries from volumes ``(C, x, y, z)`` to ``patches_per_volume`` patches.

    Transforms before the first random one run once for each volume in memory. ``annotated`` is passed on. Patches are
    cut from volumes on the CPU, augmented on ``device``, and stay there.
    """
    device = torch.device(device)
    transforms: list[Transform] = [
        # Only these collate: paths and headers of readers stay behind.
        SelectItemsd((*_KEYS, "annotated")),
        SpatialPadd("image", prep.patch_size, mode="edge"),
        SpatialPadd("label", prep.patch_size, mode="constant"),
        SamplingMapsd(),
        RandCropByPosNegLabeld(
            _KEYS,
            label_key="foreground",
            spatial_size=prep.patch_size,
            pos=recipe.foreground_ratio,
            neg=1 - recipe.foreground_ratio,
            num_samples=recipe.patches_per_volume,
            # Background, but never unlabelled voxels.
            image_key="known",
            image_threshold=0,
        ),
        SelectItemsd((*_KEYS, "annotated")),
    ]
    if device.type != "cpu":
        # One core resamples a patch about as fast as it trains on one; a GPU would wait most of the time.
        transforms.append(EnsureTyped(_KEYS, device=device))
    geometry = _geometry(prep, recipe, device)
    if recipe.unlabelled_border:
        geometry = [_ShiftLabeld(1), *geometry, _ShiftLabeld(-1)]
    transforms += [*geometry, *_intensity_by_sequence(prep, recipe)]
    # Geometry is no longer needed; a plain tensor spares every operation of the network MONAI's bookkeeping.
    transforms.append(EnsureTyped(_KEYS, track_meta=False))
    return transforms


class _ShiftLabeld(Transform):
    """Adds a number to every value of ``label``, modulo 256.

    Shifted by 1, unlabelled (255) is 0, which is what MONAI brings in from outside a patch.
    """

    def __init__(self, by: int) -> None:
        self.by = by

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        label = data["label"]
        return {**data, "label": (label.to(torch.int16) + self.by).remainder(256).to(label.dtype)}


class _AspectElastic(Rand3DElastic):
    """Random displacements that are smaller along some axes, by factors."""

    def __init__(self, factors: npt.NDArray[np.float64], **options: Any) -> None:
        super().__init__(**options)
        self.factors = factors.astype(np.float32)

    def randomize(self, grid_size: Sequence[int]) -> None:
        super().randomize(grid_size)
        if self.rand_offset is not None:
            self.rand_offset *= self.factors[:, None, None, None]


class _AspectLowResolution(RandSimulateLowResolution):
    """Simulates scans that are coarser along some axes only."""

    def __init__(self, kept: npt.NDArray[np.bool_], **options: Any) -> None:
        super().__init__(**options)
        self.kept = kept

    def randomize(self, data: Any | None = None) -> None:
        super().randomize(data)
        self.zoom_factor = np.where(self.kept, 1.0, self.zoom_factor)


def _geometry(prep: Preprocessing, recipe: Recipe, device: torch.device) -> list[Transform]:
    """Return random flips, affine and elastic deformations."""
    transforms: list[Transform] = []
    for axis in recipe.flip_axes:
        transforms.append(RandFlipd(_KEYS, prob=0.5, spatial_axis=axis))
    single = np.array(prep.patch_size) == 1
    # About an axis that is not the only slice's own, a rotation leaves the slice.
    rotations = [0.0 if np.delete(single, axis).any() else r for axis, r in enumerate(recipe.rotations)]
    if recipe.affine_probability > 0 and (max(rotations) > 0 or recipe.scaling > 0):
        transforms.append(
            RandAffined(
                _KEYS,
                prob=recipe.affine_probability,
                rotate_range=[np.deg2rad(degrees) for degrees in rotations],
                scale_range=[recipe.scaling] * 3,
                mode=("bilinear", "nearest"),
                padding_mode=("border", "zeros"),
                device=device,
            )
        )
    if recipe.elastic_probability > 0:
        sizes = {
            "prob": 1.0,
            "sigma_range": recipe.elastic_sigma,
            "magnitude_range": recipe.elastic_magnitude,
            "device": device,
        }
        deform = Rand3DElasticd(_KEYS, mode=("bilinear", "nearest"), padding_mode=("border", "zeros"), **sizes)
        factors = np.where(single, 0.0, 1 / np.array(recipe.voxel_aspect))
        if (factors != 1).any():
            deform.rand_3d_elastic = _AspectElastic(factors, **sizes)
        # With a probability of its own it would resample every patch, most of them without a change.
        often = recipe.elastic_probability
        transforms.append(OneOf([deform, Identityd(_KEYS)], weights=[often, 1 - often]))
    return transforms


def _intensity_by_sequence(prep: Preprocessing, recipe: Recipe) -> list[Transform]:
    """Return random changes of the image alone; several sequences change independently, and may be dropped."""
    if prep.channels == 1:
        return _intensity(prep, recipe)
    changes: list[Transform] = [EachSequenced([_intensity(prep, recipe) for _ in range(prep.channels)])]
    if recipe.sequence_dropout > 0:
        changes.append(RandDropSequencesd(recipe.sequence_dropout))
    return changes


def _intensity(prep: Preprocessing, recipe: Recipe) -> list[Transform]:
    """Return random changes of an image alone."""
    transforms: list[Transform] = []
    p = recipe.intensity_probability
    if recipe.low_resolution < 1:
        zoom = (recipe.low_resolution, 1.0)
        coarser = RandSimulateLowResolutiond("image", prob=p / 2, zoom_range=zoom)
        kept = (np.array(recipe.voxel_aspect) > _COARSE_ASPECT) | (np.array(prep.patch_size) == 1)
        if kept.any():
            coarser.sim_lowres_tfm = _AspectLowResolution(kept, prob=1.0, zoom_range=zoom)
        transforms.append(coarser)
    if recipe.noise_std > 0:
        transforms.append(RandGaussianNoised("image", prob=p, std=recipe.noise_std))
    if recipe.gamma != (1.0, 1.0):
        transforms.append(RandAdjustContrastd("image", prob=p, gamma=recipe.gamma))
    if recipe.intensity_scale > 0:
        transforms.append(RandScaleIntensityd("image", prob=p, factors=recipe.intensity_scale))
    if recipe.intensity_shift > 0:
        transforms.append(RandShiftIntensityd("image", prob=p, offsets=recipe.intensity_shift))
    return transforms
