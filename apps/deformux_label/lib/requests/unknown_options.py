"""The options of a request's JSON body: known ones, and no others."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from fastapi import HTTPException

__all__ = ["CLIENT_OPTIONS", "refuse_unknown"]

CLIENT_OPTIONS = ("client_id",)
"""What every client may send with anything."""


def refuse_unknown(options: Mapping[str, Any], known: Iterable[str], what: str) -> None:
    """Refuse options that nobody reads: they would be kept and sent back with every status.

    Raises:
        HTTPException: 400 with the options there are.
    """
    valid: Collection[str] = sorted({*known, *CLIENT_OPTIONS})
    unknown = sorted(str(name) for name in options if name not in valid)
    if unknown:
        shown = ", ".join(ascii(name)[:40] for name in unknown[:3])
        raise HTTPException(400, f"{what} has no option {shown}; there are {', '.join(valid)}")
