"""Strategies that choose which unlabelled volumes to label next."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from deformux.active_learning.diversity import Array, diverse_batch, standardised, typical_batch
from deformux.active_learning.strategy_names import NEEDS_SCORES, STRATEGIES
from deformux.active_learning.uncertainty_scores import VolumeScores

__all__ = ["NEEDS_SCORES", "STRATEGIES", "choose", "coldness", "power_noise", "stochastic_batch"]

# Number of random batches that compete in ``stochastic_batch``.
_BATCHES = 100
_SMALLEST_SCORE = 1e-12


def coldness(round_: int) -> float:
    """Return the exponent of scores in round 0, 1, …: early models judge poorly, so early choices are more random."""
    return 1.0 + round_


def power_noise(scores: npt.ArrayLike, *, coldness: float, rng: np.random.Generator) -> Array:
    """Perturb log scores; the B largest are B draws without replacement with probability ∝ score^coldness.

    Power acquisition of Kirsch et al. (arXiv 2106.12059): ``coldness · log(score)`` plus Gumbel noise.

    Args:
        scores: ``(n,)``, not negative.
        coldness: 0 draws uniformly; the larger, the closer to the B highest scores.
    """
    s = np.asarray(scores, dtype=np.float64)
    return coldness * np.log(np.maximum(s, _SMALLEST_SCORE)) + rng.gumbel(size=s.shape)


def stochastic_batch(
    scores: npt.ArrayLike, batch: int, *, rng: np.random.Generator, batches: int = _BATCHES
) -> list[int]:
    """Return the random batch with the highest mean score (Gaillochet et al., arXiv 2301.07670).

    Args:
        scores: ``(n,)``.
        batch: number of volumes in a batch.
        batches: number of batches drawn, each without replacement.

    Returns:
        ``min(batch, n)`` positions, in the order of their scores.
    """
    s = np.asarray(scores, dtype=np.float64)
    size = min(batch, len(s))
    drawn = [rng.choice(len(s), size, replace=False) for _ in range(batches)]
    best = max(drawn, key=lambda positions: s[positions].mean()) if size else np.empty(0, dtype=np.intp)
    return [int(i) for i in best[np.argsort(-s[best], kind="stable")]]


def choose(
    strategy: str,
    *,
    unlabelled: Sequence[str],
    batch: int,
    round_: int,
    rng: np.random.Generator,
    labelled: Sequence[str] = (),
    scores: Mapping[str, VolumeScores] | None = None,
    features: Mapping[str, npt.ArrayLike] | None = None,
) -> list[str]:
    """Return the next volumes to label, best first; the same arguments and generator give the same ones.

    - ``adaptive``: before there are scores, the most typical volume of each cluster (``typical_batch``); afterwards
      draws in proportion to (uncertainty per label · distance to what is labelled or chosen), colder in each round.
    - ``random``.
    - ``typicality``: TypiClust in every round (Hacohen et al., arXiv 2202.02794).
    - ``uncertainty``: the highest mean of the labels' own entropies.
    - ``entropy``: the highest entropy over all voxels.
    - ``bald``: the highest mutual information (Houlsby et al., arXiv 1112.5745).
    - ``stochastic_batch``: of random batches, the one of the highest mean entropy (Gaillochet et al.).

    Volumes without the scores or features that the strategy needs come last, in random order; equal scores too.

    Args:
        strategy: one of ``STRATEGIES``.
        unlabelled: ids to choose from; their order does not matter.
        batch: number of volumes to choose.
        round_: number of batches chosen from scores before.
        labelled: ids that have a label; those with features keep the choice away from them.
        scores, features: by id.

    Returns:
        ``min(batch, len(unlabelled))`` ids.

    Raises:
        ValueError: an unknown strategy, or a negative batch or round.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}; got {strategy!r}")
    if batch < 0 or round_ < 0:
        raise ValueError(f"batch and round must not be negative; got {batch} and {round_}")
    names = [str(name) for name in rng.permutation(np.array(sorted(unlabelled), dtype=object))]
    scores, features = scores or {}, features or {}
    scored = [name for name in names if name in scores]
    chosen: list[str] = []
    if strategy == "typicality" or (strategy == "adaptive" and not scored):
        chosen = _typical(names, sorted(labelled), features, batch, rng)
    elif strategy == "adaptive":
        chosen = _adaptive(scored, sorted(labelled), scores, features, batch, round_, rng)
    elif strategy == "stochastic_batch":
        values = [scores[name].entropy for name in scored]
        chosen = [scored[i] for i in stochastic_batch(values, batch, rng=rng)]
    elif strategy in _HIGHEST_FIRST:
        chosen = sorted(scored, key=lambda name: -_HIGHEST_FIRST[strategy](scores[name]))[:batch]
    taken = set(chosen)
    return (chosen + [name for name in names if name not in taken])[:batch]


_HIGHEST_FIRST: Mapping[str, Callable[[VolumeScores], float]] = {
    "uncertainty": lambda scores: scores.uncertainty,
    "entropy": lambda scores: scores.entropy,
    "bald": lambda scores: scores.mutual_information,
}


def _typical(
    names: Sequence[str],
    labelled: Sequence[str],
    features: Mapping[str, npt.ArrayLike],
    batch: int,
    rng: np.random.Generator,
) -> list[str]:
    candidates = [name for name in names if name in features]
    if not candidates or not batch:
        return []
    rows, covered = _rows(candidates, labelled, features)
    return [candidates[i] for i in typical_batch(rows, covered, batch, rng)]


def _adaptive(
    names: Sequence[str],
    labelled: Sequence[str],
    scores: Mapping[str, VolumeScores],
    features: Mapping[str, npt.ArrayLike],
    batch: int,
    round_: int,
    rng: np.random.Generator,
) -> list[str]:
    uncertainty = np.array([scores[name].uncertainty for name in names])
    if not all(name in features for name in names):
        noisy = power_noise(uncertainty, coldness=coldness(round_), rng=rng)
        return [names[i] for i in np.argsort(-noisy, kind="stable")[:batch]]
    rows, covered = _rows(names, labelled, features)
    positions = diverse_batch(rows, covered, batch, weights=uncertainty, coldness=coldness(round_), rng=rng)
    return [names[i] for i in positions]


def _rows(names: Sequence[str], labelled: Sequence[str], features: Mapping[str, npt.ArrayLike]) -> tuple[Array, Array]:
    """Return features of the candidates and of the labelled volumes, on one scale."""
    known = [name for name in labelled if name in features]
    rows = standardised([np.asarray(features[name], dtype=np.float64) for name in (*names, *known)])
    return rows[: len(names)], rows[len(names) :]
