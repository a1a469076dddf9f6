"""Augmentation: random patches and random changes to them."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import (
    EnsureTyped,
    Identityd,
    OneOf,
    Rand3DElasticd,
    RandAdjustContrastd,
    RandAffined,
    RandCropByPosNegLabeld,
    RandFlipd,
    RandGaussianNoised,
    Randomizable,
    RandomizableTransform,
    RandScaleIntensityd,
    RandShiftIntensityd,
    RandSimulateLowResolutiond,
    SelectItemsd,
    SpatialPadd,
    Transform,
)

from deformux.data.label_values import UNLABELLED
from deformux.data.preprocessing import Preprocessing
from deformux.data.transforms import run_transforms
from deformux.fitting.recipe import Recipe

__all__ = ["EachSequenced", "RandDropSequencesd", "SamplingMapsd", "training_augmentation"]

_KEYS = ("image", "label")


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
    transforms += [*_geometry(recipe, device), *_intensity_by_sequence(prep, recipe)]
    # Geometry is no longer needed; a plain tensor spares every operation of the network MONAI's bookkeeping.
    transforms.append(EnsureTyped(_KEYS, track_meta=False))
    return transforms


def _geometry(recipe: Recipe, device: torch.device) -> list[Transform]:
    """Return random flips, affine and elastic deformations."""
    transforms: list[Transform] = []
    for axis in recipe.flip_axes:
        transforms.append(RandFlipd(_KEYS, prob=0.5, spatial_axis=axis))
    if recipe.affine_probability > 0 and (recipe.rotation_degrees > 0 or recipe.scaling > 0):
        transforms.append(
            RandAffined(
                _KEYS,
                prob=recipe.affine_probability,
                rotate_range=[np.deg2rad(recipe.rotation_degrees)] * 3,
                scale_range=[recipe.scaling] * 3,
                mode=("bilinear", "nearest"),
                padding_mode=("border", "zeros"),
                device=device,
            )
        )
    if recipe.elastic_probability > 0:
        deform = Rand3DElasticd(
            _KEYS,
            prob=1.0,
            sigma_range=recipe.elastic_sigma,
            magnitude_range=recipe.elastic_magnitude,
            mode=("bilinear", "nearest"),
            padding_mode=("border", "zeros"),
            device=device,
        )
        # With a probability of its own it would resample every patch, most of them without a change.
        often = recipe.elastic_probability
        transforms.append(OneOf([deform, Identityd(_KEYS)], weights=[often, 1 - often]))
    return transforms


def _intensity_by_sequence(prep: Preprocessing, recipe: Recipe) -> list[Transform]:
    """Return random changes of the image alone; several sequences change independently, and may be dropped."""
    if prep.channels == 1:
        return _intensity(recipe)
    changes: list[Transform] = [EachSequenced([_intensity(recipe) for _ in range(prep.channels)])]
    if recipe.sequence_dropout > 0:
        changes.append(RandDropSequencesd(recipe.sequence_dropout))
    return changes


class EachSequenced(Randomizable, Transform):
    """Changes the channels of ``image`` (C, x, y, z), each by transforms of its own; those of missing sequences stay 0.

    Args:
        steps: dictionary transforms for each channel ``(1, x, y, z)``.
    """

    def __init__(self, steps: Sequence[Sequence[Transform]]) -> None:
        super().__init__()
        self.steps = steps

    def set_random_state(self, seed: int | None = None, state: np.random.RandomState | None = None) -> EachSequenced:
        """Seed all transforms."""
        super().set_random_state(seed, state)
        for step in itertools.chain.from_iterable(self.steps):
            if isinstance(step, Randomizable):
                step.set_random_state(seed=int(self.R.randint(2**32 - 1, dtype="uint32")))
        return self

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        image = data["image"]
        channels = [self._changed(image[n : n + 1], steps) for n, steps in enumerate(self.steps)]
        return {**data, "image": torch.cat(channels)}

    def _changed(self, channel: torch.Tensor, steps: Sequence[Transform]) -> torch.Tensor:
        return run_transforms(steps, {"image": channel})["image"] if bool(channel.any()) else channel


class RandDropSequencesd(RandomizableTransform):
    """Sets channels of ``image`` (C, x, y, z) to 0, each with a probability, as if their sequences were missing.

    If chance takes all that a case has, a random one of them stays.
    """

    def __init__(self, probability: float) -> None:
        super().__init__(prob=1.0)
        self.probability = probability

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        image = data["image"]
        dropped = self.R.random(len(image)) < self.probability
        stays = int(self.R.randint(len(image)))
        present = [n for n in range(len(image)) if bool(image[n].any())]
        if present and dropped[present].all():
            dropped[present[stays % len(present)]] = False
        kept = torch.as_tensor(~dropped, device=image.device)
        return {**data, "image": image * kept[:, None, None, None]}


def _intensity(recipe: Recipe) -> list[Transform]:
    """Return random changes of an image alone."""
    transforms: list[Transform] = []
    p = recipe.intensity_probability
    if recipe.low_resolution < 1:
        transforms.append(RandSimulateLowResolutiond("image", prob=p / 2, zoom_range=(recipe.low_resolution, 1.0)))
    if recipe.noise_std > 0:
        transforms.append(RandGaussianNoised("image", prob=p, std=recipe.noise_std))
    if recipe.gamma != (1.0, 1.0):
        transforms.append(RandAdjustContrastd("image", prob=p, gamma=recipe.gamma))
    if recipe.intensity_scale > 0:
        transforms.append(RandScaleIntensityd("image", prob=p, factors=recipe.intensity_scale))
    if recipe.intensity_shift > 0:
        transforms.append(RandShiftIntensityd("image", prob=p, offsets=recipe.intensity_shift))
    return transforms
