"""Names of the strategies that choose what to label next; importing them is light."""

from __future__ import annotations

__all__ = ["NEEDS_SCORES", "STRATEGIES"]

STRATEGIES = ("adaptive", "random", "typicality", "uncertainty", "entropy", "bald", "stochastic_batch")
NEEDS_SCORES = ("adaptive", "uncertainty", "entropy", "bald", "stochastic_batch")
"""Strategies that look at predictions of a trained model."""
