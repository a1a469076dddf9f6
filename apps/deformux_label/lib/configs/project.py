"""The project: its options, checked, and the folder of its state."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from deformux.data.cases import split_label_names
from deformux.data.choices import AUTO, Choices
from deformux.data.preprocessing import Preprocessing
from deformux.data.sequences import SequenceNaming
from deformux.networks.model_file import ModelCard
from deformux.networks.presets import PRESETS
from deformux.networks.pretrained import PRETRAINED, pretrained_path
from deformux_label.lib.configs.declared_options import (
    ANNOTATED_SLICES,
    AUTO_TRAIN,
    CACHE_GB,
    IMAGE_CHANNELS,
    LEASE_MINUTES,
    PLAIN_OPTIONS,
    PLANNED_OPTIONS,
    PROJECT_OPTIONS,
    TRAIN_DEVICES,
    TRAIN_MINUTES,
    InvalidOption,
)

__all__ = ["OPTIONS", "InvalidOption", "Project"]

OPTIONS = tuple(sorted(option.name for option in PROJECT_OPTIONS))
"""Names of the options that describe the project."""
_PLANNED = frozenset(option.name for option in PLANNED_OPTIONS)
# Names with a different meaning: in the Slicer extension, in requests, and as options of a task, which requests contain
# in addition to the labels.
_RESERVED = frozenset(
    {
        *("background", "background_scribbles", "foreground", "foreground_scribbles", "image", "label", "model"),
        *("active_label", "client_id", "label_tag", "logging", "reset_state", "result_dtype", "result_extension"),
        *("roi", "save_label", "session", "slice", "voxel_order"),
        *("batch_size", "device", "learning_rate", "minutes", "start_from", "steps"),
        *("label_info", "lamda", "num_bins", "num_mixtures", "selected_label_name", "sigma", "uncertainty"),
    }
)


@dataclass(frozen=True)
class Project:
    """A server's project: the labels, and how they are learned.

    Args:
        labels: names of the label values 1..N, in order.
        choices: what is not left to the plan of each training from scratch.
        pretrained: name of the weights to start from, or None.
        train_minutes: time of a training from scratch; None for the plan's default.
        auto_train: number of images with a new label after which a training is queued; 0 for never.
        lease_minutes: duration of a volume's lease; 0 switches leases off.
        cache_gb: gigabytes (10^9 bytes) of the cache that makes the next click on a volume fast; 0 for no cache.
        train_devices: where to train: ``one``, the device of the request; ``auto``, all visible GPUs; or a list.
        image_channels: how the files of a case's sequences are named (``SequenceNaming``); empty if each is a case.
        annotated_slices: which slices of a submitted label count as annotated, one of ``SLICE_RULES``.
    """

    labels: tuple[str, ...]
    choices: Choices = field(default_factory=Choices)
    pretrained: str | None = None
    train_minutes: float | None = TRAIN_MINUTES.default_value
    auto_train: int = AUTO_TRAIN.default_value
    lease_minutes: float = LEASE_MINUTES.default_value
    cache_gb: float = CACHE_GB.default_value
    train_devices: str = TRAIN_DEVICES.default_value
    image_channels: str = IMAGE_CHANNELS.default_value
    annotated_slices: str = ANNOTATED_SLICES.default_value

    @classmethod
    def from_conf(cls, conf: Mapping[str, str]) -> Project:
        """Parse ``--conf`` pairs; missing ones come from the pretrained model, else from the defaults.

        Raises:
            InvalidOption: an unknown option or an invalid value.
        """
        unknown = sorted(set(conf) - set(OPTIONS))
        if unknown:
            raise InvalidOption(f"unknown option {unknown[0]!r}; valid options are {', '.join(OPTIONS)}")
        given = {key: str(value).strip() for key, value in conf.items() if str(value).strip()}
        pretrained, card = _pretrained(given.get("pretrained", "none"))
        texts = {**_texts_of_model(card), **{key: given[key] for key in given if key in _PLANNED}}
        preset = texts.get("preset", AUTO)
        if preset not in (*PRESETS, AUTO):
            raise InvalidOption(f"preset must be one of {', '.join(sorted(PRESETS))}, or {AUTO}; got {preset!r}")
        if card and preset != card.preset:
            raise InvalidOption(f"pretrained {pretrained!r} has preset {card.preset!r}; got preset {preset!r}")
        try:
            choices = Choices.from_options(**texts)
        except ValueError as error:
            raise InvalidOption(str(error)) from error
        labels = _labels(given["labels"]) if "labels" in given else (card.labels if card else ())
        if not labels:
            raise InvalidOption("labels must be given as a comma-separated list of names, such as anterior,posterior")
        plain = {option.name: option.value(given) for option in PLAIN_OPTIONS}
        return cls(labels, choices, pretrained, **plain)

    def to_conf(self) -> dict[str, str]:
        """Return options from which ``from_conf`` recreates this project."""
        return {
            "labels": ",".join(self.labels),
            "pretrained": self.pretrained or "none",
            **self.choices.to_options(),
            **{option.name: _option_text(getattr(self, option.name)) for option in PLAIN_OPTIONS},
        }

    @cached_property
    def naming(self) -> SequenceNaming:
        """Return how the files of a case's sequences are named."""
        return SequenceNaming.parse(self.image_channels)

    @property
    def preset(self) -> str:
        """Return the size of a network that is needed before there is a plan."""
        return self.choices.preset or "tiny"

    @property
    def preprocessing(self) -> Preprocessing:
        """Return how scans are read before there is a plan: as MR if nobody said, which suits all intensities."""
        return self.choices.applied_to(Preprocessing("mr", sequences=self.naming.channels))

    @property
    def label_values(self) -> dict[str, int]:
        """Return name to value, 1..N in order, as the Slicer extension reads ``label_names``."""
        return {name: value for value, name in enumerate(self.labels, start=1)}

    def state_folder(self, app_dir: str | Path, studies: str) -> Path:
        """Return the folder of this project's versions, scores and training state.

        Different studies, labels or modalities make different projects, so that their weights never mix.
        """
        place = studies if re.match(r"https?://", studies) else os.path.realpath(studies)
        name = re.sub(r"[^A-Za-z0-9_-]+", "-", os.path.basename(place.rstrip("/")))[:40] or "studies"

        def folder(modality: str) -> Path:
            identity = json.dumps([place, self.labels, modality])
            return Path(app_dir) / "model" / f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"

        if self.choices.modality is not None:
            return folder(self.choices.modality)
        # Before the modality was found in the scans, ct was its default: such a project goes on.
        before = folder("ct")
        return before if before.is_dir() and not folder(AUTO).is_dir() else folder(AUTO)


