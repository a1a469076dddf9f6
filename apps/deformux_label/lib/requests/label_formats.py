"""The formats in which a client may ask for a label."""

from __future__ import annotations

__all__ = ["LABEL_FORMATS"]

# The first is written where a request names none and the image has another.
LABEL_FORMATS = (".nii.gz", ".nii", ".seg.nrrd", ".nrrd")
