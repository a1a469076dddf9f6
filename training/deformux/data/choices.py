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
        modality, window_hu, percentiles, frame, spacing_mm, patch_size: as in ``Preprocessing``.
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
        preset: str = AUTO,
        batch_size: int | None = None,
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
        }
        typed = {name: text.strip() for name, text in typed.items() if text.strip() not in ("", AUTO)}
        usual = {"modality": Preprocessing().modality, "spacing": "native", "patch_size": "96,96,96"}
        checked = Preprocessing.from_options(**{**usual, **typed})
        fields = {"spacing": "spacing_mm", "window": "window_hu"}
        found: dict[str, Any] = {fields.get(name, name): getattr(checked, fields.get(name, name)) for name in typed}
        if "spacing" in typed and checked.spacing_mm is None:
            found["spacing_mm"] = "native"
        named = preset.strip() if preset.strip() not in ("", AUTO) else None
        return cls(**found, preset=named, batch_size=batch_size)

    @property
    def decided(self) -> tuple[str, ...]:
        """Return the names of what the user decided."""
        return tuple(field.name for field in dataclasses.fields(self) if getattr(self, field.name) is not None)
