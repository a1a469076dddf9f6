"""A JSON reader for requests, which refuses values that cannot be written again, compared or stored."""

from __future__ import annotations

import json
import math
from typing import Any

from fastapi import HTTPException

from deformux_label.lib.requests.identifiers import refuse_invalid_text

__all__ = ["MAX_NUMBER", "json_object", "read_json"]

MAX_NUMBER = 2**63
"""Whole numbers must be smaller, to fit into arrays and the database."""


def read_json(text: str | bytes, *, name: str = "the body") -> Any:
    """Parse JSON that is valid Unicode, with finite numbers, and not nested too deeply.

    Raises:
        HTTPException: 400.
    """
    try:
        text = text.decode() if isinstance(text, bytes) else text
        value = json.loads(text, parse_constant=_no_constant, parse_float=_finite, parse_int=_whole)
    except UnicodeDecodeError as error:
        raise HTTPException(400, f"{name} must be JSON in UTF-8; byte {error.start} is not") from error
    except RecursionError as error:
        raise HTTPException(400, f"{name} is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise HTTPException(400, f"{name} must be valid JSON; {error}") from error
    except ValueError as error:
        raise HTTPException(400, f"{name} holds a number that cannot be used: {error}") from error
    refuse_invalid_text(value, name=name)
    return value


def json_object(text: str | None, *, name: str = "params", most: int | None = None) -> dict[str, Any]:
    """Parse a form field that holds one JSON object; an empty one is an empty object.

    Raises:
        HTTPException: 400 for any other JSON, 413 for more than ``most`` bytes.
    """
    if not text:
        return {}
    if most is not None and len(text.encode(errors="replace")) > most:
        raise HTTPException(413, f"{name} must be at most {most} bytes of JSON; send less")
    value = read_json(text, name=name)
    if not isinstance(value, dict):
        raise HTTPException(400, f"{name} must be one JSON object; got a {type(value).__name__}")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name}; numbers must be finite")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]}; numbers must be finite")
    return value


def _whole(text: str) -> int:
    # Much longer numbers are slow to parse.
    if len(text) > 20 or not -MAX_NUMBER <= (value := int(text)) < MAX_NUMBER:
        raise ValueError(f"{text[:40]}; whole numbers must be below 2^63")
    return value
