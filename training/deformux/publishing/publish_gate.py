"""The gate: a comparison that decides whether a new model replaces the published one."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from deformux.inference.metrics import mean_dice

__all__ = ["Decision", "Scores", "decide"]

# Largest fall of the mean Dice, of a label's mean Dice, and of the median case's Dice in one publication.
_MEAN_TOLERANCE = 0.002
_LABEL_TOLERANCE = 0.05
_TYPICAL_TOLERANCE = 0.005
# Largest fall of the mean Dice below the best model of the line, over any number of publications.
_TOTAL_TOLERANCE = 0.005
# Smallest number of cases with a meaningful median.
_MIN_FOR_MEDIAN = 3

Scores = Mapping[str, Sequence[float]]
"""Case id to Dice per label."""


@dataclass(frozen=True)
class Decision:
    """Decision whether to publish a candidate, and the numbers behind it.

    Args:
        publish: whether to publish it.
        reason: one sentence.
        provisional: nothing could be measured; the next model that is measured replaces it.
        candidate, incumbent: mean Dice on the counted cases, where finding nothing in a case without the label is 1 if
            the other model does find it there; None if nothing was scored.
        best: mean Dice on the counted cases of the best model before this candidate.
        champion: name of that model, if it is better than the incumbent; in a card, if it is better than the
            version of the card.
        labels: label to mean Dice of incumbent and candidate on the counted cases.
        counted: the validation cases that decided.
        doubtful: validation cases that did not count, and why.
    """

    publish: bool
    reason: str
    provisional: bool = False
    candidate: float | None = None
    incumbent: float | None = None
    best: float | None = None
    champion: str | None = None
    labels: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    counted: tuple[str, ...] = ()
    doubtful: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for the card."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Decision:
        """Invert ``to_dict``."""
        return cls(**{**values, "counted": tuple(values["counted"])})


def decide(
    candidate: Scores,
    incumbent: Scores | None,
    *,
    labels: Sequence[str],
    shares: Mapping[str, Sequence[float]],
    champion: tuple[str, Scores] | None = None,
    incumbent_is_provisional: bool = False,
) -> Decision:
    """Compare two models on the same validation cases.

    The candidate is published when, over the cases that count, its mean Dice is at least the incumbent's minus 0.002,
    no label's mean falls by more than 0.05, and, from three cases on, the median case does not fall by more than 0.005:
    a few wrong labels, which a model may learn to match, must not outvote the rest. Nor may its mean fall to more than
    0.005 below that of the champion, the best model of the line: small falls must not add up.

    A case does not count if neither model is better than chance, or if both are less than half as good as on
    the median case: its label is more likely wrong than both models, and the decision names it. Chance is the Dice of
    calling every voxel the label, 2p / (1 + p) for a label that fills the share p of the volume; on labels of random
    noise no model can do better.

    Args:
        candidate, incumbent: case id to Dice per label, NaN where a label is in neither volume; None if there is no
            incumbent.
        labels: names of the labels, in the order of the scores.
        champion: name of the best model of the line, if that is not the incumbent, and its scores on the same cases.
        shares: case id to the share of the volume that each label fills, 0 to 1.
        incumbent_is_provisional: the incumbent was published without having been measured.

    Raises:
        ValueError: the models were scored on different cases.
    """
    if incumbent is not None and set(incumbent) != set(candidate):
        raise ValueError(
            f"both models must be scored on the same cases; got {sorted(candidate)} and {sorted(incumbent)}"
        )
    if not candidate:
        return Decision(True, "published without a measurement: too few labelled cases to validate on", True)
    doubtful = _doubtful(candidate, incumbent or candidate, shares)
    counted = tuple(sorted(set(candidate) - set(doubtful)))
    if not counted:
        return _nothing_counts(incumbent is None or incumbent_is_provisional, doubtful)
    new = np.array([candidate[case] for case in counted], dtype=float)
    if incumbent is None:
        mean = mean_dice(new)
        reason = f"the first measured model, mean Dice {mean:.4f} on {_cases(counted)}"
        return Decision(True, reason, candidate=mean, counted=counted, doubtful=doubtful)
    old = np.array([incumbent[case] for case in counted], dtype=float)
    former = np.array([champion[1][case] for case in counted], dtype=float) if champion else old
    # An absent label is NaN for a model that does not find it, and 0 for one that does.
    found = ~(np.isnan(old) & np.isnan(new) & np.isnan(former))
    old, new, former = (np.where(np.isnan(values) & found, 1.0, values) for values in (old, new, former))
    means = mean_dice(old), mean_dice(new)
    by_label = {
        name: (_mean(old[:, index]), _mean(new[:, index]))
        for index, name in enumerate(labels)
        if not np.isnan(old[:, index]).all()
    }
    publish, reason = _verdict(means, by_label, [_mean(b) - _mean(a) for a, b in zip(old, new, strict=True)])
    best, name = means[0], None
    if champion is not None and mean_dice(former) > best:
        name, best = champion[0], mean_dice(former)
        # A candidate that is not below the published model is published, however far below the best that is.
        if publish and means[1] < min(means[0], best - _TOTAL_TOLERANCE):
            publish, reason = False, f"worse than {name} was: mean Dice {means[1]:.4f} instead of {best:.4f}"
    return Decision(
        publish,
        f"{reason} on {_cases(counted)}",
        candidate=means[1],
        incumbent=means[0],
        best=best,
        champion=name,
        labels=by_label,
        counted=counted,
        doubtful=doubtful,
    )


def _verdict(
    means: tuple[float, float], by_label: Mapping[str, tuple[float, float]], differences: Sequence[float]
) -> tuple[bool, str]:
    old, new = means
    if not new >= old - _MEAN_TOLERANCE:
        return False, f"worse than the published model: mean Dice {new:.4f} instead of {old:.4f}"
    fallen = {name: pair for name, pair in by_label.items() if pair[1] < pair[0] - _LABEL_TOLERANCE}
    if fallen:
        name, (before, after) = min(fallen.items(), key=lambda item: item[1][1] - item[1][0])
        return False, f"label {name} collapses: Dice {after:.4f} instead of {before:.4f}"
    typical = statistics.median(differences)
    if len(differences) >= _MIN_FOR_MEDIAN and typical < -_TYPICAL_TOLERANCE:
        return False, f"worse on most cases than the published model: the median Dice changes by {typical:+.4f}"
    return True, f"mean Dice {new:.4f}, published model {old:.4f}"


def _nothing_counts(incumbent_is_unproven: bool, doubtful: Mapping[str, str]) -> Decision:
    cases = ", ".join(sorted(doubtful))
    if incumbent_is_unproven:
        reason = f"published without a measurement: no validation case can be trusted ({cases})"
    else:
        reason = f"neither model does better than chance on any validation case; check the labels of {cases}"
    return Decision(incumbent_is_unproven, reason, provisional=incumbent_is_unproven, doubtful=doubtful)


def _doubtful(candidate: Scores, incumbent: Scores, shares: Mapping[str, Sequence[float]]) -> dict[str, str]:
    best = {case: np.fmax(_mean(candidate[case]), _mean(incumbent[case])) for case in candidate}
    doubtful: dict[str, str] = {}
    for case, dice in best.items():
        chance = _mean([2 * share / (1 + share) for share in shares[case]])
        if math.isnan(dice):
            doubtful[case] = "the label is empty, and so are both segmentations"
        elif dice < chance + min(chance / 2, 0.1) or dice == 0:
            doubtful[case] = f"both models are near chance: Dice {dice:.3f}, chance {chance:.3f}"
    rest = [dice for case, dice in best.items() if case not in doubtful]
    if len(rest) >= _MIN_FOR_MEDIAN:
        median = statistics.median(rest)
        for case, dice in best.items():
            if case not in doubtful and dice < median / 2:
                doubtful[case] = f"both models are far below the median case: Dice {dice:.3f}, median {median:.3f}"
    return doubtful


def _mean(values: Iterable[float]) -> float:
    finite = [float(value) for value in values if not math.isnan(value)]
    return math.fsum(finite) / len(finite) if finite else math.nan


def _cases(counted: Sequence[str]) -> str:
    return f"{len(counted)} validation case{'s' if len(counted) > 1 else ''}"
