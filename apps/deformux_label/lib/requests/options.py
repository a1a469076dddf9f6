"""Checks of single options, for all kinds of requests."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from fastapi import HTTPException
from monailabel.utils.others.generic import device_map, name_to_device

from deformux_label.lib.configs.numbers import number_between
from deformux_label.lib.requests.identifiers import checked_text

__all__ = [
    "CLIENT_OPTIONS",
    "checked_device",
    "checked_gpus",
    "checked_number",
    "chosen",
    "known",
    "one_of",
    "refuse_unknown",
    "with_checked_client",
]

CLIENT_OPTIONS = ("client_id",)
"""Options that a client may send with any request."""


def known(kind: str, name: Any, present: Mapping[str, Any]) -> Any:
    """Return the task called ``name``; raise HTTPException 404 with the valid names."""
    task = present.get(name) if isinstance(name, str) else None
    if task is None:
        raise HTTPException(404, f"there is no {kind} {name!r}; there {_is_or_are(list(present))}")
    return task


def refuse_unknown(options: Mapping[str, Any], known: Iterable[str], what: str) -> None:
    """Refuse unknown options: they would be stored and sent back with every status.

    Raises:
        HTTPException: 400 with the valid options.
    """
    valid = sorted({*known, *CLIENT_OPTIONS})
    unknown = sorted(str(name) for name in options if name not in valid)
    if unknown:
        shown = ", ".join(ascii(name)[:40] for name in unknown[:3])
        raise HTTPException(400, f"{what} has no option {shown}; its options are {', '.join(valid)}")


def checked_device(value: Any) -> str:
    """Return torch's name of a device that the server listed, the default one for None; raise HTTPException 400."""
    name = chosen(value)
    device = name_to_device(name if isinstance(name, str) else None)
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise HTTPException(
            400, f"device must be one of {', '.join(dict.fromkeys((*device_map(), 'cpu')))}; got {name!r}"
        )
    return device


def checked_gpus(value: Any) -> str:
    """Return the GPUs that a request chooses, ``all`` or numbers such as ``0,1``; raise HTTPException 400."""
    value = value[0] if isinstance(value, list) and value else value
    if value in (None, "", "all"):
        return "all"
    if not isinstance(value, str) or not re.fullmatch(r"[0-9]{1,3}(,[0-9]{1,3}){0,31}", value):
        raise HTTPException(400, f"gpus must be all, or numbers such as 0,1; got {ascii(value)[:60]}")
    return value


def checked_number(name: str, value: Any, *, low: float, high: float, whole: bool = False) -> float:
    """Return the number of an option like ``number_between``; raise HTTPException 400."""
    try:
        return number_between(name, value, low=low, high=high, whole=whole)
    except ValueError as error:
        raise HTTPException(400, str(error)) from error


def chosen(value: Any) -> Any:
    """Return the value of an option offered as a list: Slicer sends its first item, other clients may send all."""
    return value[0] if isinstance(value, list) and value else value


def one_of(name: str, value: Any, valid: Sequence[str]) -> str:
    """Return the value of an option; raise HTTPException 400 with the valid ones."""
    if value not in valid:
        raise HTTPException(400, f"{name} must be one of {', '.join(valid)}; got {value!r}")
    return str(value)


def with_checked_client(params: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the parameters; raise HTTPException 400 for a client id that is not text."""
    given = dict(params or {})
    for name in CLIENT_OPTIONS:
        if given.get(name) is not None:
            checked_text(name, given[name])
    return given


def _is_or_are(names: list[str]) -> str:
    return f"is only {names[0]}" if len(names) == 1 else f"are {', '.join(names) or 'none'}"
