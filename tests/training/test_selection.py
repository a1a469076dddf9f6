"""Uncertainty of a whole volume from the model's probabilities."""

import math

import pytest
import torch
from torch.nn import functional as F

from deformux.selection import volume_uncertainty


def organ(certainty: float, *, classes: int = 3, size: int = 24) -> torch.Tensor:
    """Probabilities of a cube of class 1 whose voxels have the given certainty, in sure background."""
    p = torch.zeros(classes, size, size, size)
    p[0] = 1
    inside = (slice(8, 16),) * 3
    p[0][inside] = 0
    p[(slice(1, None), *inside)] = (1 - certainty) / (classes - 2)
    p[(1, *inside)] = certainty
    return p


def test_sure_is_zero_and_undecided_is_one() -> None:
    assert volume_uncertainty(organ(1.0)) == 0
    assert volume_uncertainty(torch.full((4, 5, 6, 7), 0.25)) == pytest.approx(1)


def test_is_the_entropy_of_the_organ() -> None:
    expected = -(0.8 * math.log(0.8) + 0.2 * math.log(0.2)) / math.log(3)
    assert volume_uncertainty(organ(0.8)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("certainty", [0.6, 0.95])
def test_background_around_the_organ_changes_nothing(certainty: float) -> None:
    p = organ(certainty)
    padded = F.pad(p, (40,) * 6)
    padded[0] = 1 - padded[1:].sum(0)
    assert volume_uncertainty(padded) == pytest.approx(volume_uncertainty(p), rel=1e-5)
    # The plain mean over the volume, which this replaces, falls with every slice of air.
    assert torch.special.entr(padded).sum(0).mean() < 0.1 * torch.special.entr(p).sum(0).mean()


def test_less_certain_organs_score_higher() -> None:
    scores = [volume_uncertainty(organ(certainty)) for certainty in (0.99, 0.9, 0.7, 0.5)]
    assert scores == sorted(scores)


def test_nothing_but_background_is_zero() -> None:
    p = torch.zeros(2, 4, 4, 4)
    p[0] = 1
    assert volume_uncertainty(p) == 0


def test_half_precision_gives_the_same() -> None:
    p = torch.softmax(torch.randn(3, 16, 16, 16, generator=torch.Generator().manual_seed(0)), 0)
    assert volume_uncertainty(p.half()) == pytest.approx(volume_uncertainty(p), abs=1e-3)


@pytest.mark.parametrize(
    "bad",
    [torch.zeros(4, 4, 4), torch.ones(1, 4, 4, 4), torch.randn(3, 4, 4, 4) * 5, torch.full((2, 2, 2, 2), math.nan)],
    ids=["no classes", "one class", "logits", "nan"],
)
def test_refuses_what_is_not_probabilities(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="expected probabilities"):
        volume_uncertainty(bad)
