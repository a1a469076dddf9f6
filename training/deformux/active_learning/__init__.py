"""Active learning: how unsure a model is of a volume, which volumes stand for others, and which to label next."""

from deformux.selection.choice import NEEDS_SCORES, STRATEGIES, choose, coldness, power_noise, stochastic_batch
from deformux.selection.diversity import diverse_batch, standardised, typical_batch, typicality
from deformux.selection.observation import Observation, encode, mirrorings, observe
from deformux.selection.scores import (
    VolumeScores,
    label_uncertainty,
    score_samples,
    volume_uncertainty,
    voxel_entropy,
)

__all__ = [
    "NEEDS_SCORES",
    "STRATEGIES",
    "Observation",
    "VolumeScores",
    "choose",
    "coldness",
    "diverse_batch",
    "encode",
    "label_uncertainty",
    "mirrorings",
    "observe",
    "power_noise",
    "score_samples",
    "standardised",
    "stochastic_batch",
    "typical_batch",
    "typicality",
    "volume_uncertainty",
    "voxel_entropy",
]
