"""Conversion of a DICOM series to one volume; headers are checked before any pixel is decoded."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
from monai.transforms import LoadImage
from pydicom import Dataset, dcmread
from pydicom.filereader import read_file_meta_info
from pydicom.uid import DeflatedExplicitVRLittleEndian

from deformux.data.header import check_shape
from deformux.data.volume_reader import InvalidVolume, is_compressed_too_far

__all__ = ["write_series"]

_NAME = "the DICOM series"
_SIZES = ["SamplesPerPixel", "NumberOfFrames", "Rows", "Columns", "BitsAllocated"]
_DEFERRED_BYTES = 1_024
_UNREADABLE = "the DICOM files cannot be read as the slices of one series"


def write_series(folder: Path, target: Path) -> None:
    """Write the DICOM files of a folder as one NIfTI.

    Raises:
        InvalidVolume: the files are not one volume, or it would be too large.
    """
    files = sorted(folder.iterdir())
    _check_headers(files)
    try:
        loaded = LoadImage(image_only=True)(folder)
    except Exception as error:  # each of MONAI's readers raises different errors
        raise InvalidVolume(_UNREADABLE) from error
    image = nib.Nifti1Image(np.asarray(loaded), np.asarray(loaded.affine, dtype=float))
    image.header.set_xyzt_units("mm")
    nib.save(image, target)


def _check_headers(files: list[Path]) -> None:
    """Refuse files for which a decoder, which trusts their headers, would allocate too much memory."""
    shapes = []
    for file in files:
        header, stored = _header(file)
        samples, frames = (_number(header, name, 1) for name in ("SamplesPerPixel", "NumberOfFrames"))
        rows, columns, bits = (_number(header, name, 0) for name in ("Rows", "Columns", "BitsAllocated"))
        if samples != 1:
            raise InvalidVolume(f"{_NAME} has {samples} values in each pixel; expected one, as of a scan")
        shapes.append((columns, rows, frames))
        check_shape(_NAME, (columns, rows, frames * len(files)))
        n_bytes = rows * columns * frames * bits // 8
        # Only a decoder knows the number of compressed pixels.
        if is_compressed_too_far(n_bytes, file.stat().st_size) if stored is None else n_bytes > stored:
            raise InvalidVolume(
                f"{_NAME} is damaged: a file has fewer pixels than the {frames} x {rows} x {columns} of its header"
            )
    if len(set(shapes)) > 1:
        raise InvalidVolume(f"{_UNREADABLE}: they have different sizes")


def _header(file: Path) -> tuple[Dataset, int | None]:
    """Return the header of a file, and the stored bytes of its pixels; None if they are compressed."""
    try:
        syntax = read_file_meta_info(file).TransferSyntaxUID
        if syntax.is_encapsulated:
            return dcmread(file, stop_before_pixels=True, specific_tags=_SIZES), None
        # A deflated file can only be inflated completely.
        if syntax != DeflatedExplicitVRLittleEndian:
            header = dcmread(file, defer_size=_DEFERRED_BYTES, specific_tags=[*_SIZES, "PixelData"])
            pixels = header.get_item("PixelData")
            # A truncated file is shorter than its length field.
            return header, min(getattr(pixels, "length", 0), file.stat().st_size)
    except Exception as error:  # damaged parts make pydicom raise all kinds of errors
        raise InvalidVolume(_UNREADABLE) from error
    raise InvalidVolume(f"{_NAME} is deflated as a whole; expected files that are not, or compressed images")


def _number(header: Dataset, name: str, least: int) -> int:
    value = getattr(header, name, None)
    try:
        return max(least, int(value)) if value is not None else least
    except (TypeError, ValueError) as error:
        raise InvalidVolume(_UNREADABLE) from error
