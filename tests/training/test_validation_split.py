"""Which cases validate: an assignment only grows, and survives damage to its file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from deformux.publishing.validation_split import Assignment


def sides(path: Path, ids: list[str]) -> dict[str, bool]:
    assignment = Assignment(path)
    return {case: assignment.validates(case) for case in ids}


@pytest.mark.parametrize("seed", range(20))
def test_assignments_only_grow_and_both_sides_always_have_cases(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    path, labelled, before = tmp_path / "assignment.json", [], {}
    names = [f"patient-{number}" for number in rng.permutation(1000)[:60]]
    while names:
        arrived = [names.pop() for _ in range(min(len(names), int(rng.integers(1, 8))))]
        labelled += arrived
        # A new object each time, as in a new process; the order of the listing does not matter.
        Assignment(path).assign(rng.permutation(labelled).tolist())
        now = sides(path, labelled)
        assert before.items() <= now.items(), "an assignment changed"
        before = now
        validating = sum(now.values())
        if len(labelled) < 5:
            assert validating == 0
        else:
            assert len(labelled) // 5 <= validating < len(labelled)
    # A fifth by the hash, and a few more that were needed early; never the half.
    assert 12 <= sum(before.values()) <= 24


def test_an_assignment_outlives_the_rule_that_made_it(tmp_path: Path) -> None:
    path = tmp_path / "assignment.json"
    path.write_text('{"cases": {"x": "validation", "y": "training"}}')
    Assignment(path).assign(["x", "y", "z"])
    assert sides(path, ["x", "y", "z"]) == {"x": True, "y": False, "z": False}
    with pytest.raises(KeyError):
        Assignment(path).validates("never seen")


def test_when_the_validation_labels_are_deleted_new_cases_take_over(tmp_path: Path) -> None:
    path = tmp_path / "assignment.json"
    first = [f"c{number}" for number in range(8)]
    Assignment(path).assign(first)
    remaining = [case for case, validates in sides(path, first).items() if not validates]
    assert len(remaining) >= 4
    Assignment(path).assign([*remaining, "new"])
    assert Assignment(path).validates("new")


def test_a_damaged_assignment_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "assignment.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"assignment\.json is damaged"):
        Assignment(path).assign(["a"])
    assert path.read_text() == "{"


@pytest.mark.parametrize("text", [None, "", "{", '{"cases": {"a": "testing"}}', '{"cases": 3}', "[]"])
def test_a_damaged_assignment_is_read_from_its_copy(text: str | None, tmp_path: Path) -> None:
    path, cases = tmp_path / "assignment.json", [f"c{number}" for number in range(9)]
    Assignment(path).assign(cases)
    before = sides(path, cases)
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    Assignment(path).assign([*cases, "new"])
    assert sides(path, cases) == before
    # A flipped word is as wrong as a cut one.
    path.write_text(path.read_text().replace('"c1": "training"', '"c1": "validation"', 1))
    assert sides(path, cases) == before


def test_without_both_assignments_the_cards_say_who_trained(tmp_path: Path) -> None:
    path = tmp_path / "assignment.json"
    known = {"x": "validation", "y": "training"}
    assignment = Assignment(path, lambda: known)
    assignment.assign(["x", "y", "z"])
    assert sides(path, ["x", "y", "z"]) == {"x": True, "y": False, "z": False}
    for file in tmp_path.glob("*.json"):
        file.write_text("{")
    assignment.assign(["x", "y", "z"])
    assert sides(path, ["x", "y", "z"]) == {"x": True, "y": False, "z": False}
    # Nothing was trained yet: nothing can be mixed.
    for file in tmp_path.glob("*.json"):
        file.write_text("{")
    Assignment(path, dict).assign(["z"])
    assert sides(path, ["z"]) == {"z": False}
