"""Writers of label volumes in the format that a client requests."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import nrrd
import numpy as np

from deformux.data.label_values import in_file_order
from deformux_label.lib.requests.label_formats import LABEL_FORMATS
from deformux_label.lib.requests.request_folder import request_folder

__all__ = ["write_labels", "write_result"]

_RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0])


def write_result(
    labels: np.ndarray,
    affine: np.ndarray,
    names: Mapping[str, int],
    *,
    image: str,
    extension: str | None = None,
    dtype: str | None = None,
) -> str:
    """Write the labels of a reply to a new file and return its path.

    Args:
        labels: ``(X, Y, Z)``.
        affine: maps voxels to RAS millimetres.
        names: the labels' names and values.
        image: name of the scan's file; its format is used if ``extension`` is None and it can hold labels.
        extension: the requested format.
        dtype: the requested type; uint8 for None.
    """
    own = next((suffix for suffix in LABEL_FORMATS if image.endswith(suffix)), LABEL_FORMATS[0])
    handle, path = tempfile.mkstemp(suffix=extension or own, dir=request_folder())
    os.close(handle)
    write_labels(Path(path), labels.astype(np.dtype(dtype or "uint8"), copy=False), affine, names)
    return path


def write_labels(path: Path, labels: np.ndarray, affine: np.ndarray, names: Mapping[str, int]) -> None:
    """Write labels ``(X, Y, Z)`` in the format of the suffix of ``path``; ``affine`` maps voxels to RAS millimetres.

    MONAI Label's own writer transposes the directions of oblique ``.seg.nrrd`` files and writes NIfTI through ITK,
    which refuses directions that are orthonormal only up to rounding.
    """
    labels = in_file_order(labels)
    if path.name.endswith((".nii", ".nii.gz")):
        image = nib.Nifti1Image(labels, affine)
        image.header.set_xyzt_units("mm")
        image.set_sform(affine, code=1)
        # A qform cannot hold a shear, and takes precedence over an sform that has one.
        directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
        image.set_qform(affine, code=int(np.allclose(directions.T @ directions, np.eye(3), atol=1e-4)))
        nib.save(image, path)
        return
    header: dict[str, Any] = {
        "space": "left-posterior-superior",
        "space directions": (_RAS_TO_LPS @ affine[:3, :3]).T,  # one row per voxel axis
        "space origin": _RAS_TO_LPS @ affine[:3, 3],
        "kinds": ["domain"] * 3,
        "encoding": "gzip",
    }
    if path.name.endswith(".seg.nrrd"):
        header |= _segments(labels.shape, names)
    nrrd.write(str(path), labels, header, compression_level=1)


def _segments(shape: tuple[int, ...], names: Mapping[str, int]) -> dict[str, str]:
    """Return the header fields by which Slicer names the segments of a label volume."""
    extent = " ".join(f"0 {n - 1}" for n in shape)
    fields = {
        "Segmentation_MasterRepresentation": "Binary labelmap",
        "Segmentation_ContainedRepresentationNames": "Binary labelmap|",
        "Segmentation_ReferenceImageExtentOffset": "0 0 0",
    }
    for index, (name, value) in enumerate(names.items()):
        fields |= {
            f"Segment{index}_ID": name,
            f"Segment{index}_Name": name,
            f"Segment{index}_LabelValue": str(value),
            f"Segment{index}_Layer": "0",
            f"Segment{index}_Extent": extent,
        }
    return fields
