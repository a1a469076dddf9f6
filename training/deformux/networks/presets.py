"""Sizes of DeformUX-Net by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["PRESETS", "Preset"]


@dataclass(frozen=True)
class Preset:
    """Widths of a DeformUX-Net: channels of the four stages, channels of the bottleneck, blocks per stage."""

    channels: tuple[int, int, int, int]
    hidden: int
    depths: tuple[int, int, int, int] = (2, 2, 2, 2)


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "base": Preset((48, 96, 192, 384), 768),  # the published model
        "small": Preset((24, 48, 96, 192), 384),
        "tiny": Preset((16, 32, 64, 128), 256),  # trains on a CPU
    }
)
