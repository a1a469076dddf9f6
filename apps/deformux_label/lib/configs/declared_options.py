"""Declarations of all options of the server.

``--conf`` and ``deformux-label serve`` take them from here. The variables of ``make serve`` and the table in the
documents are compared with this declaration by ``tests/app/test_declared_options.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from deformux.data.choices import AUTO
from deformux.data.partial_labels import SLICE_RULES
from deformux.data.sequences import SequenceNaming
from deformux_label.lib.configs.numbers import number_between

__all__ = [
    "ALLOW_ORIGIN",
    "ANNOTATED_SLICES",
    "AUTO_TRAIN",
    "CACHE_GB",
    "HOST",
    "IMAGE_CHANNELS",
    "INSECURE",
    "LEASE_MINUTES",
    "LISTEN_OPTIONS",
    "MAX_UPLOAD_GB",
    "MAX_VOXELS",
    "PLAIN_OPTIONS",
    "PLANNED_OPTIONS",
    "PORT",
    "PRESET",
    "PROJECT_OPTIONS",
    "SERVE_OPTIONS",
    "SSL_CERT",
    "SSL_KEY",
    "TRAIN_DEVICES",
    "TRAIN_MINUTES",
    "USERS_FILE",
    "WEB_OPTIONS",
    "InvalidOption",
    "Option",
]

_Value = TypeVar("_Value")
_ORIGIN = re.compile(r"https?://[A-Za-z0-9.-]+(:[0-9]{1,5})?")
_DEVICES = re.compile(r"one|auto|cpu(,cpu){0,63}|cuda:[0-9]{1,3}(,cuda:[0-9]{1,3}){0,63}")

# Less is over before a training has begun.
_FEWEST_MINUTES = 0.1


class InvalidOption(ValueError):
    """An invalid option of the app; the message is one sentence with the valid values."""


@dataclass(frozen=True, kw_only=True)
class Option(Generic[_Value]):
    """One option.

    Args:
        name: name for ``--conf``; ``deformux-label serve`` takes it with dashes.
        default: default as text; empty without one.
        default_note: description of an empty default, for the documents.
        help: the valid values, with Markdown's backticks.
        parse: converts the name and a text to a value; raises InvalidOption.
        variable: variable of ``make serve``; empty without one.
        is_flag: whether ``serve`` takes it as a flag, without a value.
    """

    name: str
    default: str
    default_note: str = ""
    help: str
    parse: Callable[[str, str], _Value]
    variable: str = ""
    is_flag: bool = False

    @property
    def flag(self) -> str:
        """Return the option as the command line takes it."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def default_value(self) -> _Value:
        """Return the default as a value."""
        return self.parse(self.name, self.default)

    def value(self, given: Mapping[str, str]) -> _Value:
        """Return the value of this option among texts by name.

        Raises:
            InvalidOption: the value is invalid.
        """
        return self.parse(self.name, given.get(self.name, self.default))


def _text(_name: str, text: str) -> str:
    return text


def _number(most: int) -> Callable[[str, str], float]:
    return lambda name, text: _checked_number(name, text, most, whole=False)


def _count(most: int) -> Callable[[str, str], int]:
    return lambda name, text: int(_checked_number(name, text, most, whole=True))


def _checked_number(name: str, text: str, most: int, *, whole: bool) -> float:
    try:
        return number_between(name, text, low=0, high=most, whole=whole)
    except ValueError as error:
        raise InvalidOption(str(error)) from error


def _minutes(name: str, text: str) -> float | None:
    """Return a positive number of minutes, or None for ``auto``."""
    if text == AUTO:
        return None
    minutes = _checked_number(name, text, 100_000, whole=False)
    if minutes < _FEWEST_MINUTES:
        raise InvalidOption(f"{name} must be auto or a number from {_FEWEST_MINUTES} to 100000; got {text}")
    return minutes


