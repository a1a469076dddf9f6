"""The options of ``--conf`` (and of ``deformux-label serve``), checked, and where a project keeps its state."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from deformux.data.cases import split_label_names
from deformux.data.preprocessing import Preprocessing
from deformux.networks.model_file import ModelCard
from deformux.networks.presets import PRESETS
from deformux.networks.pretrained import PRETRAINED, pretrained_path

__all__ = ["OPTIONS", "InvalidOption", "Project", "number_option"]

OPTIONS = (
    *("auto_train", "cache_gb", "labels", "lease_minutes", "modality", "patch_size", "preset", "pretrained"),
    *("spacing", "train_devices"),
)
# Names with a meaning of their own: to the Slicer extension, in requests, and as options of a task, which requests
# carry beside the labels.
_RESERVED = frozenset(
    {
        *("background", "background_scribbles", "foreground", "foreground_scribbles", "image", "label", "model"),
        *("active_label", "client_id", "label_tag", "logging", "reset_state", "result_dtype", "result_extension"),
        *("roi", "save_label", "session", "slice", "voxel_order"),
        *("batch_size", "device", "learning_rate", "start_from", "steps"),
        *("label_info", "lamda", "num_bins", "num_mixtures", "selected_label_name", "sigma", "uncertainty"),
    }
)


class InvalidOption(ValueError):
    """An option of the app is wrong; the message is one sentence with the valid values."""


@dataclass(frozen=True)
class Project:
    """What the server was started for.

    Args:
        labels: names of the label values 1..N, in order.
        preset: size of the network that is trained.
        preprocessing: how scans become network input.
        pretrained: name of the weights to start from, or None.
        auto_train: submitted labels after which a training is queued; 0 for never.
        lease_minutes: how long a volume that was handed out is offered to nobody else; 0 for not at all.
        cache_gb: most gigabytes (10^9 bytes) kept in memory for the next click on the same volume; 0 for nothing.
        train_devices: where to train: ``one``, the device of the request; ``auto``, all visible GPUs; or a list.
    """

    labels: tuple[str, ...]
    preset: str = "tiny"
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    pretrained: str | None = None
    auto_train: int = 0
    lease_minutes: float = 60.0
    cache_gb: float = 1.0
    train_devices: str = "one"

    @classmethod
    def from_conf(cls, conf: Mapping[str, str]) -> Project:
        """Parse ``--conf`` pairs; what is not given comes from the pretrained model, else from the defaults.

        Raises:
            InvalidOption: an unknown option or a bad value.
        """
        unknown = sorted(set(conf) - set(OPTIONS))
        if unknown:
            raise InvalidOption(f"unknown option {unknown[0]!r}; valid options are {', '.join(OPTIONS)}")
        given = {key: str(value).strip() for key, value in conf.items() if str(value).strip()}
        pretrained, card = _pretrained(given.get("pretrained", "none"))
        start = card.preprocessing if card else Preprocessing()
        preset = given.get("preset", card.preset if card else cls.preset)
        if preset not in PRESETS:
            raise InvalidOption(f"preset must be one of {', '.join(sorted(PRESETS))}; got {preset!r}")
        if card and preset != card.preset:
            raise InvalidOption(f"pretrained {pretrained!r} has preset {card.preset!r}; got preset {preset!r}")
        try:
            typed = Preprocessing.from_options(
                given.get("modality", start.modality),
                given.get("spacing", _spacing_text(start)),
                given.get("patch_size", ",".join(map(str, start.patch_size))),
            )
        except ValueError as error:
            raise InvalidOption(str(error)) from error
        preprocessing = dataclasses.replace(
            start, modality=typed.modality, spacing_mm=typed.spacing_mm, patch_size=typed.patch_size
        )
        labels = _labels(given["labels"]) if "labels" in given else (card.labels if card else ())
        if not labels:
            raise InvalidOption("labels must be given as a comma-separated list of names, such as anterior,posterior")
        auto_train = int(number_option("auto_train", given.get("auto_train", "0"), 10_000, whole=True))
        lease_minutes = number_option("lease_minutes", given.get("lease_minutes", "60"), 100_000)
        cache_gb = number_option("cache_gb", given.get("cache_gb", "1"), 10_000)
        devices = _train_devices(given.get("train_devices", cls.train_devices))
        return cls(labels, preset, preprocessing, pretrained, auto_train, lease_minutes, cache_gb, devices)

    def to_conf(self) -> dict[str, str]:
        """The options that ``from_conf`` makes this project of."""
        return {
            "auto_train": str(self.auto_train),
            "cache_gb": f"{self.cache_gb:g}",
            "labels": ",".join(self.labels),
            "lease_minutes": f"{self.lease_minutes:g}",
            "modality": self.preprocessing.modality,
            "patch_size": ",".join(map(str, self.preprocessing.patch_size)),
            "preset": self.preset,
            "pretrained": self.pretrained or "none",
            "spacing": _spacing_text(self.preprocessing),
            "train_devices": self.train_devices,
        }

    @property
    def label_values(self) -> dict[str, int]:
        """Name to value, dense 1..N in order: the form in which the Slicer extension reads ``label_names``."""
        return {name: value for value, name in enumerate(self.labels, start=1)}

    def state_folder(self, app_dir: str | Path, studies: str) -> Path:
        """Where versions, scores and training state of this project live.

        Other studies, other labels or another modality are another project, so that weights never mix.
        """
        place = studies if re.match(r"https?://", studies) else os.path.realpath(studies)
        identity = json.dumps([place, self.labels, self.preprocessing.modality])
        name = re.sub(r"[^A-Za-z0-9_-]+", "-", os.path.basename(place.rstrip("/")))[:40] or "studies"
        return Path(app_dir) / "model" / f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"


def _pretrained(name: str) -> tuple[str | None, ModelCard | None]:
    if name == "none":
        return None, None
    if name not in PRETRAINED:
        raise InvalidOption(f"pretrained must be one of {', '.join((*PRETRAINED, 'none'))}; got {name!r}")
    return name, ModelCard.from_json(pretrained_path(name).with_suffix(".json").read_text())


def _train_devices(text: str) -> str:
    value = ",".join(part.strip() for part in text.split(","))
    if not re.fullmatch(r"one|auto|cpu(,cpu){0,63}|cuda:[0-9]{1,3}(,cuda:[0-9]{1,3}){0,63}", value):
        raise InvalidOption(
            "train_devices must be one, auto for all GPUs, or a list of devices such as cuda:0,cuda:1 or cpu,cpu; "
            f"got {text!r}"
        )
    gpus = [name for name in value.split(",") if name.startswith("cuda:")]
    if len(set(gpus)) < len(gpus):
        raise InvalidOption(f"train_devices must name each GPU once; got {text!r}")
    return value


def _labels(text: str) -> tuple[str, ...]:
    try:
        names = split_label_names(text)
    except ValueError as error:
        raise InvalidOption(str(error)) from error
    reserved = sorted(set(map(str.lower, names)) & _RESERVED)
    if reserved:
        raise InvalidOption(f"a label must not be named {', '.join(sorted(_RESERVED))}; got {reserved[0]!r}")
    return names


def number_option(option: str, text: str, most: int, *, whole: bool = False) -> float:
    """Parse the number of an option between 0 and ``most``; raises InvalidOption."""
    kind = "a whole number" if whole else "a number"
    try:
        value = float(int(text) if whole else float(text))
    except ValueError:
        value = math.nan
    if not 0 <= value <= most:
        raise InvalidOption(f"{option} must be {kind} from 0 to {most}; got {text!r}")
    return value


def _spacing_text(prep: Preprocessing) -> str:
    return ",".join(map(str, prep.spacing_mm)) if prep.spacing_mm else "native"
