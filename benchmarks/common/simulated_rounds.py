"""The rounds of a simulation in its data file, which names each labelled volume once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.report import read_data

from deformux.active_learning.learning_curve import SimulatedRound

__all__ = ["from_rows", "read_simulation", "to_rows"]


def read_simulation(file: Path) -> list[SimulatedRound]:
    """Read the rounds of a data file."""
    return from_rows(read_data(file.parents[1], file.stem)["rounds"])


def to_rows(rounds: Sequence[SimulatedRound]) -> list[dict[str, Any]]:
    """Return rounds as a data file holds them: each with the volumes that the round before did not have.

    Args:
        rounds: those of one strategy and seed follow each other, in order; each extends the volumes of the one before.
    """
    rows, before = [], ()
    for each in rounds:
        if each.round == 0:
            before = ()
        assert each.labelled[: len(before)] == before, "a round extends the volumes of the one before"
        rows.append(
            {
                "strategy": each.strategy,
                "seed": each.seed,
                "round": each.round,
                "mean_dice": round(each.mean_dice, 6),
                "dice": [round(value, 6) for value in each.dice],
                "seconds": round(each.seconds, 1),
                "added": each.labelled[len(before) :],
            }
        )
        before = each.labelled
    return rows


def from_rows(rows: Sequence[Mapping[str, Any]]) -> list[SimulatedRound]:
    """Return the rounds of a data file."""
    rounds, labelled = [], ()
    for row in rows:
        labelled = (*(labelled if row["round"] else ()), *row["added"])
        values = {name: row[name] for name in ("strategy", "seed", "round", "mean_dice", "seconds")}
        rounds.append(SimulatedRound(labelled=labelled, dice=tuple(row["dice"]), **values))
    return rounds
