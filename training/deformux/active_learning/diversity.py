"""Typical and diverse volumes, from rows of features."""

from __future__ import annotations

import math
import warnings

import numpy as np
import numpy.typing as npt
from scipy.cluster.vq import kmeans2
from scipy.spatial.distance import cdist

__all__ = ["diverse_batch", "standardised", "typical_batch", "typicality"]

Array = npt.NDArray[np.float64]

_NEIGHBOURS = 20
_MAX_CLUSTERS = 500
# Rows whose distances to all others are in memory at a time.
_BLOCK = 1024
# Two volumes of equal features have no finite log distance or typicality.
_CLOSEST = 1e-12


def standardised(features: npt.ArrayLike) -> Array:
    """Return rows ``(n, d)`` with mean 0 and variance 1 in each column; constant columns become 0."""
    x = np.asarray(features, dtype=np.float64)
    spread = x.std(axis=0)
    return (x - x.mean(axis=0)) / np.where(spread > 1e-9 * np.abs(x).max(initial=1e-9), spread, np.inf)


def typicality(features: Array, *, neighbours: int = _NEIGHBOURS) -> Array:
    """Return the inverse of the mean distance to the nearest neighbours (Hacohen et al., arXiv 2202.02794).

    Args:
        features: ``(n, d)``.
        neighbours: number of neighbours; with fewer other rows, all of them.

    Returns:
        ``(n,)``; 0 for a single row.
    """
    count = min(neighbours, len(features) - 1)
    if count < 1:
        return np.zeros(len(features))
    result = np.empty(len(features))
    for start in range(0, len(features), _BLOCK):
        rows = slice(start, start + _BLOCK)
        distances = cdist(features[rows], features)
        # The nearest row is the row itself.
        nearest = np.partition(distances, count, axis=1)[:, : count + 1]
        result[rows] = count / np.maximum(nearest.sum(axis=1), _CLOSEST)
    return result


def typical_batch(features: Array, covered: Array, batch: int, rng: np.random.Generator) -> list[int]:
    """Choose the most typical row of each of the largest clusters that hold no covered row (TypiClust).

    Hacohen et al., arXiv 2202.02794: k-means with one cluster for each covered and each wanted row.

    Args:
        features: ``(n, d)``, candidates.
        covered: ``(m, d)``, rows that are labelled already; they count as part of their clusters.
        batch: number of rows to choose.
        rng: for the first centres of the clusters.

    Returns:
        ``min(batch, n)`` positions in ``features``, in the order of choice.
    """
    everything = np.concatenate([features, covered])
    count = min(len(covered) + batch, len(everything), _MAX_CLUSTERS)
    with warnings.catch_warnings():
        # An empty cluster does no harm here.
        warnings.simplefilter("ignore", UserWarning)
        # Drawing in proportion to the squared distance is k-means++; scipy's own takes minutes for 10,000 rows.
        start = diverse_batch(everything, covered[:0], count, coldness=2.0, rng=rng)
        _, member_of = kmeans2(everything, everything[start], minit="matrix")
    taken = np.bincount(member_of[len(features) :], minlength=count).astype(np.int64)
    size = np.bincount(member_of, minlength=count)
    queues: list[list[int]] = []
    for cluster in range(count):
        members = np.flatnonzero(member_of == cluster)
        ranked = members[np.argsort(-typicality(everything[members]), kind="stable")]
        queues.append([int(i) for i in ranked if i < len(features)])
    chosen: list[int] = []
    while len(chosen) < min(batch, len(features)):
        open_clusters = [cluster for cluster in range(count) if queues[cluster]]
        cluster = min(open_clusters, key=lambda c: (taken[c], -size[c]))
        chosen.append(queues[cluster].pop(0))
        taken[cluster] += 1
    return chosen


def diverse_batch(
    features: Array,
    covered: Array,
    batch: int,
    *,
    weights: Array | None = None,
    coldness: float = math.inf,
    rng: np.random.Generator | None = None,
) -> list[int]:
    """Draw rows far from the covered ones and from each other, with probability ∝ (weight · distance)^coldness.

    Rows are drawn one by one; the distance is that to the nearest covered or chosen row. An infinite coldness
    takes the largest product each time: without weights that is the greedy k-center of Sener and Savarese (arXiv
    1708.00489). A finite one is the power acquisition of Kirsch et al. (arXiv 2106.12059) on weights that fall near
    what is already chosen, as in the k-means++ seeding of BADGE (Ash et al., arXiv 1906.03671).

    Args:
        features: ``(n, d)``, candidates.
        covered: ``(m, d)``, rows to keep away from; may be empty.
        batch: number of rows to choose.
        weights: ``(n,)``, not negative; equal by default.
        coldness: 0 draws uniformly.
        rng: for the draws; needed for a finite coldness.

    Returns:
        ``min(batch, n)`` positions in ``features``, in the order of choice.
    """
    n = len(features)
    log_weight = np.log(np.maximum(np.ones(n) if weights is None else weights, _CLOSEST))
    nearest = np.full(n, np.inf)
    for start in range(0, len(covered), _BLOCK):
        nearest = np.minimum(nearest, cdist(features, covered[start : start + _BLOCK]).min(axis=1))
    chosen: list[int] = []
    free = np.ones(n, dtype=bool)
    while len(chosen) < min(batch, n):
        value = log_weight + (np.log(np.maximum(nearest, _CLOSEST)) if np.isfinite(nearest).all() else 0.0)
        if math.isfinite(coldness):
            if rng is None:
                raise ValueError("a finite coldness draws at random: give rng")
            # The largest Gumbel-perturbed logarithm is a draw in proportion to the powers.
            value = coldness * value + rng.gumbel(size=n)
        value[~free] = -np.inf
        best = int(np.argmax(value))
        chosen.append(best)
        free[best] = False
        nearest = np.minimum(nearest, np.linalg.norm(features - features[best], axis=1))
    return chosen
