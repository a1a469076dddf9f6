"""File of features of volumes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from deformux.data.atomic_files import replacing

__all__ = ["read_features", "write_features"]

Features = npt.NDArray[np.float32]


def write_features(path: Path, features: Mapping[str, Features]) -> None:
    """Write a safetensors file of features ``(d,)`` by volume id."""
    rows = np.stack(list(features.values())) if features else np.empty((0, 0))
    with replacing(path) as temporary:
        save_file({"features": rows.astype(np.float32)}, temporary, metadata={"volumes": json.dumps(list(features))})


def read_features(path: Path) -> dict[str, Features]:
    """Invert ``write_features``; return nothing if there is no file, or it cannot be read."""
    try:
        with safe_open(path, framework="numpy") as file:
            rows, names = file.get_tensor("features"), json.loads(file.metadata()["volumes"])
            return dict(zip(names, rows, strict=True))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return {}
