"""Models that come with this package."""

from __future__ import annotations

from pathlib import Path

__all__ = ["PRETRAINED", "pretrained_path"]

_FOLDER = Path(__file__).parents[1] / "pretrained"
PRETRAINED = tuple(sorted(path.stem for path in _FOLDER.glob("*.safetensors")))


def pretrained_path(name: str) -> Path:
    """Return the model file of a shipped model; raise ValueError listing the valid names on any other."""
    if name not in PRETRAINED:
        raise ValueError(f"pretrained must be one of {', '.join(PRETRAINED)}; got {name!r}")
    return _FOLDER / f"{name}.safetensors"
