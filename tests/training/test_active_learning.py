"""Active learning: scores against closed forms, choices against brute force and known distributions."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from deformux.active_learning.diversity import diverse_batch, typical_batch, typicality
from deformux.active_learning.observe import _PooledProbabilities, encode, mirrorings, observe
from deformux.active_learning.strategies import STRATEGIES, choose, coldness, power_noise, stochastic_batch
from deformux.active_learning.uncertainty_scores import (
    VolumeScores,
    label_uncertainty,
    score_samples,
    volume_uncertainty,
)
from deformux.data.preprocessing import Preprocessing
from deformux.inference.slabs import LogitSlab, hand_on
from deformux.inference.sliding_window import segment
from deformux.networks.deformux_net import DeformUXNet


def organ(certainty: float, *, classes: int = 3, size: int = 24) -> torch.Tensor:
    """Return probabilities of a cube of class 1 whose voxels have the given certainty, in sure background."""
    p = torch.zeros(classes, size, size, size)
    p[0] = 1
    inside = (slice(8, 16),) * 3
    p[0][inside] = 0
    p[(slice(1, None), *inside)] = (1 - certainty) / (classes - 2)
    p[(1, *inside)] = certainty
    return p


def entropy(*probabilities: float) -> float:
    return -sum(p * math.log(p) for p in probabilities if p)


def scores_of(values: dict[str, float]) -> dict[str, VolumeScores]:
    """Return scores that differ in every kind, so that a strategy that reads the wrong one fails."""
    return {
        name: VolumeScores(uncertainty=v, per_label=(v,), entropy=1 - v, mutual_information=(v * 7) % 1)
        for name, v in values.items()
    }


# Scores


def test_sure_is_zero_and_undecided_is_one() -> None:
    assert volume_uncertainty(organ(1.0)) == 0
    assert volume_uncertainty(torch.full((4, 5, 6, 7), 0.25)) == pytest.approx(1)


def test_uncertainty_is_the_entropy_of_the_organ() -> None:
    assert volume_uncertainty(organ(0.8)) == pytest.approx(entropy(0.8, 0.2) / math.log(3), rel=1e-5)


@pytest.mark.parametrize("certainty", [0.6, 0.95])
def test_background_around_the_organ_changes_nothing(certainty: float) -> None:
    p = organ(certainty)
    padded = F.pad(p, (40,) * 6)
    padded[0] = 1 - padded[1:].sum(0)
    assert volume_uncertainty(padded) == pytest.approx(volume_uncertainty(p), rel=1e-5)
    # The plain mean over the volume falls with every slice of air.
    assert score_samples([padded]).entropy < 0.1 * score_samples([p]).entropy


def test_a_small_organ_counts_as_much_as_a_large_one() -> None:
    p = torch.zeros(3, 20, 20, 20)
    p[0] = 1
    for label, region, certainty in ((1, (slice(0, 15),) * 3, 0.9), (2, (slice(17, 19),) * 3, 0.6)):
        p[(0, *region)] = 1 - certainty
        p[(label, *region)] = certainty
    expected = [entropy(0.9, 0.1) / math.log(3), entropy(0.6, 0.4) / math.log(3)]
    assert label_uncertainty(p) == pytest.approx(expected, rel=1e-5)
    assert volume_uncertainty(p) == pytest.approx(sum(expected) / 2, rel=1e-5)


def test_a_label_of_less_than_one_voxel_is_absent() -> None:
    p = organ(0.7, classes=4)
    p[2] += p[3]
    p[3] = 0
    p[(3, 0, 0, 0)], p[(0, 0, 0, 0)] = 0.5, 0.5
    assert label_uncertainty(p)[2] is None
    assert volume_uncertainty(p) == pytest.approx(entropy(0.7, 0.3) / math.log(4), rel=1e-5)
    nothing = torch.zeros(2, 4, 4, 4)
    nothing[0] = 1
    assert label_uncertainty(nothing) == (None,)
    assert volume_uncertainty(nothing) == 0


def test_half_precision_gives_the_same() -> None:
    p = torch.softmax(torch.randn(3, 16, 16, 16, generator=torch.Generator().manual_seed(0)), 0)
    assert volume_uncertainty(p.half()) == pytest.approx(volume_uncertainty(p), abs=1e-3)


@pytest.mark.parametrize(
    "bad",
    [torch.zeros(4, 4, 4), torch.ones(1, 4, 4, 4), torch.randn(3, 4, 4, 4) * 5, torch.full((2, 2, 2, 2), math.nan)],
    ids=["no classes", "one class", "logits", "nan"],
)
def test_values_that_are_not_probabilities_are_refused(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="expected probabilities"):
        volume_uncertainty(bad)


def test_mutual_information_is_that_of_the_joint_distribution() -> None:
    samples = torch.softmax(2 * torch.randn(4, 3, 5, 6, 7, generator=torch.Generator().manual_seed(1)), 1)
    scores = score_samples(iter(samples))
    # From its definition: the divergence of the joint distribution of (sample, class) from the product of its margins.
    joint = samples.double().numpy() / len(samples)
    product = joint.sum(0, keepdims=True) * joint.sum(1, keepdims=True)
    expected = (joint * np.log(joint / product)).sum((0, 1)).mean() / math.log(3)
    assert scores.mutual_information == pytest.approx(expected, rel=1e-4)
    mean = samples.mean(0)
    assert scores.entropy == pytest.approx(
        float(torch.distributions.Categorical(mean.movedim(0, -1)).entropy().mean()) / math.log(3), rel=1e-4
    )
    assert scores.uncertainty == pytest.approx(volume_uncertainty(mean), rel=1e-5)


def test_equal_samples_disagree_on_nothing_and_opposite_sure_ones_on_one_bit() -> None:
    assert score_samples([organ(0.7)] * 3).mutual_information == pytest.approx(0, abs=1e-6)
    yes = torch.stack([torch.ones(4, 4, 4), torch.zeros(4, 4, 4)])
    assert score_samples([yes, yes.flip(0)]).mutual_information == pytest.approx(1)


# Diversity


def test_typicality_is_highest_at_the_centre_of_the_densest_cluster() -> None:
    rng = np.random.default_rng(0)
    dense, wide = rng.normal(0, 0.1, (60, 8)), rng.normal(5, 1.0, (40, 8))
    points = np.concatenate([dense, wide, np.zeros((1, 8))])
    assert int(np.argmax(typicality(points))) == 100
    # Its definition, for one point.
    nearest = np.sort(np.linalg.norm(points - points[70], axis=1))[1:21]
    assert typicality(points)[70] == pytest.approx(1 / nearest.mean())


def test_typical_batch_takes_the_core_of_each_cluster_and_skips_covered_ones() -> None:
    rng = np.random.default_rng(0)
    centres = np.array([[0.0, 0], [20, 0], [0, 20], [20, 20]])
    points = np.concatenate(
        [centre + rng.normal(0, 1, (size, 2)) for centre, size in zip(centres, (40, 30, 20, 10), strict=True)]
    )
    chosen = typical_batch(points, np.empty((0, 2)), 4, rng)
    # One for each cluster, the largest first.
    assert [int(np.argmin(np.linalg.norm(centres - points[i], axis=1))) for i in chosen] == [0, 1, 2, 3]
    assert all(np.linalg.norm(points[i] - centres, axis=1).min() < 1 for i in chosen)
    covered = centres[:2] + 0.1
    chosen = typical_batch(points, covered, 2, rng)
    assert [int(np.argmin(np.linalg.norm(centres - points[i], axis=1))) for i in chosen] == [2, 3]


def radius(points: np.ndarray, centres: list[int] | tuple[int, ...]) -> float:
    return float(np.linalg.norm(points[:, None] - points[list(centres)], axis=-1).min(1).max())


@pytest.mark.parametrize("seed", range(5))
def test_greedy_k_center_is_within_twice_the_best_radius(seed: int) -> None:
    points = np.random.default_rng(seed).normal(size=(8, 2))
    chosen = diverse_batch(points, np.empty((0, 2)), 3)
    best = min(radius(points, centres) for centres in itertools.combinations(range(8), 3))
    assert radius(points, chosen) <= 2 * best
    # With two points covered, the next is the one farthest from both.
    distance = np.linalg.norm(points[:, None] - points[:2], axis=-1).min(1)
    assert diverse_batch(points, points[:2], 1) == [int(np.argmax(distance))]
    # And with weights, the one of the largest product.
    weights = np.random.default_rng(seed + 100).uniform(size=8)
    assert diverse_batch(points, points[:2], 1, weights=weights) == [int(np.argmax(weights * distance))]


def test_diverse_draws_follow_the_power_of_weight_times_distance() -> None:
    rng = np.random.default_rng(0)
    points, covered, weights = np.array([[1.0], [2.0], [4.0]]), np.array([[0.0]]), np.array([0.5, 0.5, 0.25])
    draws = Counter(diverse_batch(points, covered, 1, weights=weights, coldness=2, rng=rng)[0] for _ in range(6000))
    expected = np.array([0.5, 1.0, 1.0]) ** 2
    frequencies = np.array([draws[i] for i in range(3)]) / 6000
    assert frequencies == pytest.approx(expected / expected.sum(), abs=0.025)


# Choice


def test_power_noise_draws_without_replacement_in_proportion_to_the_power() -> None:
    rng = np.random.default_rng(0)
    scores, beta = np.array([0.1, 0.2, 0.4, 0.8]), 1.5
    n = 20_000
    draws = Counter(tuple(np.argsort(-power_noise(scores, coldness=beta, rng=rng))[:2]) for _ in range(n))
    weight = scores**beta
    for first, second in itertools.permutations(range(4), 2):
        expected = weight[first] / weight.sum() * weight[second] / (weight.sum() - weight[first])
        assert draws[first, second] / n == pytest.approx(expected, abs=0.015)


def test_choices_grow_colder() -> None:
    assert [coldness(r) for r in range(4)] == sorted({coldness(r) for r in range(4)})
    scores = scores_of({"a": 0.6, "b": 0.3})
    share = [
        sum(
            choose("adaptive", unlabelled="ab", batch=1, round_=r, rng=np.random.default_rng(i), scores=scores) == ["a"]
            for i in range(2000)
        )
        / 2000
        for r in range(3)
    ]
    assert share == pytest.approx([2**b / (2**b + 1) for b in (coldness(0), coldness(1), coldness(2))], abs=0.04)


def test_stochastic_batch_is_the_best_of_the_random_batches() -> None:
    scores = np.random.default_rng(3).uniform(size=12)
    many = stochastic_batch(scores, 3, rng=np.random.default_rng(0), batches=20_000)
    # The batches include all 220 subsets: the best has the highest scores.
    assert many == list(np.argsort(-scores)[:3])
    means = [scores[stochastic_batch(scores, 3, rng=np.random.default_rng(s), batches=1)].mean() for s in range(3000)]
    assert np.mean(means) == pytest.approx(scores.mean(), abs=0.02)


@pytest.mark.parametrize(
    ("strategy", "value"),
    [
        ("uncertainty", lambda s: s.uncertainty),
        ("entropy", lambda s: s.entropy),
        ("bald", lambda s: s.mutual_information),
    ],
)
def test_greedy_strategies_take_the_highest_of_their_own_score(strategy: str, value) -> None:
    scores = scores_of({f"case{i}": i / 20 for i in range(20)})
    rng = np.random.default_rng(0)
    got = choose(strategy, unlabelled=[*scores, "new"], batch=21, round_=3, rng=rng, scores=scores)
    # A volume without a score comes last.
    assert got == [*sorted(scores, key=lambda name: -value(scores[name])), "new"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_gives_distinct_unlabelled_cases_and_the_same_for_the_same_seed(strategy: str) -> None:
    rng = np.random.default_rng(0)
    names = [f"case{i}" for i in range(30)]
    scores = scores_of({name: float(v) for name, v in zip(names, rng.uniform(size=30), strict=True)})
    features = {name: rng.normal(size=6) for name in (*names, "done")}
    for known, described in ((scores, features), (scores, {}), ({}, features), ({}, {})):
        got = [
            choose(
                strategy,
                unlabelled=order,
                labelled=["done"],
                batch=7,
                round_=1,
                rng=np.random.default_rng(seed),
                scores=known,
                features=described,
            )
            for order, seed in ((names, 5), (names[::-1], 5))
        ]
        assert got[0] == got[1]
        assert len(set(got[0])) == 7
        assert set(got[0]) <= set(names)
    assert choose(strategy, unlabelled=names[:2], batch=7, round_=0, rng=rng, scores=scores) in (
        names[:2],
        names[1::-1],
    )
    assert choose(strategy, unlabelled=[], batch=7, round_=0, rng=rng) == []


def test_adaptive_starts_with_typical_cases_and_then_spreads() -> None:
    rng = np.random.default_rng(0)
    features = {
        f"{group}{i}": centre + rng.normal(0, 0.3, 2) for group, centre in (("a", 0), ("b", 9)) for i in range(9)
    }
    start = choose("adaptive", unlabelled=list(features), batch=2, round_=0, rng=rng, features=features)
    assert sorted(name[0] for name in start) == ["a", "b"]
    scores = scores_of(dict.fromkeys(features, 0.5))
    labelled = [name for name in features if name[0] == "a"]
    rest = [name for name in features if name[0] == "b"] + ["a_new"]
    features["a_new"] = features["a0"] + 0.01
    # At such a coldness nothing is random: the case beside a labelled one comes last.
    got = choose(
        "adaptive",
        unlabelled=rest,
        labelled=labelled,
        batch=len(rest),
        round_=500,
        rng=rng,
        scores={**scores, "a_new": scores["a0"]},
        features=features,
    )
    assert got[-1] == "a_new"


def test_a_wrong_strategy_names_the_valid_ones() -> None:
    with pytest.raises(ValueError, match=r"one of adaptive, random, .* got 'best'"):
        choose("best", unlabelled=["a"], batch=1, round_=0, rng=np.random.default_rng(0))


# Networks


@pytest.fixture(scope="module")
def network() -> DeformUXNet:
    torch.manual_seed(0)
    return DeformUXNet(1, 3, "tiny").eval()


PREP = Preprocessing(patch_size=(32, 32, 32))


def test_observation_averages_mirrorings_and_networks(network: DeformUXNet, write_case) -> None:
    case = write_case("one", size=(32, 32, 32))
    _, alone = segment(network, case.image, PREP)
    assert observe([network], case.image, PREP).scores == score_samples([alone])

    class Mirrored(DeformUXNet):
        """Predicts for the mirrored scan and mirrors back, by its own arithmetic."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.flip(super().forward(torch.flip(x, (2, 4))), (2, 4))

    other = Mirrored(1, 3, "tiny")
    other.load_state_dict(network.state_dict())
    _, mirrored = segment(other, case.image, PREP)
    both = observe([network, other], case.image, PREP)
    expected = score_samples([alone, mirrored])
    assert both.scores.mutual_information == pytest.approx(expected.mutual_information, rel=1e-3)
    assert both.scores.mutual_information > 0
    assert mirrorings((2, 0)) == [(), (0,), (2,), (0, 2)]
    four = observe([network], case.image, PREP, flip_axes=(0, 2)).scores
    halves = observe([network, other], case.image, PREP, flip_axes=(0, 2)).scores
    # A second network that is the first one mirrored adds nothing to all mirrorings.
    assert four.mutual_information == pytest.approx(halves.mutual_information, rel=0.02)


