"""JSON files with a checksum, and important ones with a second copy."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from deformux.data.atomic_files import write_text

__all__ = ["copy_of", "read_checked", "read_kept_twice", "write_checked", "write_kept_twice"]

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

# At the end of the text, so that it can be cut off without rewriting the rest.
_CHECKSUM = re.compile(r',?\s*"sha256": "([0-9a-f]{64})"\s*\}\s*\Z')
_DAMAGE = (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError)


def write_checked(path: Path, values: Mapping[str, Any], *, indent: int | None = None) -> None:
    """Replace a JSON file atomically; its last key, ``sha256``, is the checksum of everything before it."""
    body = json.dumps(values, indent=indent)[:-1].rstrip()
    comma = ", " if values else ""
    write_text(path, f'{body}{comma}"sha256": "{_checksum(body)}"}}\n')


def read_checked(path: Path, parse: Callable[[dict[str, Any]], _T]) -> _T:
    """Read a file of ``write_checked``; one without a checksum, as older versions wrote it, is only parsed.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: it is unreadable or damaged, or ``parse`` refuses it.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text)
        found = _CHECKSUM.search(text)
        if found is not None:
            if _checksum(text[: found.start()]) != found[1]:
                raise ValueError("its checksum does not match")
            values.pop("sha256", None)
        return parse(values)
    except FileNotFoundError:
        raise
    except _DAMAGE as error:
        raise ValueError(f"{path.name} is damaged ({_short(error)})") from error


def kept_or_made(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the JSON object that a file keeps; without one, or with a damaged one, make and keep it first."""
    try:
        return read_checked(path, dict)
    except FileNotFoundError:
        pass
    except ValueError as error:
        logger.warning("What was kept is lost, and is made anew: %s", error)
    write_checked(path, make())
    return read_checked(path, dict)


def copy_of(path: Path) -> Path:
    """Return the path of a file's second copy."""
    return path.with_suffix(f".copy{path.suffix}")


def write_kept_twice(path: Path, values: Mapping[str, Any], *, indent: int | None = None) -> None:
    """Replace a file, then its copy; a damaged file is kept as ``*.damaged.json`` first.

    A copy that cannot be written is only logged: the change itself was made.
    """
    _set_aside(path)
    write_checked(path, values, indent=indent)
    try:
        write_checked(copy_of(path), values, indent=indent)
    except OSError as error:
        logger.warning("The second copy of %s cannot be written: %s", path.name, error)


def read_kept_twice(path: Path, parse: Callable[[dict[str, Any]], _T]) -> tuple[_T | None, str | None]:
    """Read a file, or its copy if the file is damaged or missing, and say what is wrong.

    Returns:
        (values, None) from a good file, (values, fault) from its copy, (None, fault) if both are damaged,
        (None, None) if neither exists.
    """
    try:
        return read_checked(path, parse), None
    except FileNotFoundError:
        fault = f"{path.name} is missing"
        missing = True
    except ValueError as error:
        fault = str(error)
        missing = False
    try:
        return read_checked(copy_of(path), parse), f"{fault}; its copy {copy_of(path).name} is used"
    except FileNotFoundError:
        return None, None if missing else f"{fault}, and there is no copy"
    except ValueError as error:
        return None, f"{fault}, and {error}"


def _set_aside(path: Path) -> None:
    try:
        read_checked(path, dict)
    except FileNotFoundError:
        return
    except ValueError as error:
        aside = path.with_suffix(f".damaged{path.suffix}")
        logger.error("%s; it is kept as %s and rewritten", error, aside.name)
        os.replace(path, aside)


def _checksum(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()


def _short(error: BaseException, most: int = 100) -> str:
    text = f"{type(error).__name__}: {error}"
    return text if len(text) <= most else f"{text[:most]}…"
