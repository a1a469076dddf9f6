"""Random changes of patches: what each axis may do, and what comes in from outside."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose

from deformux.data.preprocessing import Preprocessing
from deformux.fitting.augmentation import training_augmentation
from deformux.fitting.recipe import RECIPES, Recipe

SIZE = (32, 32, 16)
STILL = RECIPES["finetune"].replace(
    affine_probability=0.0,
    elastic_probability=0.0,
    intensity_probability=0.0,
    patches_per_volume=1,
    batch_size=1,
    rotation_degrees=0.0,
    scaling=0.0,
)


def patches(recipe: Recipe, image: torch.Tensor, label: torch.Tensor, *, count: int = 6, seed: int = 0):
    """Return patches that are as large as their volume, so that cutting draws nothing."""
    prep = Preprocessing("mr", patch_size=SIZE)
    transform = Compose(training_augmentation(prep, recipe))
    transform.set_random_state(seed)
    volume = {"image": MetaTensor(image), "label": MetaTensor(label), "annotated": torch.ones(3)}
    return [transform(volume)[0] for _ in range(count)]


def ramp(axis: int) -> torch.Tensor:
    """Return an image whose values are the index along an axis."""
    return torch.from_numpy(np.indices(SIZE)[axis][None].astype(np.float32))


def labels(value: int = 1) -> torch.Tensor:
    return torch.full((1, *SIZE), value, dtype=torch.uint8)


def moved(recipe: Recipe, axis: int) -> float:
    """Return by how many voxels contents moved along an axis at most, away from the border."""
    inside = (slice(8, -8), slice(8, -8), slice(6, -6))
    found = patches(recipe, ramp(axis), labels())
    return max(float((patch["image"][0][inside] - ramp(axis)[0][inside]).abs().max()) for patch in found)


def test_one_rotation_is_three_equal_ones() -> None:
    image, label = torch.rand(1, *SIZE), torch.randint(0, 3, (1, *SIZE), dtype=torch.uint8)
    one = patches(RECIPES["finetune"].replace(rotation_degrees=20.0, patches_per_volume=1), image, label)
    three = patches(RECIPES["finetune"].replace(rotation_degrees=(20.0,) * 3, patches_per_volume=1), image, label)
    for a, b in zip(one, three, strict=True):
        for key in ("image", "label"):
            np.testing.assert_array_equal(a[key].numpy(), b[key].numpy())


def test_a_rotation_about_one_axis_moves_nothing_along_it() -> None:
    for axis in range(3):
        degrees = tuple(40.0 if other == axis else 0.0 for other in range(3))
        recipe = STILL.replace(affine_probability=1.0, rotation_degrees=degrees)
        assert moved(recipe, axis) < 1e-3
        assert all(moved(recipe, other) > 0.5 for other in range(3) if other != axis)


def test_displacements_are_smaller_along_a_coarse_axis() -> None:
    recipe = STILL.replace(elastic_probability=1.0, elastic_magnitude=(400.0, 400.0))
    isotropic = [moved(recipe, axis) for axis in range(3)]
    coarse = [moved(recipe.replace(voxel_aspect=(1.0, 1.0, 8.0)), axis) for axis in range(3)]
    assert coarse[:2] == pytest.approx(isotropic[:2], abs=0.3)
    assert coarse[2] == pytest.approx(isotropic[2] / 8, rel=0.2)


def test_no_coarser_scan_is_simulated_along_a_coarse_axis() -> None:
    recipe = STILL.replace(intensity_probability=1.0, low_resolution=0.3, noise_std=0.0, gamma=(1.0, 1.0))
    recipe = recipe.replace(intensity_scale=0.0, intensity_shift=0.0)
    changes = recipe.replace(voxel_aspect=(1.0, 1.0, 3.0))
    assert moved(recipe, 2) > 0.1
    assert moved(changes, 2) < 1e-4
    assert moved(changes, 0) > 0.1


@pytest.mark.parametrize("options", [{"affine_probability": 1.0}, {"elastic_probability": 1.0}])
def test_what_comes_in_from_outside_is_unlabelled_if_asked(options: dict[str, float]) -> None:
    recipe = STILL.replace(
        rotation_degrees=(0.0, 0.0, 40.0), elastic_magnitude=(900.0, 900.0), unlabelled_border=True, **options
    )
    image, label = torch.rand(1, *SIZE), labels()
    label[:, 10:14] = 255
    label[:, 14:20] = 0
    marked = patches(recipe, image, label)
    plain = patches(recipe.replace(unlabelled_border=False), image, label)
    outside = 0
    for ours, theirs in zip(marked, plain, strict=True):
        np.testing.assert_array_equal(ours["image"].numpy(), theirs["image"].numpy())
        differ = ours["label"] != theirs["label"]
        assert ours["label"].dtype == theirs["label"].dtype
        assert set(ours["label"][differ].tolist()) <= {255}
        assert set(theirs["label"][differ].tolist()) <= {0}
        outside += int(differ.sum())
    # With labels everywhere, everything that is background came from outside.
    assert outside > 0
    full = patches(recipe, image, labels())
    assert set(torch.cat([patch["label"].flatten() for patch in full]).tolist()) == {1, 255}


def test_a_single_slice_is_only_changed_within_itself() -> None:
    recipe = RECIPES["finetune"].replace(
        rotation_degrees=30.0, elastic_probability=1.0, affine_probability=1.0, intensity_probability=1.0
    )
    recipe = recipe.replace(patches_per_volume=1, scaling=0.0)
    prep = Preprocessing("mr", patch_size=(32, 32, 16))
    object.__setattr__(prep, "patch_size", (32, 32, 1))
    transform = Compose(training_augmentation(prep, recipe))
    transform.set_random_state(0)
    image, label = torch.rand(1, 40, 40, 1), torch.ones(1, 40, 40, 1, dtype=torch.uint8)
    for _ in range(5):
        patch = transform({"image": MetaTensor(image), "label": MetaTensor(label), "annotated": torch.ones(2)})[0]
        assert patch["image"].shape == (1, 32, 32, 1)
        assert patch["image"].isfinite().all()
        assert patch["label"].float().mean() > 0.7


def test_values_are_checked_and_stored_only_if_they_change_something() -> None:
    assert not {"voxel_aspect", "unlabelled_border"} & Recipe().to_dict().keys()
    changed = Recipe(rotation_degrees=(0.0, 0.0, 30.0), voxel_aspect=(1.0, 1.0, 6.4), unlabelled_border=True)
    values = changed.to_dict()
    assert Recipe.from_dict({**values, "rotation_degrees": [0.0, 0.0, 30.0], "voxel_aspect": [1, 1, 6.4]}) == changed
    for name, value in {"rotation_degrees": (1.0, 2.0), "voxel_aspect": (1.0, 0.5, 1.0)}.items():
        with pytest.raises(ValueError, match=name):
            Recipe(**{name: value})
