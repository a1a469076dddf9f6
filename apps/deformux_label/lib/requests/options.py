"""What an inference request may ask for."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from fastapi import HTTPException
from monailabel.interfaces.datastore import Datastore, DefaultLabelTag
from monailabel.utils.others.generic import device_map, name_to_device

from deformux_label.lib.requests.label_formats import LABEL_FORMATS

__all__ = [
    "CLIENT_OPTIONS",
    "checked_device",
    "chosen",
    "find_image",
    "inference_options",
    "known",
    "one_of",
    "refuse_unknown",
    "saves_label",
]

CLIENT_OPTIONS = ("client_id",)
"""What every client may send with anything."""
_DTYPES = ("uint8", "uint16", "int16", "int32", "float32")
_LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


def known(kind: str, name: Any, present: Mapping[str, Any]) -> Any:
    """The task of a name, or 404 with the names there are."""
    task = present.get(name) if isinstance(name, str) else None
    if task is None:
        raise HTTPException(404, f"there is no {kind} {name!r}; there {_is_or_are(list(present))}")
    return task


def find_image(image: Any, datastore: Datastore, folders: Sequence[Path]) -> tuple[str | None, str]:
    """Id (None for a bare file) and path of what a request calls its image.

    An id comes first: MONAI Label tries the name as a path on the server's disk before it looks for the id. Only paths
    below ``folders`` are opened, and none in a hidden folder, such as that of what was deleted; links are followed
    before that is checked.
    """
    if not isinstance(image, str) or not image:
        raise HTTPException(400, "the request names no image; give the id of one, or upload it")
    if path := datastore.get_image_uri(image):
        return image, path
    if "/" not in image and "\\" not in image:
        raise HTTPException(404, f"there is no image with the id {image!r}")
    resolved = None if "\0" in image else Path(image).resolve()
    if resolved is None or not any(_is_below(resolved, folder.resolve()) for folder in folders):
        raise HTTPException(403, "the image path is outside the studies folder; give the id of an image, or upload it")
    if not os.path.exists(resolved):
        raise HTTPException(404, f"there is no image at {image!r}")
    return None, str(resolved)


def _is_below(path: Path, folder: Path) -> bool:
    return path.is_relative_to(folder) and not any(part.startswith(".") for part in path.relative_to(folder).parts)


def inference_options(request: Mapping[str, Any]) -> dict[str, Any]:
    """The options of an inference request that the app knows, checked; the rest is left out."""
    options: dict[str, Any] = {
        "device": checked_device(request.get("device")),
        "logging": one_of("logging", str(request.get("logging", "INFO")).upper(), _LOG_LEVELS),
        "label_tag": str(request.get("label_tag") or DefaultLabelTag.ORIGINAL.value),
        "save_label": saves_label(request),
        "uncertainty": _switch("uncertainty", request.get("uncertainty", "off")),
    }
    if extension := request.get("result_extension"):
        # It becomes the end of a file name on the server.
        options["result_extension"] = one_of("result_extension", extension, LABEL_FORMATS)
    if dtype := request.get("result_dtype"):
        options["result_dtype"] = one_of("result_dtype", dtype, _DTYPES)
    return options


def checked_device(value: Any) -> str:
    """Torch's name of a device that a client chose from those that the server listed, or the default one."""
    name = chosen(value)
    device = name_to_device(name if isinstance(name, str) else None)
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise HTTPException(
            400, f"device must be one of {', '.join(dict.fromkeys((*device_map(), 'cpu')))}; got {name!r}"
        )
    return device


def _switch(name: str, value: Any) -> bool:
    value = chosen(value)
    if isinstance(value, bool):
        return value
    return one_of(name, value, ("off", "on")) == "on"


def chosen(value: Any) -> Any:
    """The value of an option that is offered as a list: Slicer sends its first item, others perhaps all of it."""
    return value[0] if isinstance(value, list) and value else value


def saves_label(request: Mapping[str, Any]) -> bool:
    """Whether the result of an inference is to be stored as a label."""
    return str(request.get("save_label", False)).lower() in ("true", "1", "yes")


def one_of(name: str, value: Any, valid: Sequence[str]) -> str:
    """The value of an option, or 400 with the valid ones."""
    if value not in valid:
        raise HTTPException(400, f"{name} must be one of {', '.join(valid)}; got {value!r}")
    return str(value)


def refuse_unknown(options: Mapping[str, Any], known: Iterable[str], what: str) -> None:
    """Refuse options that nobody reads: they would be kept and sent back with every status.

    Raises:
        HTTPException: 400 with the options there are.
    """
    valid = sorted({*known, *CLIENT_OPTIONS})
    unknown = sorted(str(name) for name in options if name not in valid)
    if unknown:
        shown = ", ".join(ascii(name)[:40] for name in unknown[:3])
        raise HTTPException(400, f"{what} has no option {shown}; there are {', '.join(valid)}")


def _is_or_are(names: list[str]) -> str:
    return f"is only {names[0]}" if len(names) == 1 else f"are {', '.join(names) or 'none'}"
