"""Rounds of learning: train, compare with the published model, publish a version only if it is no worse."""
