"""When a model is replaced: by hand-made scores, and by real Dice against labels of noise."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

from deformux.inference.metrics import dice_per_label
from deformux.publishing.publish_gate import Decision, decide

LABELS = ("a", "b")
_Scores = dict[str, list[float]]


def judge(candidate: _Scores, incumbent: _Scores | None, **options: Any) -> Decision:
    shares = {case: [0.05, 0.05] for case in candidate}
    return decide(candidate, incumbent, labels=LABELS, shares=shares, **options)


@pytest.mark.parametrize(
    ("candidate", "incumbent", "publish", "words"),
    [
        ([0.80, 0.70], [0.80, 0.70], True, "mean Dice 0.7500"),
        ([0.799, 0.698], [0.80, 0.70], True, "mean Dice 0.7485"),
        ([0.797, 0.698], [0.80, 0.70], False, "worse than the published model: mean Dice 0.7475 instead of 0.7500"),
        ([0.95, 0.64], [0.80, 0.70], False, "label b collapses: Dice 0.6400 instead of 0.7000"),
        ([0.95, 0.66], [0.80, 0.70], True, "mean Dice 0.8050"),
    ],
)
def test_the_rule(candidate: list[float], incumbent: list[float], publish: bool, words: str) -> None:
    decision = judge({"x": candidate, "y": candidate}, {"x": incumbent, "y": incumbent})
    assert decision.publish is publish
    assert words in decision.reason
    assert not decision.provisional
    assert decision.counted == ("x", "y")


def test_small_falls_do_not_add_up() -> None:
    published, best, falls = {"x": [0.8, 0.8]}, ("v0001", {"x": [0.8, 0.8]}), 0
    while True:
        candidate = {"x": [value - 0.0015 for value in published["x"]]}
        decision = judge(candidate, published, champion=best)
        if not decision.publish:
            break
        published, falls = candidate, falls + 1
    assert falls == 3
    assert "worse than v0001 was: mean Dice 0.7940 instead of 0.8000" in decision.reason


def test_an_equal_model_is_published_however_far_below_the_best() -> None:
    best, published = ("v0001", {"x": [0.82, 0.82]}), {"x": [0.8, 0.8]}
    same = judge({"x": [0.8, 0.8]}, published, champion=best)
    assert (same.publish, same.best, same.champion) == (True, pytest.approx(0.82), "v0001")
    assert not judge({"x": [0.7999, 0.7999]}, published, champion=best).publish
    # On today's labels the published model is itself the best.
    overtaken = judge({"x": [0.7985, 0.7985]}, published, champion=("v0001", {"x": [0.7, 0.7]}))
    assert (overtaken.publish, overtaken.best, overtaken.champion) == (True, pytest.approx(0.8), None)


def test_a_champion_gets_credit_for_finding_nothing_where_nothing_is() -> None:
    nan = math.nan
    inventing, truthful = {"x": [0.8, 0.0], "y": [0.8, 0.8]}, {"x": [0.8, nan], "y": [0.8, 0.8]}
    decision = judge({**inventing, "y": [0.8, 0.799]}, inventing, champion=("v0001", truthful))
    assert not decision.publish
    assert decision.best == pytest.approx(0.85)


def test_without_validation_cases_a_model_is_provisional() -> None:
    decision = judge({}, {})
    assert (decision.publish, decision.provisional) == (True, True)


def test_inventing_a_label_is_worse_than_finding_nothing() -> None:
    nan = math.nan
    truthful, inventing = {"x": [0.8, nan], "y": [0.8, 0.8]}, {"x": [0.8, 0.0], "y": [0.8, 0.8]}
    assert not judge(inventing, truthful).publish
    assert judge(truthful, inventing).publish


def test_models_must_be_scored_on_the_same_cases() -> None:
    with pytest.raises(ValueError, match="same cases"):
        judge({"x": [0.5, 0.5]}, {"y": [0.5, 0.5]})


def test_a_case_that_both_models_fail_does_not_decide_and_is_named() -> None:
    good = {f"c{number}": [0.8, 0.8] for number in range(4)}
    decision = judge(
        {**good, "wrong": [0.3, 0.3], "noise": [0.08, 0.08]}, {**good, "wrong": [0.0, 0.0], "noise": [0, 0]}
    )
    assert set(decision.doubtful) == {"wrong", "noise"}
    assert "near chance" in decision.doubtful["noise"]
    assert "far below the median case" in decision.doubtful["wrong"]
    assert decision.counted == tuple(good)


def test_where_no_case_can_be_trusted_a_measured_model_stays() -> None:
    useless = {"x": [0.01, 0.02]}
    assert not judge(useless, {"x": [0.0, 0.0]}).publish
    assert "check the labels of x" in judge(useless, {"x": [0.0, 0.0]}).reason
    unproven = judge(useless, {"x": [0.0, 0.0]}, incumbent_is_provisional=True)
    assert (unproven.publish, unproven.provisional) == (True, True)


def volume(seed: int) -> np.ndarray:
    """Return two balls in (24, 24, 24), of about 4 % each."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.arange(24)] * 3, indexing="ij"))
    centres = rng.uniform(6, 9, 3), rng.uniform(15, 18, 3)
    balls = [((grid - centre[:, None, None, None]) ** 2).sum(0) < 25 for centre in centres]
    return np.where(balls[0], 1, np.where(balls[1], 2, 0))


def segmentation(truth: np.ndarray, error: float, seed: int) -> np.ndarray:
    """Return a segmentation in which a share `error` of all voxels is random, as of a model that learnt noise."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(truth.shape) < error, rng.integers(0, 3, truth.shape), truth)


@pytest.mark.parametrize(("good", "bad"), [(0.0, 0.01), (0.01, 0.03), (0.02, 0.5), (0.1, 1.0)])
def test_labels_of_noise_cannot_vote_a_worse_model_in(good: float, bad: float) -> None:
    rng = np.random.default_rng(7)
    truths = [volume(seed) for seed in range(9)]
    # Up to a third of the validation labels is noise of any density; the bad model has learnt to like noise.
    for corrupted, density in itertools.product((1, 2, 3), (0.05, 0.3, 0.9)):
        labels = [
            np.where(rng.random(t.shape) < density, rng.integers(1, 3, t.shape), 0) if number < corrupted else t
            for number, t in enumerate(truths)
        ]
        names = [f"c{number}" for number in range(len(labels))]
        scores = {
            error: {
                name: dice_per_label(segmentation(truth, error, seed), label, 2).tolist()
                for seed, (name, truth, label) in enumerate(zip(names, truths, labels, strict=True))
            }
            for error in (good, bad)
        }
        shares = {name: [float((label == v).mean()) for v in (1, 2)] for name, label in zip(names, labels, strict=True)}
        worse = decide(scores[bad], scores[good], labels=LABELS, shares=shares)
        better = decide(scores[good], scores[bad], labels=LABELS, shares=shares)
        assert not worse.publish, (corrupted, density, worse)
        assert better.publish, (corrupted, density, better)
        assert set(better.doubtful) == set(names[:corrupted])
