"""Training patches that are augmented on the GPU, against the same on the CPU."""

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage

sampling = pytest.importorskip("deformux.fitting.patches", reason="training needs monai", exc_type=ImportError)


@pytest.fixture
def case(tmp_path):
    rng = np.random.default_rng(0)
    image = ndimage.gaussian_filter(rng.normal(size=(40, 44, 36)), 2).astype(np.float32)
    label = ndimage.gaussian_filter(rng.normal(size=image.shape), 4)
    for name, volume in (("image", image), ("label", (label > 0).astype(np.uint8))):
        nib.save(nib.Nifti1Image(volume, np.eye(4)), tmp_path / f"{name}.nii.gz")
    return sampling.Case("c", tmp_path / "image.nii.gz", tmp_path / "label.nii.gz")


def test_patches_equal_those_of_the_cpu(case, device):
    """The random draws do not depend on the device; resampling rounds differently."""
    prep = sampling.Preprocessing("mr", patch_size=(32, 32, 32))
    every = {"affine_probability": 1.0, "elastic_probability": 0.5, "intensity_probability": 1.0, "flip_axes": (0,)}
    recipe = sampling.Recipe(steps=6, noise_std=0.1, gamma=(0.7, 1.5), low_resolution=0.5, intensity_scale=0.1, **every)
    drawn = []
    for where in ("cpu", device):
        patches = sampling.Patches([case], new=(), recipe=recipe, prep=prep, labels=("a",), device=where, workers=0)
        drawn.append(list(patches.loader(first_step=0, steps=recipe.steps, seed=0)))
    for on_cpu, on_gpu in zip(*drawn, strict=True):
        assert on_gpu["image"].device == on_gpu["label"].device == torch.device(device)
        image, label = (on_gpu[key].cpu() for key in ("image", "label"))
        assert (image - on_cpu["image"]).abs().mean() < 1e-3
        assert (label != on_cpu["label"]).float().mean() < 1e-3, "but for voxels halfway between two"


def test_processes_return_pinned_batches_equal_to_the_cpus(case, device):
    prep, recipe = sampling.Preprocessing("mr", patch_size=(32, 32, 32)), sampling.Recipe(steps=6)
    drawn = []
    for where, workers in (("cpu", 0), (device, 3)):
        patches = sampling.Patches(
            [case], new=(), recipe=recipe, prep=prep, labels=("a",), device=where, workers=workers
        )
        drawn.append(list(patches.loader(first_step=0, steps=recipe.steps, seed=0)))
    for alone, together in zip(*drawn, strict=True):
        for key, value in together.items():
            assert value.is_pinned(), key
            torch.testing.assert_close(value, alone[key], rtol=0, atol=1e-5, msg=key)
