"""The folders that benchmarks read and write."""

from __future__ import annotations

from pathlib import Path

__all__ = ["CT", "DATA", "HIPPOCAMPUS", "RESULTS", "WORK"]

_REPOSITORY = Path(__file__).parents[2]
DATA = _REPOSITORY.parent / "shared" / "data"

RESULTS = _REPOSITORY / "benchmarks" / "results"
# Ignored by git: locks, checkpoints, models, and trials that are not in a data file yet.
WORK = _REPOSITORY / "runs" / "benchmarks"
# Default inputs; every command takes other folders.
HIPPOCAMPUS = DATA / "hippocampus"
CT = DATA / "ct"
