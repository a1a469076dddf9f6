"""Segments from scribbles: by the intensities under them and the distances from them, with a graph cut.

The energy is that of Wang et al., arXiv 1710.04043, equations 5 and 7, as in MONAI Label's scribble tasks, whose
histograms, unary term and solver are used. Differences: intensities alone do not distinguish an organ from other bright
structures, so nearness to the scribbles counts too; a mixture of Gaussians is fitted on the CPU (MONAI Label compiles a
CUDA extension at the first request); and the two densities of the histogram are combined by Bayes' rule (MONAI Label
takes the softmax of two small numbers, which is always about one half).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import numpymaxflow
from monailabel.scribbles.utils import make_iseg_unary, make_likelihood_image_histogram
from scipy import ndimage
from sklearn.mixture import GaussianMixture

from deformux_label.lib.requests.scribbles import SCRIBBLED_BACKGROUND, SCRIBBLED_FOREGROUND

__all__ = [
    "CutOptions",
    "Evidence",
    "Surroundings",
    "by_histogram",
    "by_mixture",
    "cut",
    "from_network",
    "from_scribbles",
]

# Log-odds are clipped to this: higher ones are practically certain, and must not outweigh a scribble.
_MAX_LOG_ODDS = 7.0
# Weight of nearness relative to intensity; tuned on CT and MR organs with simulated scribbles.
_NEARNESS = 2.0
# Reach of a scribble that contradicts the network: its weight is exp(-distance / reach), in units of the scale.
_REACH = 3.0
# Voxels with at least this probability are samples of a side's intensities.
_SURE = 0.9
# Most voxels that mixtures are fitted to, and steps of intensity in which they are tabulated.
_MAX_SAMPLES = 20_000
_STEPS = 512
# Neighbouring voxels share a face.
_NEIGHBOURS = 6

Values = npt.NDArray[np.float32]
_Mask = npt.NDArray[np.bool_]
# Log-odds (x, y, z) of the foreground by intensity, from an image scaled to 0..1 and the samples of both sides.
Evidence = Callable[[Values, _Mask, _Mask], Values]


@dataclass(frozen=True)
class CutOptions:
    """Smoothness of a segment.

    Args:
        lamda: strength with which neighbours of similar intensity stay together, in log-odds.
        sigma: difference of intensity (0..1) at which they separate.
    """

    lamda: float = 5.0
    sigma: float = 0.05


@dataclass(frozen=True)
class Surroundings:
    """Distances ``(x, y, z)`` in mm of each voxel from the scribbles.

    Args:
        foreground, background: distance to the nearest such scribble; the region's edge counts as background.
        spacing: voxel size.
    """

    foreground: Values
    background: Values
    spacing: npt.NDArray[np.float64]

    @property
    def scale(self) -> float:
        """Return the distance below which differences do not matter: about a voxel."""
        return float(self.spacing.mean())

    @classmethod
    def of(cls, scribbles: npt.NDArray[np.uint8], spacing: npt.NDArray[np.float64], edge: Values) -> Surroundings:
        """Measure the distances of scribbles ``(x, y, z)``, some of them foreground; ``edge`` is that from the edge."""
        background = edge
        if (scribbles == SCRIBBLED_BACKGROUND).any():
            to_scribble = ndimage.distance_transform_edt(scribbles != SCRIBBLED_BACKGROUND, sampling=spacing)
            background = np.minimum(edge, to_scribble)
        foreground = ndimage.distance_transform_edt(scribbles != SCRIBBLED_FOREGROUND, sampling=spacing)
        return cls(foreground.astype(np.float32), background.astype(np.float32), spacing)

    def log_odds(self) -> Values:
        """Return the log-odds of the foreground by nearness alone."""
        return _NEARNESS * _log_ratio(self.background, self.foreground, floor=self.scale)


def cut(
    image: Values,
    scribbles: npt.NDArray[np.uint8],
    log_odds: Values,
    options: CutOptions,
    *,
    connected: bool,
) -> _Mask:
    """Return the segment ``(x, y, z)`` of least energy.

    Args:
        image: ``(x, y, z)``, 0..1; the segment's border follows its edges.
        scribbles: ``(x, y, z)``, SCRIBBLED_FOREGROUND, SCRIBBLED_BACKGROUND or 0; the segment follows them.
        log_odds: of the foreground for each voxel by itself.
        options: of the energy.
        connected: drop parts that are not connected to a foreground scribble.
    """
    foreground = 1 / (1 + np.exp(-np.clip(log_odds, -_MAX_LOG_ODDS, _MAX_LOG_ODDS)))
    unary = make_iseg_unary(
        np.stack([1 - foreground, foreground]).astype(np.float32),
        scribbles[None],
        scribbles_bg_label=SCRIBBLED_BACKGROUND,
        scribbles_fg_label=SCRIBBLED_FOREGROUND,
    )
    found = numpymaxflow.maxflow(image[None], unary, options.lamda, options.sigma, _NEIGHBOURS)[0] > 0
    found[scribbles == SCRIBBLED_BACKGROUND] = False
    found[scribbles == SCRIBBLED_FOREGROUND] = True
    if connected:
        pieces, _ = ndimage.label(found)
        found = np.isin(pieces, np.unique(pieces[scribbles == SCRIBBLED_FOREGROUND]))
    return found


def from_scribbles(image: Values, scribbles: npt.NDArray[np.uint8], around: Surroundings, evidence: Evidence) -> Values:
    """Return log-odds ``(x, y, z)`` of the foreground by intensity and nearness; arguments as for ``cut``.

    Without a background scribble, voxels nearer to the region's edge than to the foreground are its samples.
    """
    background = scribbles == SCRIBBLED_BACKGROUND
    if not background.any():
        background = (around.background < around.foreground) & (scribbles != SCRIBBLED_FOREGROUND)
    return evidence(image, scribbles == SCRIBBLED_FOREGROUND, background) + around.log_odds()


def from_network(
    image: Values,
    scribbles: npt.NDArray[np.uint8],
    around: Surroundings,
    evidence: Evidence,
    probability: Values,
) -> Values:
    """Return log-odds ``(x, y, z)`` of the foreground from the network's ``probability``.

    Near a scribble that contradicts the network, intensity and nearness decide instead, as without a network.
    """
    own = np.log((probability + 1e-4) / (1 - probability + 1e-4))
    contradicted = ((scribbles == SCRIBBLED_FOREGROUND) & (probability < 0.5)) | (
        (scribbles == SCRIBBLED_BACKGROUND) & (probability >= 0.5)
    )
    if not contradicted.any():
        return own
    unscribbled = scribbles == 0
    foreground = (scribbles == SCRIBBLED_FOREGROUND) | ((probability > _SURE) & unscribbled)
    background = (scribbles == SCRIBBLED_BACKGROUND) | ((probability < 1 - _SURE) & unscribbled)
    drawn = evidence(image, foreground, background) + around.log_odds()
    distance = ndimage.distance_transform_edt(~contradicted, sampling=around.spacing)
    weight = np.exp(-distance / (_REACH * around.scale)).astype(np.float32)
    return weight * drawn + (1 - weight) * np.clip(own, -_MAX_LOG_ODDS, _MAX_LOG_ODDS)


def by_histogram(n_bins: int) -> Evidence:
    """Model intensities of the two sides as histograms (MONAI Label's, with its pseudo-counts)."""

    def log_odds(image: Values, foreground: _Mask, background: _Mask) -> Values:
        sides = np.where(foreground, SCRIBBLED_FOREGROUND, np.where(background, SCRIBBLED_BACKGROUND, 0))
        densities = make_likelihood_image_histogram(
            image[None], sides[None], SCRIBBLED_BACKGROUND, SCRIBBLED_FOREGROUND, num_bins=n_bins
        )
        return _log_ratio(densities[1], densities[0], floor=1e-3)

    return log_odds


def by_mixture(n_mixtures: int) -> Evidence:
    """Model intensities of the two sides as mixtures of Gaussians (Rother, Kolmogorov and Blake, GrabCut, 2004)."""

    def log_odds(image: Values, foreground: _Mask, background: _Mask) -> Values:
        steps = np.linspace(0, 1, _STEPS, dtype=np.float32)
        densities = [_density(image[side], n_mixtures, steps) for side in (foreground, background)]
        ratio = _log_ratio(densities[0], densities[1], floor=1e-3)
        return ratio[np.rint(image * (_STEPS - 1)).astype(np.intp)]

    return log_odds


def _density(samples: Values, n_mixtures: int, at: Values) -> Values:
    if samples.size == 0:
        return np.ones_like(at)
    if samples.size > _MAX_SAMPLES:
        samples = np.random.default_rng(0).choice(samples, _MAX_SAMPLES, replace=False)
    # Fewer Gaussians than distinct samples.
    n_components = int(np.clip(len(np.unique(samples)) // 4, 1, n_mixtures))
    if samples.size == 1:
        samples = np.repeat(samples, 2)
    mixture = GaussianMixture(n_components, random_state=0, reg_covar=1e-4).fit(samples.reshape(-1, 1))
    return np.exp(mixture.score_samples(at.reshape(-1, 1))).astype(np.float32)


def _log_ratio(a: Values, b: Values, *, floor: float) -> Values:
    return np.log((a + floor) / (b + floor)).astype(np.float32)
