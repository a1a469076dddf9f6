"""Checks of an upload before it is stored: suffix, metadata, and a free name."""

from __future__ import annotations

import filecmp
import glob
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi import HTTPException

from deformux.data.volume_reader import VOLUME_SUFFIXES
from deformux_label.lib.requests.identifiers import refuse_invalid_text
from deformux_label.lib.store.trash import Trash
from deformux_label.lib.store.volumes import LABEL_SUFFIXES, free_id

__all__ = ["checked_info", "checked_suffix", "refuse_taken"]


def checked_suffix(path: str, suffixes: tuple[str, ...] = LABEL_SUFFIXES) -> str:
    """Return the suffix of a file in lower case; raise HTTPException 422 unless it is one of ``suffixes``."""
    for suffix in suffixes:
        if path.lower().endswith(suffix):
            return suffix
    kind = os.path.splitext(path)[1] or "without a suffix"
    raise HTTPException(422, f"a file {kind} cannot be stored as a volume; send one of {', '.join(VOLUME_SUFFIXES)}")


def checked_info(info: Any) -> dict[str, Any]:
    """Return a client's metadata of a volume or a label, as JSON that can be stored and sent again.

    Raises:
        HTTPException: 400.
    """
    if info is not None and not isinstance(info, dict):
        raise HTTPException(400, f"params must be a JSON object; got {type(info).__name__}")
    refuse_invalid_text(info)
    try:
        json.dumps(info, allow_nan=False)
    except ValueError as error:
        # Once stored, such a value would break every later listing of the datastore.
        raise HTTPException(400, "params must be JSON without NaN or Infinity") from error
    return dict(info or {})


def refuse_taken(
    name: str,
    suffix: str,
    upload: str,
    root: Path,
    objects: Mapping[str, object],
    with_labels: Mapping[str, object],
    trash: Trash,
) -> None:
    """Refuse an upload if its name belongs to a different volume, or to the labels of a deleted one.

    Raises:
        HTTPException: 409, with a free name.
    """

    def taken(name: str) -> bool:
        return (
            name in objects
            or name in with_labels
            or os.path.lexists(root / (name + suffix))
            or any(any(root.glob(f"labels/*/{glob.escape(name)}{suffix}")) for suffix in LABEL_SUFFIXES)
        )

    if not taken(name):
        return
    if name in objects or os.path.lexists(root / (name + suffix)):
        why = f"a different volume has the name {name!r}, and is not replaced"
    elif _was_deleted(name, upload, trash):
        return
    else:
        why = f"labels of a different volume are kept under the name {name!r}"
    raise HTTPException(409, f"{why}; upload this one under a different id, such as {free_id(name, taken)!r}")


def _was_deleted(name: str, upload: str, trash: Trash) -> bool:
    """Return whether the same bytes were deleted under this name, so that the kept labels belong to this volume."""
    files = [trash.files(entry).get("image") for entry in trash.entries() if entry.image == name]
    return any(file is not None and file.is_file() and filecmp.cmp(upload, file, shallow=False) for file in files)
