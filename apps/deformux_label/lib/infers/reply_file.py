"""A writer of the label file of a reply."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from deformux_label.lib.requests.inference import InferenceRequest
from deformux_label.lib.store.volume_writer import write_result

__all__ = ["write_reply"]


def write_reply(labels: np.ndarray, affine: np.ndarray, request: InferenceRequest, names: Mapping[str, int]) -> str:
    """Write labels ``(X, Y, Z)`` in the requested format, and return the path; ``affine`` maps voxels to RAS mm."""
    options = request.options
    return write_result(
        labels,
        affine,
        names,
        image=request.scan.path,
        extension=options.result_extension,
        dtype=options.result_dtype,
    )
