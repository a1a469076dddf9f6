"""Where a model is unsure: the map against closed forms and scipy, the place to look against brute force."""

import math

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.ndimage import affine_transform

from deformux.active_learning.uncertainty_map import find_uncertainty, look_next, uncertainty_map
from deformux.active_learning.uncertainty_scores import volume_uncertainty
from deformux.data.preprocessing import Preprocessing
from deformux.data.transforms import inference_transforms, run_transforms


def everywhere(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities)[:, None, None, None].expand(-1, 2, 3, 4)


@pytest.mark.parametrize(
    ("probabilities", "expected"),
    [
        ((1.0, 0.0, 0.0), 0),
        ((0.0, 1.0, 0.0), 0),
        ((0.5, 0.5, 0.0), 100),  # the edge of an organ
        ((0.0, 0.5, 0.5), 100),  # between two organs
        ((1 / 40,) * 40, 100),
        ((0.1, 0.9), 100 * (-0.9 * math.log2(0.9) - 0.1 * math.log2(0.1))),
        ((0.9, 0.1), 100 * (-0.9 * math.log2(0.9) - 0.1 * math.log2(0.1)) * 0.2),
    ],
)
def test_sure_is_zero_and_undecided_is_a_hundred(probabilities: tuple[float, ...], expected: float) -> None:
    values = uncertainty_map(everywhere(*probabilities))
    torch.testing.assert_close(values, torch.full((2, 3, 4), float(expected)), rtol=1e-4, atol=1e-4)


def test_logits_are_not_taken_for_probabilities() -> None:
    with pytest.raises(ValueError, match="softmax"):
        uncertainty_map(torch.randn(3, 4, 4, 4) * 5)


def brute_centre(inside: np.ndarray, spacing: tuple[float, ...]) -> float:
    """Return the distance of the deepest voxel of a region from all around it, slices outside the volume included."""
    outside = np.argwhere(~np.pad(inside, 1)) - 1
    return max(np.linalg.norm((outside - voxel) * spacing, axis=1).min() for voxel in np.argwhere(inside))


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (1.0, 2.0, 5.0)])
def test_the_place_to_look_is_deepest_in_the_most_uncertain_region(spacing: tuple[float, ...]) -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        unsure = np.zeros((16, 15, 14), np.float32)
        region = np.zeros(unsure.shape, bool)
        for _ in range(4):  # boxes that touch, some at the volume's faces
            corner = rng.integers(0, 5, 3)
            region[tuple(slice(c, c + n) for c, n in zip(corner, rng.integers(3, 9, 3), strict=True))] = True
        unsure[region] = rng.uniform(60, 100, region.sum())
        unsure[14:, 13:, 12:] = 100  # a separate region: more uncertain, but small
        place = look_next(torch.from_numpy(unsure), spacing)
        assert place is not None
        assert region[place]
        outside = np.argwhere(~np.pad(region, 1)) - 1
        depth = np.linalg.norm((outside - np.array(place)) * spacing, axis=1).min()
        assert depth == pytest.approx(brute_centre(region, spacing))


def test_an_empty_map_and_a_single_slice() -> None:
    assert look_next(torch.zeros(4, 4, 4)) is None
    slice_of = torch.zeros(21, 21, 1)
    slice_of[5:12, 6:13] = 80
    assert look_next(slice_of) == (8, 9, 0)


@pytest.mark.parametrize("prep", [Preprocessing("ct"), Preprocessing("ct", spacing_mm=(1.5, 1.5, 1.5))])
def test_the_map_lies_on_the_scan(write_case, oblique: np.ndarray, prep: Preprocessing) -> None:
    case = write_case("a", affine=oblique)
    image = run_transforms(inference_transforms(prep), {"image": case.image})["image"]
    # Undecided in a ball about a voxel of the scan that no flip or swap of axes leaves in place, sure elsewhere.
    voxel = (9, 21, 15)
    indices = np.stack(np.meshgrid(*map(np.arange, image.shape[1:]), indexing="ij"), -1)
    position = nib.affines.apply_affine(image.affine.numpy(), indices)
    distance = np.linalg.norm(position - nib.affines.apply_affine(oblique, voxel), axis=-1)
    logits = torch.zeros(3, *image.shape[1:])
    logits[1] = torch.from_numpy(distance - 12).clamp(min=0)
    logits[2] = -20
    found = find_uncertainty(logits.half(), image)

    scan = nib.load(case.image)
    assert found.map.shape == scan.shape
    assert found.map.dtype == np.uint8
    probabilities = logits.half().float().softmax(0)
    to_network = np.linalg.inv(image.affine.numpy()) @ oblique
    expected = affine_transform(
        uncertainty_map(probabilities).numpy(), to_network, output_shape=scan.shape, order=1, mode="nearest"
    )
    assert np.abs(found.map - expected).max() <= 0.51
    assert found.mean == pytest.approx(100 * volume_uncertainty(probabilities))

    assert found.look_next is not None
    assert found.map[found.look_next] > 95
    offset = nib.affines.apply_affine(oblique, found.look_next) - nib.affines.apply_affine(oblique, voxel)
    # Half a voxel for each of the two grids, and the ball's own raster.
    assert np.linalg.norm(offset) <= 1.01 * np.linalg.norm(nib.affines.voxel_sizes(oblique))


def test_a_sure_volume_has_no_place_to_look(write_case) -> None:
    case = write_case("a")
    image = run_transforms(inference_transforms(Preprocessing("ct")), {"image": case.image})["image"]
    logits = torch.zeros(2, *image.shape[1:])
    logits[0] = 30
    found = find_uncertainty(logits, image)
    assert (found.look_next, found.map.max(), found.mean) == (None, 0, 0)