def _devices(name: str, text: str) -> str:
    value = ",".join(part.strip() for part in text.split(","))
    if not _DEVICES.fullmatch(value):
        raise InvalidOption(
            f"{name} must be one, auto for all GPUs, or a list of devices such as cuda:0,cuda:1 or cpu,cpu; "
            f"got {text!r}"
        )
    gpus = [device for device in value.split(",") if device.startswith("cuda:")]
    if len(set(gpus)) < len(gpus):
        raise InvalidOption(f"{name} must name each GPU once; got {text!r}")
    return value


def _channels(name: str, text: str) -> str:
    try:
        return SequenceNaming.parse(text).text
    except ValueError as error:
        raise InvalidOption(f"{name}: {error}") from error


def _slice_rule(name: str, text: str) -> str:
    if text not in SLICE_RULES:
        raise InvalidOption(f"{name} must be {', '.join(SLICE_RULES[:-1])} or {SLICE_RULES[-1]}; got {text!r}")
    return text


def _origins(name: str, text: str) -> tuple[str, ...]:
    origins = tuple(part.strip().rstrip("/") for part in text.split(",") if part.strip())
    for origin in origins:
        if not _ORIGIN.fullmatch(origin):
            raise InvalidOption(f"{name} must list origins such as https://viewer.org; got {origin!r}")
    return origins


def _file(_name: str, text: str) -> Path | None:
    return Path(text) if text else None


