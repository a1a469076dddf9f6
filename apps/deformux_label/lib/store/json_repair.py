"""Repair of JSON from files that may have been edited by hand, so that it can be written and sent again."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["repaired"]

_DEEPEST = 32


def repaired(value: Any, depth: int = 0) -> Any:
    """Return JSON in which every text is valid Unicode and every number finite.

    Half a surrogate pair becomes ``?``: earlier versions accepted them from clients. NaN and infinity become None.

    Raises:
        ValueError: it is nested deeper than anything that this server writes.
    """
    if depth > _DEEPEST:
        raise ValueError(f"it is nested more than {_DEEPEST} levels deep")
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {repaired(str(key), depth): repaired(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [repaired(item, depth + 1) for item in value]
    return value
