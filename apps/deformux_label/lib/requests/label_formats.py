"""Formats in which a client may request a label."""

from __future__ import annotations

__all__ = ["LABEL_FORMATS"]

# The first is the default if the image's own format is not one of these.
LABEL_FORMATS = (".nii.gz", ".nii", ".seg.nrrd", ".nrrd")
