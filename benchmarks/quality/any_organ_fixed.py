"""The baseline: the fixed defaults that ``make demo`` had before there was a plan, frozen here.

Its rules: modality from the lowest values; the scans' own spacing, or one coarsened to a CPU's budget of voxels; a
patch of multiples of 16 within a budget; axes right, anterior, superior; the smallest network with its published
strides; the recipe ``finetune`` in batches of one patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from deformux.data.preprocessing import Preprocessing
from deformux.data.volume_reader import open_volume, read_volume
from deformux.fitting.recipe import Recipe

__all__ = ["Settings", "fixed_settings"]

# Most voxels of a training patch and of a volume.
_PATCH_VOXELS = 165_000
_VOLUME_VOXELS = 600_000
# Numbers of a recipe that follow from the minutes.
_BY_THE_TIME = ("steps", "epochs", "ema_decay")
# Only CT has air this far below zero.
_AIR = -500


@dataclass(frozen=True)
class Settings:
    """What is chosen before a training of DeformUX-Net.

    Args:
        prep: how a scan becomes network input.
        preset: size of the network.
        strides: one triple per stage, or None for the published ones.
        recipe: numbers of the training; its steps follow from the time.
        reasons: of the choices, by their names.
        seconds: that the choice took.
    """

    prep: Preprocessing
    preset: str
    strides: tuple[tuple[int, int, int], ...] | None
    recipe: Recipe
    reasons: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def facts(self) -> dict[str, Any]:
        """Return plain values that say what was chosen; of the recipe, what differs from the fixed one."""
        strides = {} if self.strides is None else {"strides": [list(stage) for stage in self.strides]}
        fixed = _FIXED.to_dict()
        recipe = {
            name: value
            for name, value in self.recipe.to_dict().items()
            if name not in _BY_THE_TIME and value != fixed.get(name)
        }
        return {"preprocessing": self.prep.to_dict(), "preset": self.preset, **strides, "recipe": recipe}


# The recipe ``finetune``, written out so that it stays as it was. One volume per step: on few volumes more steps teach
# more than larger batches.
_FIXED = Recipe(
    batch_size=1,
    patches_per_volume=1,
    learning_rate=2e-3,
    weight_decay=0.01,
    schedule="one_cycle",
    gradient_clip=1.0,
    patience=8,
    oversampling=2,
    foreground_ratio=0.75,
    rotation_degrees=15.0,
    scaling=0.15,
    elastic_probability=0.2,
    intensity_scale=0.1,
    noise_std=0.1,
    gamma=(0.7, 1.5),
    low_resolution=0.5,
    intensity_probability=0.3,
    clicks=10,
)


def fixed_settings(scans: Sequence[Path]) -> Settings:
    """Return the fixed defaults for a folder of scans."""
    lowest = np.median([np.nanmin(read_volume(scan).values) for scan in scans[:3]])
    shapes, spacings = zip(*(_grid(scan) for scan in scans), strict=True)
    spacing, shape = _spacing(np.median(spacings, axis=0), np.median(shapes, axis=0))
    prep = Preprocessing("ct" if lowest < _AIR else "mr", spacing_mm=spacing, patch_size=_patch_size(shape))
    return Settings(prep, "tiny", None, _FIXED)


def _ras_axes(scan: Path) -> tuple[int, int, int]:
    """Return the file's axes nearest to right, anterior and superior."""
    with open_volume(scan) as opened:
        nearest = nib.io_orientation(opened.header.affine)[:, 0].astype(int)
    first, second, third = (int(axis) for axis in np.argsort(nearest))
    return first, second, third


def _grid(scan: Path) -> tuple[list[int], list[float]]:
    """Return shape and spacing along the axes right, anterior, superior."""
    with open_volume(scan) as opened:
        shape, sizes = opened.header.shape, nib.affines.voxel_sizes(opened.header.affine)
    axes = _ras_axes(scan)
    return [shape[axis] for axis in axes], [float(sizes[axis]) for axis in axes]


def _spacing(spacing: np.ndarray, shape: np.ndarray) -> tuple[tuple[float, float, float] | None, Sequence[float]]:
    """Return None for the scans' own spacing, or a coarser one that fits the budget, and the volume's shape."""
    if np.prod(shape) <= _VOLUME_VOXELS:
        return None, list(shape)
    coarse = spacing.copy()
    while np.prod(shape * spacing / coarse) > _VOLUME_VOXELS:
        coarse[coarse <= coarse.min() * 1.05] *= 1.05  # the finest axes first, towards isotropic voxels
    coarse = coarse.round(2)
    x, y, z = (float(size) for size in coarse)
    return (x, y, z), list(shape * spacing / coarse)


def _patch_size(shape: Sequence[float]) -> tuple[int, int, int]:
    """Return a patch for a volume within the budget, in multiples of 16."""
    patch = [max(16, 16 * int(np.ceil(n / 16 - 0.1))) for n in shape]
    while np.prod(patch) > _PATCH_VOXELS:
        patch[int(np.argmax(patch))] -= 16
    x, y, z = patch
    return x, y, z
