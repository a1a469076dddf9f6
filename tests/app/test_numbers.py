"""The check of numbers from outside."""

from __future__ import annotations

from typing import Any

import pytest

from deformux_label.lib.configs.numbers import number_between


@pytest.mark.parametrize(("value", "number"), [(0, 0), (2.5, 2.5), ("2.5", 2.5), (" 7 ", 7), ("1e1", 10)])
def test_numbers_and_their_text_are_taken(value: Any, number: float) -> None:
    assert number_between("sigma", value, low=0, high=10) == number


@pytest.mark.parametrize("value", [-1, 11, "nan", float("inf"), "many", True, None, [1], {}, 10**400, "9" * 5000])
def test_anything_else_is_refused_in_one_sentence(value: Any) -> None:
    with pytest.raises(ValueError, match="sigma must be a number from 0 to 10; got ") as error:
        number_between("sigma", value, low=0, high=10)
    assert len(str(error.value)) < 120


def test_whole_numbers() -> None:
    assert number_between("steps", "8.0", low=1, high=1_000_000, whole=True) == 8
    with pytest.raises(ValueError, match=r"^steps must be a whole number from 1 to 1000000; got 2\.5$"):
        number_between("steps", 2.5, low=1, high=1_000_000, whole=True)
    with pytest.raises(ValueError, match=r"^rate must be a number from 1e-08 to 1; got 'x'$"):
        number_between("rate", "x", low=1e-8, high=1.0)
