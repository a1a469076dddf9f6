"""The network that requests are answered with."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from deformux.network import DeformUXNet
from deformux.versions import ModelVersions
from deformux.weights import ModelCard, load_model, pretrained_path, with_guidance

from .configs.project import Project

__all__ = ["ServedModels"]

logger = logging.getLogger(__name__)


class ServedModels:
    """The published version of a project, looked up at each call; before the first, the pretrained model.

    ``pretrained`` is the file of the latter, or None where it does not know this project's labels.
    """

    def __init__(self, project: Project, state_folder: Path) -> None:
        self.project = project
        self.versions = ModelVersions(state_folder / "versions")
        self.pretrained = _servable_pretrained(project)
        self._loaded: dict[str, tuple[str, DeformUXNet, ModelCard]] = {}
        self._lock = threading.Lock()

    def current(self) -> str | None:
        """Name of the model to serve now, or None while there is none."""
        try:
            published = self.versions.published()
        except ValueError as error:
            logger.error("The published model cannot be served: %s", error)
            published = None
        if published is not None:
            return published
        return f"pretrained-{self.project.pretrained}" if self.pretrained else None

    def path(self, name: str) -> Path:
        """The model file behind a name that ``current`` gave."""
        if self.pretrained and name == f"pretrained-{self.project.pretrained}":
            return self.pretrained
        return self.versions.path(name)

    def load(self, name: str, device: str) -> tuple[DeformUXNet, ModelCard]:
        """Network, able to take clicks, and card of a model; the last one of each device stays in memory.

        Raises:
            InvalidModel: a file is missing or damaged.
        """
        with self._lock:
            held = self._loaded.get(device)
            if held is None or held[0] != name:
                network, card = load_model(self.path(name), device=device)
                held = (name, with_guidance(network), card)
                self._loaded[device] = held
                logger.info("Serving model %s on %s", name, device)
            return held[1], held[2]


def _servable_pretrained(project: Project) -> Path | None:
    """Pretrained weights answer requests only where they know this project's labels; otherwise they are a start."""
    if project.pretrained is None:
        return None
    path = pretrained_path(project.pretrained)
    card = ModelCard.from_json(path.with_suffix(".json").read_text())
    same = card.labels == project.labels and card.preprocessing.modality == project.preprocessing.modality
    return path if same else None
