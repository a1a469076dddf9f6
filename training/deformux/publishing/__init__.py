"""Rounds of learning: train, compare with the published model, publish the new version unless it is clearly worse."""
