"""The check of numbers from outside: ``--conf``, requests and trainings."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["number_between"]

_MAX_SHOWN_LENGTH = 60


def number_between(name: str, value: Any, *, low: float, high: float, whole: bool = False) -> float:
    """Return a number, or the number in a text, if it lies between two bounds, both included.

    Args:
        name: name of the value in the error.
        value: a number or its text; a boolean is not a number.
        low: least number; an int is shown without a decimal point.
        high: greatest number.
        whole: refuse fractions; the result is still a float, which ``int`` converts without loss.

    Raises:
        ValueError: any other value; the message is one sentence.
    """
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not low <= number <= high or (whole and not number.is_integer()):
        kind = "a whole number" if whole else "a number"
        raise ValueError(f"{name} must be {kind} from {_shown_bound(low)} to {_shown_bound(high)}; got {_shown(value)}")
    return number


def _shown_bound(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def _shown(value: Any) -> str:
    """Return a value for a message: quoted if it is text, shortened if it is long."""
    return repr(value[:_MAX_SHOWN_LENGTH]) if isinstance(value, str) else repr(value)[:_MAX_SHOWN_LENGTH]
