"""The uploaded label file of an inference request, and the name of its active label."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fastapi import HTTPException

__all__ = ["label_file_of"]


def label_file_of(
    request: Mapping[str, Any], names: Collection[str], uploads: Path | None
) -> tuple[Path | None, str | None]:
    """Return the uploaded label file and the active label of an inference request, or None for each.

    Raises:
        HTTPException: 400 if ``label`` is not a name, 403 if it names a file that was not uploaded.
    """
    label, active = request.get("label"), request.get("active_label")
    for value in (label, active):
        if value is not None and not isinstance(value, str):
            raise HTTPException(400, f"label must be the name of one label; got {value!r}")
    if not label or label in names or ("/" not in label and "\\" not in label):
        return None, active or label or None
    path = None if "\0" in label else Path(label).resolve()
    if path is None or uploads is None or not path.is_relative_to(uploads.resolve()) or not path.is_file():
        raise HTTPException(403, "label must be the name of a label; send a label file as a part of the request")
    return path, active or None
