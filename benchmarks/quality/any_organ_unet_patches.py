"""Patches for a U-Net with nnU-Net's sampling and augmentation (Isensee et al. 2021; v2's default trainer)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from benchmarks.quality.any_organ_nnunet_plan import UNetPlan
from monai.transforms import (
    CenterSpatialCropd,
    Compose,
    RandAdjustContrastd,
    RandAffined,
    RandFlipd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandScaleIntensityd,
    RandScaleIntensityFixedMeand,
    RandSimulateLowResolutiond,
    RandZoomd,
)
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import IterableDataset, get_worker_info

__all__ = ["UNetPatches", "unet_augmentation"]

_KEYS = ("image", "label")
_FOREGROUND = 0.33
_MOST_VOXELS = 10_000  # kept of each label to centre patches on
# Cut larger before it is turned and scaled, so that its corners show the scan.
_MARGIN = 0.2


class UNetPatches(IterableDataset):
    """Endless batches: a random third of the patches, rounded up to one, is centred on a random label's voxel.

    Args:
        volumes: images ``(C, X, Y, Z)`` and labels ``(1, X, Y, Z)``.
        plan: patch and batch.
        seed: of all random choices.
    """

    def __init__(self, volumes: Sequence[tuple[Tensor, Tensor]], plan: UNetPlan, *, seed: int) -> None:
        self.plan, self.seed = plan, seed
        self.patch = np.array(plan.patch_size)
        self.margin = _margin(plan)
        rng = np.random.default_rng(seed)
        self.volumes = [self._padded(image, label) for image, label in volumes]
        self.voxels = [_voxels_of_labels(label, rng) for _, label in volumes]
        self.sizes = [np.array(image.shape[1:]) for image, _ in volumes]
        self.augment = unet_augmentation(plan)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = get_worker_info()
        number = 0 if worker is None else worker.id
        rng = np.random.default_rng([self.seed, number])
        self.augment.set_random_state(seed=int(rng.integers(2**31)))
        while True:
            drawn = [self.augment(self._draw(rng, sample)) for sample in range(self.plan.batch_size)]
            yield {key: torch.stack([torch.as_tensor(patch[key]) for patch in drawn]) for key in _KEYS}

    def _padded(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        sides = self._sides(np.array(image.shape[1:]))
        widths = [int(width) for axis in (2, 1, 0) for width in (sides[axis], sides[axis])]
        return F.pad(image[None], widths, mode="replicate")[0], F.pad(label, widths)

    def _sides(self, size: np.ndarray) -> np.ndarray:
        """Return the voxels added on both sides of a volume: what a patch lacks, and the margin."""
        return np.ceil(np.maximum(0, self.patch - size) / 2).astype(int) + self.margin

    def _draw(self, rng: np.random.Generator, sample: int) -> dict[str, Tensor]:
        case = int(rng.integers(len(self.volumes)))
        size, voxels = self.sizes[case], self.voxels[case]
        lack = np.maximum(0, self.patch - size)
        lowest, highest = -np.ceil(lack / 2).astype(int), np.maximum(0, size - self.patch) - lack // 2
        highest = np.maximum(lowest, highest)
        if voxels and sample >= round(self.plan.batch_size * (1 - _FOREGROUND)):
            chosen = voxels[int(rng.integers(len(voxels)))]
            start = chosen[int(rng.integers(len(chosen)))] - self.patch // 2
        else:
            start = rng.integers(lowest, highest + 1)
        start = np.clip(start, lowest, highest) + self._sides(size) - self.margin
        part = (
            slice(None),
            *(slice(int(a), int(a + n)) for a, n in zip(start, self.patch + 2 * self.margin, strict=True)),
        )
        return {key: volume[part].clone() for key, volume in zip(_KEYS, self.volumes[case], strict=True)}


def unet_augmentation(plan: UNetPlan) -> Compose:
    """Return nnU-Net's default augmentation, as near as MONAI's transforms come, from cut to final patches.

    Probabilities per channel and per image are those of one channel together. Flat patches are turned and scaled in
    their plane, by any angle; others by up to 30 degrees about all axes.
    """
    axes = [axis for axis in range(3) if not (plan.flat and axis == plan.coarse_axis)]
    if plan.flat:
        rotation = [np.pi if axis == plan.coarse_axis else 0.0 for axis in range(3)]
        smallest, largest = ([size if axis in axes else 1.0 for axis in range(3)] for size in (0.7, 1.4))
    else:
        rotation, smallest, largest = [np.deg2rad(30)] * 3, [0.7], [1.4]
    modes = ("bilinear", "nearest")
    cut = [int(n) for n in np.array(plan.patch_size) + 2 * _margin(plan)]
    return Compose(
        [
            RandAffined(
                _KEYS, prob=0.2, rotate_range=rotation, mode=modes, padding_mode=("border", "zeros"),
                spatial_size=cut, cache_grid=True,
            ),
            RandZoomd(
                _KEYS, prob=0.2, min_zoom=smallest if plan.flat else smallest[0],
                max_zoom=largest if plan.flat else largest[0], mode=("trilinear", "nearest"),
                padding_mode=("edge", "constant"),
            ),
            CenterSpatialCropd(_KEYS, plan.patch_size),
            RandGaussianNoised("image", prob=0.1, std=0.1, sample_std=True),
            RandGaussianSmoothd("image", prob=0.1, sigma_x=(0.5, 1.0), sigma_y=(0.5, 1.0), sigma_z=(0.5, 1.0)),
            RandScaleIntensityd("image", prob=0.15, factors=0.25),
            RandScaleIntensityFixedMeand("image", prob=0.15, factors=0.25, preserve_range=True),
            RandSimulateLowResolutiond("image", prob=0.125, zoom_range=(0.5, 1.0)),
            RandAdjustContrastd("image", prob=0.1, gamma=(0.7, 1.5), invert_image=True, retain_stats=True),
            RandAdjustContrastd("image", prob=0.3, gamma=(0.7, 1.5), retain_stats=True),
            *(RandFlipd(_KEYS, prob=0.5, spatial_axis=axis) for axis in range(3)),
        ]
    )  # fmt: skip


def _margin(plan: UNetPlan) -> np.ndarray:
    """Return the voxels that are cut on each side beyond the patch."""
    grows = np.array([not (plan.flat and axis == plan.coarse_axis) for axis in range(3)])
    return np.where(grows, np.ceil(_MARGIN * np.array(plan.patch_size) / 2), 0).astype(int)


def _voxels_of_labels(label: Tensor, rng: np.random.Generator) -> list[np.ndarray]:
    values = np.asarray(label[0])
    found = [np.argwhere(values == value) for value in np.unique(values) if value > 0]
    return [voxels[rng.permutation(len(voxels))[:_MOST_VOXELS]] for voxels in found]
