"""An inference request, typed: which scan, and what every task may be asked for."""

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
        image_id: id in the studies; None for any other file, such as an upload.
        keep: whether results may be cached for the next request; not for an upload, whose path never recurs.
    """

    path: str
    image_id: str | None = None
    keep: bool = True

    @property
    def name(self) -> str:
        """The name that messages use."""
        return self.image_id or Path(self.path).name


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
    # It becomes the end of a file name on the server.
    return one_of("result_extension", value, LABEL_FORMATS) if value else None


def _dtype(value: Any) -> str | None:
    return one_of("result_dtype", value, _DTYPES) if value else None


class InferenceOptions(BaseModel):
    """The options of any inference; what else a request holds is ignored.

    Validators raise HTTPException, which pydantic passes on: the first bad option is answered with its sentence.
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
    """A request to segment a scan; the tasks that need more extend it."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    scan: RequestedScan
    options: InferenceOptions


def find_scan(image: Any, datastore: Datastore, folders: Sequence[Path], uploads: Path | None) -> RequestedScan:
    """Find the scan that a request calls ``image``: an id, or the path of an upload.

    An id comes first: MONAI Label tries the name as a path on the server's disk before it looks for the id. Only paths
    below ``folders`` and ``uploads`` are opened, and none in a hidden folder, such as that of deleted files; links are
    followed before that is checked.

    Raises:
        HTTPException: 400 without a name, 403 for a path outside these folders, 404 for a scan that does not exist.
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
