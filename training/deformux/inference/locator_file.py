"""The file of a locator: weights beside the model's, described in the model's card."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from deformux.data.atomic_files import replacing
from deformux.inference.locate import Locator
from deformux.networks.deformux_net import DeformUXNet
from deformux.networks.model_file import InvalidModel, ModelCard

__all__ = ["load_locator", "locator_path", "save_locator"]

_PRESET = "tiny"


def locator_path(model: Path) -> Path:
    """Return the file of the locator of a model file: ``v0001.locator.safetensors`` for ``v0001.safetensors``."""
    return model.with_suffix(".locator.safetensors")


def save_locator(model: Path, locator: Locator, card: ModelCard) -> ModelCard:
    """Write the locator of a model file that is yet to be written, by rename; return the card that describes both."""
    assert isinstance(locator.network, DeformUXNet)
    path = locator_path(model)
    state = {name: value.detach().to("cpu", torch.float32) for name, value in locator.network.state_dict().items()}
    with replacing(path) as temporary:
        save_file({name: value.contiguous() for name, value in state.items()}, temporary)
        checksum = hashlib.sha256(temporary.read_bytes()).hexdigest()
    facts = {**card.locator, **locator.to_dict(), "preset": locator.network.preset, "weights_sha256": checksum}
    return dataclasses.replace(card, locator=facts)


def load_locator(model: Path, card: ModelCard, *, device: str | torch.device = "cpu") -> Locator | None:
    """Load the locator of a model file; None if the model has none.

    Raises:
        InvalidModel: its file is missing or damaged, or does not fit the card.
    """
    if "weights_sha256" not in card.locator:
        return None
    path = locator_path(model)
    try:
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != card.locator["weights_sha256"]:
            raise InvalidModel(f"{path} is damaged: its checksum is not the one in the model's card")
        channels = card.preprocessing.channels
        network = DeformUXNet(channels, len(card.labels) + 1, card.locator.get("preset", _PRESET))
        network.load_state_dict(load(data))
        locator = Locator.from_dict(card.locator, network.to(device).eval(), device=device)
        if len(locator.ranges) != channels:
            raise ValueError(f"the locator has ranges of {len(locator.ranges)} sequences, the model takes {channels}")
        return locator
    except FileNotFoundError as error:
        raise InvalidModel(f"there is no locator {path}") from error
    except OSError as error:
        raise InvalidModel(f"{path} cannot be read") from error
    except (SafetensorError, RuntimeError, KeyError, IndexError, TypeError, ValueError) as error:
        if isinstance(error, InvalidModel):
            raise
        raise InvalidModel(f"{path} does not fit the model's card") from error
