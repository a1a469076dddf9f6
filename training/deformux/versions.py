"""Numbered model versions in a folder, one of them published; everything is written by rename."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from deformux.files import write_text
from deformux.weights import ModelCard, save_model

__all__ = ["ModelVersions"]


class ModelVersions:
    """Versions ``v0001.safetensors``, ``v0001.json``, … and the file ``published`` that names one of them.

    A reader follows ``published`` between requests and never meets a half-written model.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    def names(self) -> list[str]:
        """All versions, oldest first."""
        return sorted(path.stem for path in self.root.glob("v*.safetensors") if re.fullmatch(r"v\d+", path.stem))

    def path(self, name: str) -> Path:
        """The model file of a version; raises ValueError listing the versions where there is none of that name."""
        path = self.root / f"{name}.safetensors"
        if name not in self.names():
            raise ValueError(f"no version {name!r}; there are {', '.join(self.names()) or 'none yet'}")
        return path

    def write(self, network: torch.nn.Module, card: ModelCard) -> str:
        """Store a new version and return its name; it is not served before ``publish``."""
        names = self.names()
        name = f"v{int(names[-1][1:]) + 1 if names else 1:04d}"
        save_model(self.root / f"{name}.safetensors", network, card)
        return name

    def publish(self, name: str) -> None:
        """Serve this version from now on."""
        write_text(self.root / "published", self.path(name).stem + "\n")

    def published(self) -> str | None:
        """The version that is served, or None before the first."""
        pointer = self.root / "published"
        if not pointer.is_file():
            return None
        return self.path(pointer.read_text().strip()).stem
