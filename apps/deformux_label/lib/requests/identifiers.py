"""Checks of names from outside: image ids, tags, revisions, versions and other text.

Every name from a request, an uploaded file or a file name is checked here before it is used.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from fastapi import HTTPException

__all__ = [
    "MAX_NAME_LENGTH",
    "checked_image_id",
    "checked_revision",
    "checked_sequence",
    "checked_tag",
    "checked_text",
    "checked_version",
    "is_image_id",
    "is_tag",
    "is_text",
    "refuse_invalid_text",
]

# Bytes of UTF-8: with a suffix and the prefix of a temporary file, a name still fits into the 255 bytes of a file name.
MAX_NAME_LENGTH = 200
_MAX_TEXT_LENGTH = 1_000
_DEEPEST = 32
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_VERSION = re.compile(r"v[0-9]{4,9}")
_LAST_REVISION = 999_999_999


def is_text(value: object, most: int = _MAX_TEXT_LENGTH) -> bool:
    """Return whether a value is Unicode text of at most ``most`` bytes without control characters or surrogates."""
    if not isinstance(value, str):
        return False
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        return False
    return size <= most and not any(unicodedata.category(character) == "Cc" for character in value)


def is_image_id(value: object) -> bool:
    """Return whether a value can be an image id: text that is also the name of a visible file in any folder."""
    return (
        is_text(value, MAX_NAME_LENGTH)
        and isinstance(value, str)
        and value.strip() == value != ""
        and not value.startswith(".")
        and not {"/", "\\"} & set(value)
    )


def checked_image_id(value: object, *, status: int = 400) -> str:
    """Return a valid image id; raise HTTPException with ``status`` (404 for a lookup) for an invalid one."""
    if not is_image_id(value):
        raise HTTPException(
            status,
            f"{_shown(value)} cannot be an image id; use a name of at most {MAX_NAME_LENGTH} bytes without path "
            "separators, control characters or a dot in front",
        )
    return str(value)


def checked_sequence(value: object) -> str:
    """Return the valid number or name of a sequence of an image; raise HTTPException 404 for an invalid one."""
    if not is_text(value, MAX_NAME_LENGTH) or not value:
        raise HTTPException(404, f"{_shown(value)} is not a sequence; give its number, from 0, or its name")
    return str(value)


def is_tag(value: object) -> bool:
    """Return whether a value can be a label tag."""
    return isinstance(value, str) and _TAG.fullmatch(value) is not None


def checked_tag(value: object) -> str:
    """Return a valid label tag; raise HTTPException 400 for an invalid one."""
    if not isinstance(value, str) or not is_tag(value):
        raise HTTPException(400, f"{_shown(value)} cannot be a label tag; use up to 64 letters, digits, - and _")
    return str(getattr(value, "value", value))


def checked_version(value: object) -> str:
    """Return the valid name of a model version; raise HTTPException 404 for an invalid one."""
    if not isinstance(value, str) or not _VERSION.fullmatch(value):
        raise HTTPException(404, f"{_shown(value)} is not a model version; their names are such as v0001")
    return value


def checked_revision(value: object) -> int:
    """Return the valid number of a label's revision; raise HTTPException 404 for an invalid one."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _LAST_REVISION:
        raise HTTPException(404, f"{_shown(value)} is not a revision; they are numbered 1, 2, …")
    return value


def checked_text(name: str, value: object, most: int = _MAX_TEXT_LENGTH) -> str:
    """Return the text of the field ``name``; raise HTTPException 400 for anything else."""
    if not is_text(value, most):
        raise HTTPException(
            400, f"{name} must be text of at most {most} bytes without control characters; got {_shown(value)}"
        )
    return str(value)


def refuse_invalid_text(value: Any, *, name: str = "params") -> None:
    """Refuse JSON with strings or keys that are not valid Unicode, or that is nested too deeply to be written again.

    Raises:
        HTTPException: 400.
    """
    todo: list[tuple[Any, int]] = [(value, 0)]
    while todo:
        item, depth = todo.pop()
        if depth > _DEEPEST:
            raise HTTPException(400, f"{name} must not be nested more than {_DEEPEST} levels deep")
        if isinstance(item, str):
            _refuse_surrogates(item, name)
        elif isinstance(item, Mapping):
            for key in item:
                _refuse_surrogates(str(key), name)
            todo += [(inner, depth + 1) for inner in item.values()]
        elif isinstance(item, list | tuple):
            todo += [(inner, depth + 1) for inner in item]


def _refuse_surrogates(text: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise HTTPException(400, f"{name} must be valid Unicode; got {_shown(text)}") from error


def _shown(value: object, most: int = 60) -> str:
    """Return a value as ASCII, so that the message can be sent whatever was received."""
    text = ascii(value)
    return text if len(text) <= most else f"{text[:most]}…"
