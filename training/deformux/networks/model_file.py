"""Model files: weights as safetensors, and a JSON card beside them that describes them."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from deformux.data.atomic_files import replacing, write_text
from deformux.data.preprocessing import Preprocessing
from deformux.networks.deformux_net import PUBLISHED_STRIDES, DeformUXNet

if TYPE_CHECKING:
    from deformux.data.planning import Plan

__all__ = [
    "InvalidModel",
    "ModelCard",
    "check_weights",
    "load_model",
    "network_options",
    "planned_network",
    "read_card",
    "remove_unfinished",
    "save_model",
    "warm_start",
    "with_guidance",
]
# Types of a card's values, if present.
_CARD_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "labels": list,
    "preset": str,
    "in_channels": int,
    "network_options": dict,
    "parent": (str, type(None)),
    "training_cases": list,
    "training_labels": dict,
    "recipe": dict,
    "validation": dict,
    "gate": dict,
    "plan": dict,
    "scratch_cases": int,
    "locator": dict,
    "weights_sha256": str,
}


class InvalidModel(ValueError):
    """A model file or its card cannot be used; the message says why."""


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@dataclass(frozen=True)
class ModelCard:
    """Description of a model and its origin.

    Args:
        labels: names of labels 1..N.
        preprocessing: how its input is made.
        preset, in_channels, network_options: arguments of DeformUXNet.
        parent: the model it was fine-tuned from.
        training_cases: ids of the volumes it was trained on.
        training_labels: case id to SHA-256 of the label file it was trained on.
        recipe: the training recipe.
        seed: of every random choice of the training.
        validation: ``mean_dice`` and ``per_case`` Dice by label; NaN is written as null.
        gate: the decision on publishing it, with its numbers.
        provisional: it was published, or would be, without being measured.
        scratch_cases: number of training volumes when this line of models was last trained from scratch.
        run: id of the training; a resumed training keeps it.
        seconds: training time.
        created: UTC, ISO 8601.
        device: what it was trained on.
        plan: ``reasons`` of network and input, a sentence for each choice, ``facts`` behind them, and the
            ``recipe_changes`` that came with them; empty without a plan.
        notes: anything a reader should know, e.g. the data's licence.
        locator: what finds the labels in large scans (``Locator.to_dict``), with its checks and the SHA-256 of its own
            file; or why there is none.
        weights_sha256: SHA-256 of the weights' file, set by ``save_model``; empty in older cards.
    """

    labels: tuple[str, ...]
    preprocessing: Preprocessing
    preset: str
    in_channels: int = 1
    network_options: Mapping[str, Any] = field(default_factory=dict)
    parent: str | None = None
    training_cases: tuple[str, ...] = ()
    training_labels: Mapping[str, str] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    validation: Mapping[str, Any] = field(default_factory=dict)
    gate: Mapping[str, Any] = field(default_factory=dict)
    provisional: bool = False
    scratch_cases: int = 0
    run: str = ""
    seconds: float = 0.0
    created: str = field(default_factory=_now)
    device: str = "cpu"
    plan: Mapping[str, Any] = field(default_factory=dict)
    notes: str = ""
    locator: Mapping[str, Any] = field(default_factory=dict)
    weights_sha256: str = ""

    def to_json(self) -> str:
        """Return the card as text."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["preprocessing"] = self.preprocessing.to_dict()
        for name in ("plan", "locator"):
            # Most cards have none, and those of before had no place for them.
            if not values[name]:
                del values[name]
        return json.dumps(_without_nan(values), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> ModelCard:
        """Invert ``to_json``; raise ValueError, TypeError or KeyError if the text is not a card."""
        values = json.loads(text)
        if not isinstance(values, dict) or not isinstance(values["preprocessing"], dict):
            raise TypeError("a card is an object, and so is its preprocessing")
        for name, kinds in _CARD_TYPES.items():
            if name in values and not isinstance(values[name], kinds):
                raise TypeError(f"{name} is a {type(values[name]).__name__}")
        values["preprocessing"] = Preprocessing.from_dict(values["preprocessing"])
        for name in ("labels", "training_cases"):
            values[name] = tuple(values.get(name, ()))
        options = values.get("network_options", {})
        return cls(**{**values, "network_options": {name: _tuples(value) for name, value in options.items()}})


def save_model(path: Path, network: torch.nn.Module, card: ModelCard, *, dtype: torch.dtype = torch.float32) -> None:
    """Write ``path`` (.safetensors) and its card, each by rename; the card first, so that weights always have theirs.

    The card gets the checksum of the weights.
    """
    state = {name: value.detach().to("cpu", dtype).contiguous() for name, value in network.state_dict().items()}
    with replacing(path) as temporary:
        save_file(state, temporary)
        checksum = _checksum(temporary.read_bytes())
        write_text(path.with_suffix(".json"), dataclasses.replace(card, weights_sha256=checksum).to_json())


def planned_network(plan: Plan, n_labels: int, *, guidance: bool = False) -> DeformUXNet:
    """Return a network of a plan with random weights."""
    return DeformUXNet(plan.preprocessing.channels, n_labels + 1, plan.preset, strides=plan.strides, guidance=guidance)


def network_options(network: DeformUXNet) -> dict[str, Any]:
    """Return the options of a network that its card must name for ``load_model`` to rebuild it."""
    options: dict[str, Any] = {"guidance": True} if network.guidance_channels else {}
    return options if network.strides == PUBLISHED_STRIDES else {**options, "strides": network.strides}


def remove_unfinished(folder: Path) -> None:
    """Delete unfinished files of killed processes from a folder that nobody is writing to."""
    # Our own, and the file that safetensors writes before renaming it.
    for pattern in (".writing-*", ".tmp*"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def read_card(path: Path) -> ModelCard:
    """Read the card beside a model file; raise InvalidModel if it is missing or not a card."""
    card_path = path.with_suffix(".json")
    try:
        return ModelCard.from_json(card_path.read_text())
    except FileNotFoundError as error:
        raise InvalidModel(f"{path} needs its card {card_path.name} beside it") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InvalidModel(f"{card_path} is not a model card") from error


def check_weights(path: Path, card: ModelCard) -> None:
    """Read the weights of a card; raise InvalidModel if they are damaged, or do not match the card."""
    _read_weights(path, card.weights_sha256)


def load_model(path: Path, *, device: str | torch.device = "cpu") -> tuple[DeformUXNet, ModelCard]:
    """Load the network of a model file, float32 and in evaluation mode, and its card.

    Raises:
        InvalidModel: a file is missing or damaged, or weights and card do not belong together.
    """
    card = read_card(path)
    weights = _read_weights(path, card.weights_sha256)
    try:
        network = DeformUXNet(card.in_channels, len(card.labels) + 1, card.preset, **card.network_options)
        network.load_state_dict(weights)
    except (RuntimeError, TypeError, ValueError) as error:
        raise InvalidModel(f"{path} does not fit its card {path.with_suffix('.json').name}") from error
    return network.to(device).eval(), card


def warm_start(network: DeformUXNet, path: Path) -> list[str]:
    """Copy every weight of a model file with the same name and shape; return the names that were not copied.

    A model of other labels thus gives everything but its output layer and its guidance. Models with and without
    guidance share everything else. A model of other strides gives everything but the convolutions whose kernels follow
    from them: a kernel that fits always has the same stride.

    Raises:
        InvalidModel: the file cannot be read, or nothing but the output layer could fit.
    """
    own = network.state_dict()
    given = _read_weights(path, read_card(path).weights_sha256 if path.with_suffix(".json").exists() else "")
    fitting = {name: value for name, value in given.items() if name in own and own[name].shape == value.shape}
    if len(fitting) < len(own) // 2:
        raise InvalidModel(f"{path} has a different architecture from preset {network.preset!r}")
    network.load_state_dict(fitting, strict=False)
    return sorted(set(own) - set(fitting))


def with_guidance(network: DeformUXNet) -> DeformUXNet:
    """Return a copy of an automatic network that also takes guidance; the network itself if it already does."""
    if network.guidance_channels:
        return network
    guided = copy.deepcopy(network)
    guided.add_guidance()
    return guided


def _read_weights(path: Path, checksum: str) -> dict[str, torch.Tensor]:
    """Read a model file; ``checksum``, if given, reveals changed numbers, which safetensors does not."""
    try:
        data = path.read_bytes()
        if checksum and _checksum(data) != checksum:
            raise InvalidModel(f"{path} is damaged: its checksum is not the one in its card")
        return {name: value.float() for name, value in load(data).items()}
    except FileNotFoundError as error:
        raise InvalidModel(f"there is no model file {path}") from error
    except (OSError, SafetensorError) as error:
        raise InvalidModel(f"{path} cannot be read as safetensors weights") from error


def _checksum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _tuples(value: Any) -> Any:
    """Replace lists by tuples."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _without_nan(value: Any) -> Any:
    """Replace NaN, which JSON lacks, by None: a label that is absent from a case."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_without_nan(item) for item in value]
    return value
