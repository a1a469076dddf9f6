"""What a user decides of a plan, typed as options."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from deformux.data.preprocessing import Preprocessing

__all__ = ["AUTO", "Choices"]

_Triple: TypeAlias = tuple[float, float, float]

AUTO = "auto"
"""Leaves a choice to the plan."""


@dataclass(frozen=True)
class Choices:
    """What the user decided; None leaves a choice to the plan. ``native`` keeps each scan's own spacing.

    Args:
        modality, window_hu, percentiles, frame, spacing_mm, patch_size, keep_largest: as in ``Preprocessing``.
        preset: size of the network.
        batch_size: patches of a step.
    """

    modality: str | None = None
    window_hu: tuple[float, float] | None = None
    percentiles: tuple[float, float] | None = None
    frame: str | None = None
    spacing_mm: _Triple | Literal["native"] | None = None
    patch_size: tuple[int, int, int] | None = None
    preset: str | None = None
    batch_size: int | None = None
    keep_largest: bool | None = None

    @classmethod
    def from_options(
        cls,
        *,
        modality: str = AUTO,
        spacing: str = AUTO,
        patch_size: str = AUTO,
        window: str = AUTO,
        percentiles: str = AUTO,
        frame: str = AUTO,
        keep_largest: str = AUTO,
        preset: str = AUTO,
    ) -> Choices:
        """Parse what a user types; ``auto`` and nothing leave a choice to the plan.

        Raises:
            ValueError: as for ``Preprocessing.from_options``.
        """
        typed = {
            "modality": modality,
            "spacing": spacing,
            "patch_size": patch_size,
            "window": window,
            "percentiles": percentiles,
            "frame": frame,
            "keep_largest": keep_largest,
        }
        typed = {name: text.strip() for name, text in typed.items() if text.strip() not in ("", AUTO)}
        usual = {"modality": Preprocessing().modality, "spacing": "native", "patch_size": "96,96,96"}
        checked = Preprocessing.from_options(**{**usual, **typed})
        fields = {"spacing": "spacing_mm", "window": "window_hu"}
        found: dict[str, Any] = {fields.get(name, name): getattr(checked, fields.get(name, name)) for name in typed}
        if "spacing" in typed and checked.spacing_mm is None:
            found["spacing_mm"] = "native"
        named = preset.strip() if preset.strip() not in ("", AUTO) else None
        return cls(**found, preset=named)

    def to_options(self) -> dict[str, str]:
        """Return texts from which ``from_options`` makes the same choices but the batch size."""
        spacing = self.spacing_mm
        return {
            "modality": self.modality or AUTO,
            "preset": self.preset or AUTO,
            "spacing": spacing if isinstance(spacing, str) else _text(spacing),
            "patch_size": _text(self.patch_size),
            "window": _text(self.window_hu),
            "percentiles": _text(self.percentiles),
            "frame": self.frame or AUTO,
            "keep_largest": AUTO if self.keep_largest is None else "yes" if self.keep_largest else "no",
        }

    def applied_to(self, prep: Preprocessing) -> Preprocessing:
        """Return a preprocessing in which the user's choices replace others."""
        names = ("modality", "window_hu", "percentiles", "frame", "patch_size", "keep_largest")
        changes: dict[str, Any] = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.spacing_mm is not None:
            changes["spacing_mm"] = None if self.spacing_mm == "native" else self.spacing_mm
        if self.keep_largest is False or self.frame not in (None, prep.frame):
            changes["labels_center"] = None
        return dataclasses.replace(prep, **changes)

    @property
    def fixes_the_patch(self) -> bool:
        """Return whether the speed of the device, by which patch and spacing are planned, does not matter."""
        return self.spacing_mm is not None and self.patch_size is not None

    @property
    def decided(self) -> tuple[str, ...]:
        """Return the names of what the user decided."""
        return tuple(field.name for field in dataclasses.fields(self) if getattr(self, field.name) is not None)


def _text(values: tuple[float, ...] | None) -> str:
    # All digits: what a user typed must come back as it was.
    return AUTO if values is None else ",".join(str(int(v)) if v == int(v) else repr(v) for v in values)