def _truth(name: str, text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise InvalidOption(f"{name} must be true or false; got {text.lower()!r}")
    return text.lower() == "true"


def _port(name: str, text: str) -> int:
    try:
        port = int(text)
    except ValueError:
        port = 0
    if not 1 <= port <= 65535:
        raise InvalidOption(f"{name} must be between 1 and 65535; got {text}")
    return port


# Left to the plan of each training from scratch; a pretrained model has its own values. ``Project.from_conf`` reads
# them together.
PRESET = Option(
    name="preset",
    default=AUTO,
    help="`tiny` (6 M parameters, for CPUs), `small` (14 M), `base` (56 M, the published network); `auto` by device",
    parse=_text,
    variable="PRESET",
)
PLANNED_OPTIONS: tuple[Option[str], ...] = (
    Option(
        name="modality",
        default=AUTO,
        help="`ct` (clipped to a window) or `mr` (standardised scan by scan); `auto` by headers and values",
        parse=_text,
        variable="MODALITY",
    ),
    PRESET,
    Option(
        name="spacing",
        default=AUTO,
        help="voxel size of the network's grid in mm, such as `1.5,1.5,2`; `native`; or `auto`",
        parse=_text,
        variable="SPACING",
    ),
    Option(
        name="patch_size",
        default=AUTO,
        help="voxels of a training patch and of an inference window, such as `96,96,96`; or `auto`",
        parse=_text,
        variable="PATCH",
    ),
    Option(
        name="window",
        default=AUTO,
        help="HU between which CT is clipped, such as `-1000,400` for lung; `auto` by what the labels hold",
        parse=_text,
        variable="WINDOW",
    ),
    Option(
        name="percentiles",
        default=AUTO,
        help="percentiles of a scan between which MR is clipped, such as `0.5,99.5`; or `auto`",
        parse=_text,
    ),
    Option(
        name="frame",
        default=AUTO,
        help="axes of the network's grid: `ras` (the patient's), `acquisition` (the scan's), or `auto`",
        parse=_text,
    ),
    Option(
        name="keep_largest",
        default=AUTO,
        help="`yes` keeps only the largest connected piece of all labels together; `no`; or `auto` by the labels",
        parse=_text,
    ),
)
_MODEL_OPTIONS: tuple[Option[str], ...] = (
    Option(
        name="labels",
        default="",
        default_note="from the pretrained model, else required",
        help="names of the labels 1, 2, …, comma separated",
        parse=_text,
        variable="LABELS",
    ),
    *PLANNED_OPTIONS,
    Option(
        name="pretrained",
        default="none",
        help="weights to start from: `hippocampus`; or `none`",
        parse=_text,
        variable="PRETRAINED",
    ),
)
TRAIN_MINUTES = Option(
    name="train_minutes",
    default=AUTO,
    help="minutes of a training from scratch, half of them for one that continues; `auto`: 10 on a CPU, 3 on a GPU",
    parse=_minutes,
    variable="TRAIN_MINUTES",
)
AUTO_TRAIN = Option(
    name="auto_train",
    default="0",
    help="train after this many images have a new label; 0 for only when asked",
    parse=_count(10_000),
    variable="AUTO_TRAIN",
)
LEASE_MINUTES = Option(
    name="lease_minutes",
    default="60",
    help="minutes for which a case is kept for the annotator who got it; 0 switches this off",
    parse=_number(100_000),
    variable="LEASE",
)
IMAGE_CHANNELS = Option(
    name="image_channels",
    default="",
    default_note="none: each file is a case",
    help="endings of the file names of a case's sequences, such as `_0000,_0001` or `_0000=flair,_0001=t1c`",
    parse=_channels,
    variable="CHANNELS",
)
ANNOTATED_SLICES = Option(
    name="annotated_slices",
    default="auto",
    help="which slices of a label count as annotated: `all`; `drawn`, those with a label; or `auto`: those with a "
    "label where no two of at least three are neighbours, else all",
    parse=_slice_rule,
)
TRAIN_DEVICES = Option(
    name="train_devices",
    default="one",
    help="where to train: `one`, `auto` (all GPUs), or a list such as `cuda:0,cuda:1`",
    parse=_devices,
    variable="TRAIN_DEVICES",
)
CACHE_GB = Option(
    name="cache_gb",
    default="2",
    help="gigabytes of memory kept so that the next click on a volume is answered fast",
    parse=_number(10_000),
    variable="CACHE",
)
# Fields of ``Project`` with the same names.
PLAIN_OPTIONS: tuple[Option[Any], ...] = (
    TRAIN_MINUTES,
    AUTO_TRAIN,
    LEASE_MINUTES,
    TRAIN_DEVICES,
    CACHE_GB,
    IMAGE_CHANNELS,
    ANNOTATED_SLICES,
)
PROJECT_OPTIONS: tuple[Option[Any], ...] = (*_MODEL_OPTIONS, *PLAIN_OPTIONS)

USERS_FILE = Option(
    name="users",
    default="",
    default_note="in `~/.config/deformux-label/`",
    help="file with the users; the first one switches the login on",
    parse=_file,
)
ALLOW_ORIGIN = Option(
    name="allow_origin",
    default="",
    default_note="none",
    help="origins, such as `https://viewer.org`, whose pages may call the server",
    parse=_origins,
)
MAX_UPLOAD_GB = Option(
    name="max_upload_gb", default="4", help="most gigabytes of an uploaded file", parse=_number(10_000)
)
MAX_VOXELS = Option(
    name="max_voxels", default="1500000000", help="most voxels of a volume that is read", parse=_count(10**12)
)
INSECURE = Option(
    name="insecure",
    default="false",
    help="listen to the network without a login (`true` or `false` in `--conf`)",
    parse=_truth,
    is_flag=True,
)
# Fields of ``ServerOptions`` with the same names.
WEB_OPTIONS: tuple[Option[Any], ...] = (USERS_FILE, ALLOW_ORIGIN, MAX_UPLOAD_GB, MAX_VOXELS, INSECURE)

HOST = Option(
    name="host",
    default="127.0.0.1",
    help="address to listen on; `0.0.0.0` opens it to the network, once there is a user",
    parse=_text,
    variable="HOST",
)
PORT = Option(name="port", default="8000", help="port to listen on", parse=_port, variable="PORT")
SSL_CERT = Option(
    name="ssl_cert",
    default="",
    default_note="none",
    help="certificate file (PEM) for https; needs `--ssl-key`",
    parse=_text,
    variable="SSL_CERT",
)
SSL_KEY = Option(
    name="ssl_key",
    default="",
    default_note="none",
    help="key file (PEM) of the certificate, without a passphrase",
    parse=_text,
    variable="SSL_KEY",
)
# MONAI Label's own command has options for these: ``--conf`` does not take them.
LISTEN_OPTIONS: tuple[Option[Any], ...] = (HOST, PORT, SSL_CERT, SSL_KEY)

SERVE_OPTIONS = (*PROJECT_OPTIONS, *WEB_OPTIONS, *LISTEN_OPTIONS)
