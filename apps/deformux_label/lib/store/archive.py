"""A zip file with all labelled volumes."""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

from deformux_label.lib.store.volumes import LABEL_SUFFIXES, split_suffix

__all__ = ["write_archive"]


def write_archive(cases: Mapping[str, tuple[Mapping[str, str], str]], metadata: str) -> str:
    """Write ``image/<id>…``, ``label/<id>…`` and ``metadata.json`` to a new zip file, and return its path.

    ``cases`` maps an id to the paths of the volume, by name, and of the label. Entries are named by id, because volumes
    in different folders may have the same file name; sequences of a volume have their suffix after it.
    """
    handle, path = tempfile.mkstemp(suffix=".zip")
    os.close(handle)
    try:
        with zipfile.ZipFile(path, mode="w") as archive:
            for case, (images, label) in cases.items():
                for folder, name, file in (*(("image", *image) for image in images.items()), ("label", case, label)):
                    suffix = (split_suffix(file, LABEL_SUFFIXES) or ("", ""))[1]
                    archive.write(file, arcname=f"{folder}/{name}{suffix}")
            archive.writestr("metadata.json", metadata)
    except BaseException:
        Path(path).unlink(missing_ok=True)
        raise
    return path
