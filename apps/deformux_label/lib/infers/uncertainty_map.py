"""The option ``uncertainty`` of network tasks: an uncertainty map, and the voxel to review next."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monai.data import MetaTensor
from monailabel.interfaces.datastore import Datastore

from deformux.active_learning.uncertainty_map import Uncertainty
from deformux.data.grid import ScanGrid
from deformux_label.lib.requests.request_folder import request_folder
from deformux_label.lib.store.datastore import CheckedDatastore
from deformux_label.lib.store.label_fields import UNCERTAINTY_TAG
from deformux_label.lib.store.volume_writer import write_labels

__all__ = ["OPTION", "store_uncertainty", "uncertainty_reply"]

# Part of a task's config; the Slicer extension sends the first value of a list by default.
OPTION: Mapping[str, Any] = {"uncertainty": ["off", "on"]}


def uncertainty_reply(found: Uncertainty, image: MetaTensor) -> dict[str, Any]:
    """Return the ``uncertainty`` of a task's reply, for a preprocessed ``image``.

    ``mean`` (0 to 100) and ``look_next`` (a voxel of the scan, or None) are for the client; ``file`` is the map, which
    ``store_uncertainty`` removes.
    """
    handle, path = tempfile.mkstemp(suffix=".nii.gz", dir=request_folder())
    os.close(handle)
    write_labels(Path(path), found.map, ScanGrid.of(image).affine, {})
    look_next = None if found.look_next is None else list(found.look_next)
    return {"tag": None, "look_next": look_next, "mean": round(found.mean, 2), "file": path}


def store_uncertainty(datastore: Datastore, image_id: str | None, params: dict[str, Any]) -> bool:
    """Move the map of a task's reply, if any, into the studies, and name its tag in the reply.

    The map of an image outside the studies, such as an upload, or in read-only studies is dropped; its tag stays None.

    Returns:
        Whether a map was stored.
    """
    reply = params.get("uncertainty")
    if not isinstance(reply, dict):
        return False
    file = Path(reply.pop("file"))
    try:
        if image_id is not None and isinstance(datastore, CheckedDatastore):
            info = {**reply, "model_version": params.get("model_version")}
            if datastore.save_uncertainty(image_id, file, info):
                reply["tag"] = UNCERTAINTY_TAG
        return reply["tag"] is not None
    finally:
        file.unlink(missing_ok=True)
