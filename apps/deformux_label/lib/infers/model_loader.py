"""The served model: its version, network and card."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn

from deformux.data.planning import Plan
from deformux.inference.captured_network import CapturedNetwork, prepared
from deformux.inference.locate import Locator
from deformux.inference.locator_file import load_locator
from deformux.networks.blocks import DeformableMixer
from deformux.networks.deformux_net import PUBLISHED_STRIDES, DeformUXNet
from deformux.networks.model_file import InvalidModel, ModelCard, load_model, with_guidance
from deformux.networks.pretrained import pretrained_path
from deformux.publishing.model_versions import ModelVersions
from deformux.publishing.project_plan import last_plan
from deformux_label.lib.configs.project import Project
from deformux_label.lib.infers.cancellation import raise_if_client_gone

__all__ = ["ServedModels"]

logger = logging.getLogger(__name__)

_Module = TypeVar("_Module", bound=nn.Module)


class ServedModels:
    """The published version of a project, looked up at each call; before the first, the pretrained model.

    If the published version is damaged, the previous one is served, and ``warning`` and ``warnings`` report it.
    ``pretrained`` is the file of the pretrained model, or None if it has different labels.
    """

    def __init__(self, project: Project, state_folder: Path) -> None:
        self.project = project
        self.versions = ModelVersions(state_folder / "versions")
        self.plan_folder = state_folder / "plan"
        self.pretrained = _servable_pretrained(project)
        self._loaded: dict[str, tuple[str, DeformUXNet, ModelCard]] = {}
        self._prepared: dict[str, tuple[DeformUXNet, Callable[..., Tensor]]] = {}
        self._locators: dict[str, tuple[str, Locator | None]] = {}
        self._lock = threading.Lock()
        self._logged: set[str] = set()

    def current(self) -> str | None:
        """Return the name of the model to serve now, or None without a model."""
        published = self.versions.published()
        if published is not None:
            return published
        return self._pretrained_name if self.pretrained else None

    def untrained_plan(self) -> Plan:
        """Return network and input for what is done without a model: the last plan, else what the user decided."""
        fixed = Plan(self.project.preprocessing, self.project.preset, PUBLISHED_STRIDES, {}, {})
        return last_plan(self.plan_folder) or fixed

    def warnings(self) -> list[str]:
        """Return one sentence for each fault of the models or their record, and log new ones."""
        found = self.versions.warnings()
        if found and self.versions.published() is None:
            found.append(self._fallback())
        # Versions that are served, or should be, are already named.
        faults = [fault for fault in self.versions.damaged(quick=True).values() if not any(fault in t for t in found)]
        found += [f"a model version is damaged: {fault}" for fault in faults]
        for text in found:
            if text not in self._logged:
                logger.error("The models: %s", text)
        self._logged = set(found)
        return found

    def warning(self, name: str | None) -> str | None:
        """Return why a reply's model may not be the published one, else None."""
        doubt = self.versions.doubt()
        if doubt is None or name == self.versions.intended() != self.versions.published():
            return None
        return doubt if name is not None and name in self.versions.names() else f"{doubt}; {self._fallback()}"

    def check(self) -> None:
        """Read all versions, so that damage is found and logged before a request needs one."""
        self.versions.damaged()
        self.warnings()

    def _fallback(self) -> str:
        answers = f"the pretrained model {self.project.pretrained} answers" if self.pretrained else "no model answers"
        return f"no version of this project's own can be served: {answers}"

    def _read(self, name: str, device: str) -> tuple[DeformUXNet, ModelCard]:
        try:
            return load_model(self.path(name), device=device)
        except InvalidModel as error:
            self.versions.distrust(name, str(error))
            # Without the folder, because clients see this sentence.
            raise InvalidModel(self.versions.fault(name) or str(error)) from error

    @property
    def _pretrained_name(self) -> str:
        return f"pretrained-{self.project.pretrained}"

    def path(self, name: str) -> Path:
        """Return the model file of a name that ``current`` returned."""
        if self.pretrained and name == self._pretrained_name:
            return self.pretrained
        return self.versions.path(name)

    def load(self, name: str, device: str) -> tuple[DeformUXNet, ModelCard]:
        """Return the network of a model, extended to take clicks, and its card; cache the last one for each device.

        Raises:
            InvalidModel: a file is missing or damaged.
        """
        with self._lock:
            held = self._loaded.get(device)
            if held is None or held[0] != name:
                network, card = self._read(name, device)
                held = (name, _ending_early(with_guidance(network)), card)
                self._loaded[device] = held
                logger.info("Serving model %s on %s", name, device)
            return held[1], held[2]

    def network(self, name: str, device: str) -> Callable[..., Tensor]:
        """Return the network of a model for inference, captured on a GPU; cache the last one for each device.

        Raises:
            InvalidModel: a file is missing or damaged.
        """
        network, _ = self.load(name, device)
        with self._lock:
            held = self._prepared.get(device)
            if held is None or held[0] is not network:
                if held is not None and isinstance(held[1], CapturedNetwork):
                    held[1].close()
                held = self._prepared[device] = (network, prepared(network, device))
            return held[1]

    def locator(self, name: str, device: str) -> Locator | None:
        """Return the locator of a model; None if it has none, or a damaged one, which is logged.

        Raises:
            InvalidModel: a file of the model itself is missing or damaged.
        """
        _, card = self.load(name, device)
        with self._lock:
            held = self._locators.get(device)
            if held is None or held[0] != name:
                try:
                    found = load_locator(self.path(name), card, device=device)
                except InvalidModel as error:
                    logger.warning("Large scans are segmented without a locator, which is slower: %s", error)
                    found = None
                if found is not None and isinstance(found.network, nn.Module):
                    _ending_early(found.network)
                held = self._locators[device] = (name, found)
            return held[1]

    def give_back_memory(self, device: str) -> None:
        """Free the memory of the network on a device that clicks do not need."""
        with self._lock:
            held = self._prepared.get(device)
        if held is not None and isinstance(held[1], CapturedNetwork):
            held[1].give_back()


def _ending_early(network: _Module) -> _Module:
    """Make a network stop between two layers once the client is gone: a large window takes seconds on a CPU."""
    for module in network.modules():
        if isinstance(module, DeformableMixer):
            module.register_forward_pre_hook(_raise_if_gone)
    return network


def _raise_if_gone(*_: object) -> None:
    raise_if_client_gone()


def _servable_pretrained(project: Project) -> Path | None:
    """Return the pretrained model's file if it has this project's labels; others are only starts for training."""
    if project.pretrained is None:
        return None
    path = pretrained_path(project.pretrained)
    card = ModelCard.from_json(path.with_suffix(".json").read_text())
    same = card.labels == project.labels and card.preprocessing.modality == project.choices.modality
    return path if same else None