def test_untrained_features_tell_scans_apart(network: DeformUXNet, write_case) -> None:
    cases = [write_case(f"case{i}", seed=i) for i in range(3)]
    twin = write_case("twin", seed=0)
    features = [encode(network, case.image, PREP) for case in (*cases, twin)]
    assert all(f.shape == (16 + 32 + 64 + 128,) for f in features)
    assert np.array_equal(features[0], features[3])
    assert np.abs(features[0] - features[1]).max() > 1e-3
    assert observe([network], cases[1].image, PREP).features == pytest.approx(features[1], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("axes", [(), (0,), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_large_scan_is_compared_on_coarser_voxels(
    axis: int, axes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (13, 10, 7)
    logits = torch.randn(3, *size)
    mirrored = logits.flip([a + 1 for a in axes])
    slabs = [
        LogitSlab(axis, at, mirrored.narrow(axis + 1, at, min(4, size[axis] - at))) for at in range(0, size[axis], 4)
    ]
    whole = _PooledProbabilities(size, axes)
    hand_on(slabs, [whole])
    torch.testing.assert_close(whole.probabilities(), logits.softmax(0))
    monkeypatch.setattr("deformux.active_learning.observe._MOST_VALUES", 3 * 5 * 4 * 3)
    pooled = _PooledProbabilities(size, axes)
    hand_on(slabs, [pooled])
    expected = torch.nn.functional.avg_pool3d(logits.softmax(0)[None], 3, ceil_mode=True, count_include_pad=False)[0]
    torch.testing.assert_close(pooled.probabilities(), expected)
