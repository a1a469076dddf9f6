"""Clicks and a mask as channels, against the formula voxel by voxel."""

import numpy as np
import pytest
import torch

from deformux.networks.guidance import CLICK_REACH, encode_guidance


def by_hand(clicks: dict[int, np.ndarray], value: int, size: tuple[int, int, int]) -> np.ndarray:
    channel = np.zeros(size)
    for voxel in np.ndindex(size):
        for click in clicks.get(value, ()):
            away = np.subtract(voxel, click)
            if np.abs(away).max() <= CLICK_REACH:
                channel[voxel] = max(channel[voxel], np.exp(-(away**2).sum() / 8))
    return channel


def test_every_class_has_its_clicks_and_every_label_its_mask() -> None:
    size = (9, 14, 11)
    rng = np.random.default_rng(0)
    clicks = {0: rng.integers(0, size, (1, 3)), 2: rng.integers(0, size, (4, 3)), 3: np.zeros((0, 3), int)}
    mask = torch.from_numpy(rng.choice(np.array([0, 1, 2, 3, 255], np.uint8), size))
    guidance = encode_guidance(clicks, mask, n_labels=3, size=size)
    assert guidance.shape == (7, *size)
    assert guidance.dtype == torch.float32
    for value in range(4):
        np.testing.assert_allclose(guidance[value], by_hand(clicks, value, size), atol=1e-6)
    for value in (1, 2, 3):
        np.testing.assert_array_equal(guidance[3 + value].numpy(), (mask == value).numpy())
    assert not encode_guidance({}, None, n_labels=3, size=size).any()


def test_order_and_repetition_of_clicks_change_nothing() -> None:
    points = np.random.default_rng(0).integers(0, 12, (6, 3))
    one = encode_guidance({1: points}, None, n_labels=1, size=(12, 12, 12))
    other = encode_guidance({1: np.concatenate([points[::-1], points[:2]])}, None, n_labels=1, size=(12, 12, 12))
    assert torch.equal(one, other)


def test_a_window_equals_its_part_of_the_whole_volume() -> None:
    points = np.random.default_rng(1).integers(0, 30, (20, 3))
    clicks = {0: points[:10], 1: points[10:]}
    whole = encode_guidance(clicks, None, n_labels=1, size=(30, 30, 30))
    window = encode_guidance(clicks, None, n_labels=1, size=(10, 8, 12), origin=(3, 0, 15))
    assert torch.equal(window, whole[:, 3:13, :8, 15:27])
    beyond = encode_guidance(clicks, None, n_labels=1, size=(20, 40, 4), origin=(-4, 20, 5))
    assert torch.equal(beyond[:, 4:, :10], whole[:, :16, 20:, 5:9])


def test_invalid_guidance_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got label 3, expected 0 \(background\) to 2"):
        encode_guidance({3: np.zeros((1, 3), int)}, None, n_labels=2, size=(4, 4, 4))
    with pytest.raises(ValueError, match=r"got shape \(2, 2\), expected \(n, 3\)"):
        encode_guidance({1: np.zeros((2, 2), int)}, None, n_labels=2, size=(4, 4, 4))
    with pytest.raises(ValueError, match=r"mask: got shape \(4, 4, 5\), expected the window's \(4, 4, 4\)"):
        encode_guidance({}, torch.zeros(4, 4, 5), n_labels=2, size=(4, 4, 4))