def _pretrained(name: str) -> tuple[str | None, ModelCard | None]:
    if name == "none":
        return None, None
    if name not in PRETRAINED:
        raise InvalidOption(f"pretrained must be one of {', '.join((*PRETRAINED, 'none'))}; got {name!r}")
    return name, ModelCard.from_json(pretrained_path(name).with_suffix(".json").read_text())


def _labels(text: str) -> tuple[str, ...]:
    try:
        names = split_label_names(text)
    except ValueError as error:
        raise InvalidOption(str(error)) from error
    reserved = sorted(set(map(str.lower, names)) & _RESERVED)
    if reserved:
        raise InvalidOption(f"a label must not be named {', '.join(sorted(_RESERVED))}; got {reserved[0]!r}")
    return names


def _option_text(value: float | str | None) -> str:
    if value is None:
        return AUTO
    return f"{value:g}" if isinstance(value, float) else str(value)


def _texts_of_model(card: ModelCard | None) -> dict[str, str]:
    """Return a model's own values of the options that a plan would choose, as text."""
    if card is None:
        return {}
    own = card.preprocessing
    values = Choices(
        modality=own.modality,
        window_hu=own.window_hu,
        percentiles=own.percentiles,
        frame=own.frame,
        keep_largest=own.keep_largest,
        spacing_mm=own.spacing_mm or "native",
        patch_size=own.patch_size,
        preset=card.preset,
    )
    return values.to_options()
