"""The typed part of a request that all inference tasks share: the scan and the common options."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import HTTPException
from monailabel.interfaces.datastore import Datastore, DefaultLabelTag
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from deformux_label.lib.requests.label_formats import LABEL_FORMATS
from deformux_label.lib.requests.options import checked_device, chosen, one_of

__all__ = ["InferenceOptions", "InferenceRequest", "RequestedScan", "find_scan"]

_DTYPES = ("uint8", "uint16", "int16", "int32", "float32")
_LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


@dataclass(frozen=True)
class RequestedScan:
    """The scan that a request names.

    Args:
        path: path of its file.
        image_id: id in the studies; None for a file outside them, such as an upload.
        sequences: files of all sequences of its case, if there are several.
        keep: whether results may be cached for the next request; False for an upload, which gets a new path each time.
    """

    path: str
    image_id: str | None = None
    keep: bool = True
    sequences: tuple[Path, ...] = ()

    @property
    def name(self) -> str:
        """Return the name for messages."""
        return self.image_id or Path(self.path).name

    @property
    def files(self) -> tuple[Path, ...]:
        """Return what a network reads: the files of all sequences; those of missing ones do not exist."""
        return self.sequences or (Path(self.path),)


def _log_level(value: Any) -> str:
    return one_of("logging", str(value).upper(), _LOG_LEVELS)


def _label_tag(value: Any) -> str:
    return str(value or DefaultLabelTag.ORIGINAL.value)


def _is_true(value: Any) -> bool:
    return str(value).lower() in ("true", "1", "yes")


def _uncertainty(value: Any) -> bool:
    value = chosen(value)
    return value if isinstance(value, bool) else one_of("uncertainty", value, ("off", "on")) == "on"


def _extension(value: Any) -> str | None:
    # It becomes part of a file name on the server.
    return one_of("result_extension", value, LABEL_FORMATS) if value else None


def _dtype(value: Any) -> str | None:
    return one_of("result_dtype", value, _DTYPES) if value else None


class InferenceOptions(BaseModel):
    """The options of any inference; other fields of a request are ignored.

    Validators raise HTTPException, which pydantic passes on: the reply describes the first invalid option.
    """

    model_config = ConfigDict(frozen=True, validate_default=True)

    device: Annotated[str, BeforeValidator(checked_device)] = Field(
        default_factory=lambda: checked_device(None), validate_default=False
    )
    logging: Annotated[str, BeforeValidator(_log_level)] = "INFO"
    label_tag: Annotated[str, BeforeValidator(_label_tag)] = ""
    save_label: Annotated[bool, BeforeValidator(_is_true)] = False
    uncertainty: Annotated[bool, BeforeValidator(_uncertainty)] = False
    result_extension: Annotated[str | None, BeforeValidator(_extension)] = None
    result_dtype: Annotated[str | None, BeforeValidator(_dtype)] = None


class InferenceRequest(BaseModel):
    """A request to segment a scan; some tasks extend it."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    scan: RequestedScan
    options: InferenceOptions


def find_scan(image: Any, datastore: Datastore, folders: Sequence[Path], uploads: Path | None) -> RequestedScan:
    """Find the scan that a request calls ``image``: an id, or the path of an upload.

    Ids take precedence; MONAI Label would first try the name as a path on the server's disk. Only paths inside
    ``folders`` and ``uploads`` are opened, except in hidden folders, such as that of deleted files. Links are resolved
    before these checks.

    Raises:
        HTTPException: 400 without a name, 403 for a path outside these folders, 404 for an unknown scan.
    """
    if not isinstance(image, str) or not image:
        raise HTTPException(400, "the request names no image; give the id of one, or upload it")
    if path := datastore.get_image_uri(image):
        return RequestedScan(path, image, keep=not _is_upload(path, uploads))
    if "/" not in image and "\\" not in image:
        raise HTTPException(404, f"there is no image with the id {image!r}")
    resolved = None if "\0" in image else Path(image).resolve()
    allowed = [*folders, *([uploads] if uploads else [])]
    if resolved is None or not any(_is_below(resolved, folder.resolve()) for folder in allowed):
        raise HTTPException(403, "the image path is outside the studies folder; give the id of an image, or upload it")
    if not os.path.exists(resolved):
        raise HTTPException(404, f"there is no image at {image!r}")
    return RequestedScan(str(resolved), keep=not _is_upload(resolved, uploads))


def _is_upload(path: str | Path, uploads: Path | None) -> bool:
    return uploads is not None and Path(path).resolve().is_relative_to(uploads.resolve())


def _is_below(path: Path, folder: Path) -> bool:
    return path.is_relative_to(folder) and not any(part.startswith(".") for part in path.relative_to(folder).parts)
