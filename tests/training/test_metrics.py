"""Dice against the formula, counted by hand."""

import numpy as np
import pytest

from deformux.inference.metrics import dice_per_label, mean_dice


def test_dice_is_twice_the_overlap_over_the_sum() -> None:
    rng = np.random.default_rng(0)
    pred, truth = rng.integers(0, 4, (2, 9, 8, 7))
    by_hand = [2 * np.sum((pred == k) & (truth == k)) / (np.sum(pred == k) + np.sum(truth == k)) for k in range(1, 4)]
    np.testing.assert_allclose(dice_per_label(pred, truth, 3), by_hand, atol=1e-6)


def test_a_label_in_neither_volume_is_nan_and_in_one_is_zero() -> None:
    pred, truth = np.zeros((2, 4, 4, 4), int)
    truth[0] = 1
    np.testing.assert_array_equal(dice_per_label(pred, truth, 2), [0, np.nan])


def test_the_mean_ignores_absent_labels() -> None:
    assert mean_dice([[0.5, np.nan], [0.7, 0.9]]) == pytest.approx((0.6 + 0.9) / 2)
    assert np.isnan(mean_dice([[np.nan, np.nan]]))


def test_volumes_of_different_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 2, 2\) and \(2, 2, 3\)"):
        dice_per_label(np.zeros((2, 2, 2)), np.zeros((2, 2, 3)), 1)
