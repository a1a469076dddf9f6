"""Spacing, strides and patches by arithmetic on sizes."""

import math

import numpy as np
import pytest
import torch

from deformux.data.planned_grid import coarsened_spacing, nnunet_spacing, planned_patch, planned_strides
from deformux.data.preprocessing import Preprocessing
from deformux.networks.deformux_net import PUBLISHED_STRIDES, DeformUXNet


def test_spacing_is_the_median_along_each_axis() -> None:
    spacings = [(1, 1, 2), (1, 1.2, 2.5), (0.8, 1.4, 3)]
    assert nnunet_spacing(spacings, [(100, 100, 60)] * 3) == ((1.0, 1.2, 2.5), None)


def test_thick_slices_take_the_tenth_percentile() -> None:
    spacings = [(1.5, 1.5, z) for z in (5, 6, 8, 10, 10, 10, 10, 10, 10, 10)]
    found, thick = nnunet_spacing(spacings, [(256, 256, 10)] * 10)
    assert thick == 2
    assert found == pytest.approx((1.5, 1.5, np.percentile([s[2] for s in spacings], 10)), rel=1e-4)
    # As coarse, but with as many voxels: the median stays.
    assert nnunet_spacing(spacings, [(90, 90, 80)] * 10) == ((1.5, 1.5, 10.0), None)
    # Never finer than the other axes.
    spacings = [(1.5, 1.5, z) for z in (0.5, 0.5, 8, 8, 8)]
    assert nnunet_spacing(spacings, [(256, 256, 10)] * 5)[0] == (1.5, 1.5, 1.5)


def test_finest_axes_are_coarsened_first_and_only_so_far() -> None:
    coarsened = coarsened_spacing((1, 2, 8), (100, 100, 80), most_voxels=12_500, coarsest_mm=(9, 9, 9))
    assert coarsened == pytest.approx((2.83, 2.83, 8), rel=0.03)
    assert math.prod(n / s for n, s in zip((100, 100, 80), coarsened, strict=True)) <= 12_500
    assert coarsened_spacing((1, 2, 8), (100, 100, 80), most_voxels=1e9, coarsest_mm=(9, 9, 9)) == (1, 2, 8)
    assert coarsened_spacing((1, 2, 8), (99, 99, 80), most_voxels=10, coarsest_mm=(2.5, 1, 9)) == (2.5, 2, 9)
    # On until a patch sees it, and not at all where none ever does.
    more = coarsened_spacing(
        (1, 2, 8), (100, 100, 80), most_voxels=12_500, coarsest_mm=(9, 9, 9), seen=lambda spacing: spacing[0] > 4
    )
    assert more == pytest.approx((4.05, 4.05, 8), rel=0.03)
    never = coarsened_spacing(
        (1, 2, 8), (100, 100, 80), most_voxels=12_500, coarsest_mm=(9, 9, 9), seen=lambda _: False
    )
    assert never == coarsened


def test_strides_keep_thick_axes_until_the_others_are_as_coarse() -> None:
    assert planned_strides((1, 1, 1), (32, 48, 32)) == PUBLISHED_STRIDES
    assert planned_strides((1.5, 1.5, 10), (96, 96, 12)) == ((2, 2, 1), (2, 2, 1), (2, 2, 2), (2, 2, 1))
    assert planned_strides((10, 1.5, 1.5), (12, 96, 96)) == ((1, 2, 2), (1, 2, 2), (2, 2, 2), (1, 2, 2))
    # One slice is never halved.
    assert planned_strides((1, 1, 5), (128, 128, 1)) == ((2, 2, 1),) * 4


def test_a_patch_fits_strides_budget_and_scans() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        spacing = rng.uniform(0.5, 2, 3) * rng.choice([1, 1, 5], 3)
        image = rng.integers(1, 400, 3)
        need = np.maximum(1, image * rng.uniform(0.1, 1.5, 3))
        budget = float(rng.choice([32**3, 60_000, 10**6]))
        patch, strides = planned_patch(spacing, need, image, most_voxels=budget)
        multiple = np.prod(strides, axis=0)
        assert (np.array(patch) % multiple == 0).all()
        assert (np.array(patch) < np.minimum(need, image) + 1 + multiple).all()
        least = np.prod(np.minimum(np.ceil(np.minimum(need, image)), 32) + multiple)
        assert np.prod(patch) <= max(budget, least), (patch, need, image, spacing)
        Preprocessing(patch_size=patch)


def test_a_network_takes_a_planned_patch() -> None:
    patch, strides = planned_patch((1.5, 1.5, 9), (40, 40, 7), (60, 60, 7), most_voxels=32**3)
    network = DeformUXNet(1, 2, "tiny", strides=strides).eval()
    with torch.inference_mode():
        assert network(torch.zeros(1, 1, *patch)).shape == (1, 2, *patch)
