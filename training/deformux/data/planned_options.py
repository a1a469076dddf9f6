"""The options that a plan fills in where they are ``auto``: their texts, and the values that they stand for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from deformux.data.planning import Choices
from deformux.data.preprocessing import Preprocessing

__all__ = ["AUTO", "choices_from_options", "choices_to_options", "chosen_preprocessing"]

AUTO = "auto"
"""Text that leaves an option to the plan."""
NATIVE = "native"


def choices_from_options(texts: Mapping[str, str]) -> Choices:
    """Return what a user decided by the options modality, preset, spacing, patch_size, window, percentiles and frame.

    Raises:
        ValueError: a value is out of range or cannot be read; the message names the valid ones.
    """
    given = {name: text for name, text in texts.items() if text != AUTO}
    values: dict[str, Any] = {name: given[name] for name in ("modality", "frame", "preset") if name in given}
    if "spacing" in given:
        spacing = "three sizes in mm such as 1.5,1.5,2, or native, or auto"
        text = given["spacing"]
        values["spacing_mm"] = NATIVE if text == NATIVE else _numbers("spacing", text, float, 3, spacing)
    if "patch_size" in given:
        sizes = "three whole numbers such as 96,96,96, or auto"
        values["patch_size"] = _numbers("patch size", given["patch_size"], int, 3, sizes)
    for option, name, what in (
        ("window", "window_hu", "two numbers in HU such as -175,250, or auto"),
        ("percentiles", "percentiles", "two numbers such as 0.5,99.5, or auto"),
    ):
        if option in given:
            values[name] = _numbers(option, given[option], float, 2, what)
    choices = Choices(**values)
    # Refuses what is out of range.
    chosen_preprocessing(choices, Preprocessing())
    return choices


def choices_to_options(choices: Choices) -> dict[str, str]:
    """Return texts from which ``choices_from_options`` makes the same choices."""
    spacing = choices.spacing_mm
    return {
        "modality": choices.modality or AUTO,
        "preset": choices.preset or AUTO,
        "spacing": spacing if isinstance(spacing, str) else _text(spacing),
        "patch_size": _text(choices.patch_size),
        "window": _text(choices.window_hu),
        "percentiles": _text(choices.percentiles),
        "frame": choices.frame or AUTO,
    }


def chosen_preprocessing(choices: Choices, otherwise: Preprocessing) -> Preprocessing:
    """Return a preprocessing with what the user decided; raise ValueError if a value is out of range."""
    names = ("modality", "window_hu", "percentiles", "frame", "patch_size")
    values = {name: value for name in names if (value := getattr(choices, name)) is not None}
    if choices.spacing_mm is not None:
        values["spacing_mm"] = None if choices.spacing_mm == NATIVE else choices.spacing_mm
    return Preprocessing.from_dict({**otherwise.to_dict(), **values})


def _numbers(name: str, text: str, kind: Callable[[str], Any], count: int, expected: str) -> tuple[Any, ...]:
    try:
        values = tuple(kind(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != count:
        raise ValueError(f"{name} must be {expected}; got {text!r}")
    return values


def _text(values: tuple[float, ...] | None) -> str:
    return AUTO if values is None else ",".join(f"{value:g}" for value in values)
