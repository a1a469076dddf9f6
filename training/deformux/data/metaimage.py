"""Headers of MetaImage files, with the geometry that ITK and Slicer give them."""

from __future__ import annotations

import math
import re
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from deformux.data.header import LPS_TO_RAS, InvalidVolume, VolumeHeader, affine_of, check_shape, one_volume

__all__ = ["metaimage_header"]

_MAX_HEADER_LENGTH = 2**20
_MAX_AXES = 10
# MetaIO's long has four bytes on every platform.
_TYPES = {
    "MET_CHAR": "i1", "MET_ASCII_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2",
    "MET_INT": "i4", "MET_UINT": "u4", "MET_LONG": "i4", "MET_ULONG": "u4", "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4", "MET_DOUBLE": "f8",
}  # fmt: skip


def metaimage_header(name: str, file: BinaryIO, size: int) -> VolumeHeader:
    """Read the header of an open file of ``size`` bytes, from its beginning.

    Raises:
        InvalidVolume: it is damaged, or does not describe one scalar volume in this file.
    """
    fields = _fields(name, file)
    # A header size is given for voxels in another file, behind a header of its own.
    elsewhere = fields["ElementDataFile"].upper() != "LOCAL" or fields.get("HeaderSize", "0") not in ("0", "-1")
    if elsewhere:
        raise InvalidVolume(f"{name} has its voxels in another file; expected a volume stored in a single file")
    numbers = _Numbers(name, fields)
    n = numbers.whole("NDims", 0)
    if not 1 <= n <= _MAX_AXES:
        raise numbers.damaged("it gives no number of dimensions")
    file_shape = tuple(int(v) for v in numbers.floats("DimSize", n, None))
    check_shape(name, file_shape)
    kind = fields.get("ElementType", "")
    channels = numbers.whole("ElementNumberOfChannels", 1)
    if channels != 1:
        raise InvalidVolume(
            f"{name} is a colour or vector image of {channels} values in each voxel; expected one number"
        )
    if kind.removesuffix("_ARRAY") not in _TYPES:
        raise numbers.damaged("it gives no type of numbers")
    dtype = np.dtype(_TYPES[kind.removesuffix("_ARRAY")])
    big = any(_is_true(fields.get(key, "")) for key in ("BinaryDataByteOrderMSB", "ElementByteOrderMSB"))
    encoding = "raw"
    if not _is_true(fields.get("BinaryData", "True")):
        encoding = "text"
    elif _is_true(fields.get("CompressedData", "")):
        encoding = "zlib"
    start = file.tell()
    if encoding == "raw" and fields.get("HeaderSize") == "-1":
        start = max(start, size - math.prod(file_shape) * dtype.itemsize)
    return VolumeHeader(
        shape=one_volume(name, file_shape, range(min(n, 3))),
        affine=LPS_TO_RAS @ numbers.affine(n),
        file_shape=file_shape,
        dtype=dtype.newbyteorder(">" if big else "<"),
        encoding=encoding,
        start=start,
    )


class _Numbers:
    """The numbers of a header's fields."""

    def __init__(self, name: str, fields: dict[str, str]) -> None:
        self.name = name
        self.fields = fields

    def damaged(self, why: str) -> InvalidVolume:
        return InvalidVolume(f"{self.name} cannot be read: its MetaImage header is damaged, {why}")

    def whole(self, key: str, missing: int) -> int:
        (value,) = self.floats(key, 1, [float(missing)])
        if not math.isfinite(value) or value != int(value):
            raise self.damaged(f"{key} is not a whole number")
        return int(value)

    def floats(self, key: str, n: int, missing: list[float] | None) -> npt.NDArray[np.float64]:
        if key not in self.fields and missing is not None:
            return np.array(missing)
        try:
            values = np.array([float(part) for part in self.fields.get(key, "").split()])
        except ValueError as error:
            raise self.damaged(f"{key} is not made of numbers") from error
        if len(values) != n or (key in ("DimSize", "NDims") and not np.isfinite(values).all()):
            raise self.damaged(f"{key} must be {n} numbers")
        return values

    def affine(self, n: int) -> npt.NDArray[np.float64]:
        """Return the map from voxels to LPS millimetres, not yet checked; ITK ignores ``AnatomicalOrientation``."""
        spacing_key, matrix_key, origin_key = (
            next((key for key in keys if key in self.fields), keys[0])
            for keys in (
                ("ElementSpacing", "ElementSize"),
                ("TransformMatrix", "Rotation", "Orientation"),
                ("Offset", "Position", "Origin"),
            )
        )
        spacing = self.floats(spacing_key, n, [1.0] * n)
        directions = self.floats(matrix_key, n * n, np.eye(n).ravel().tolist()).reshape(n, n).T
        origin = self.floats(origin_key, n, [0.0] * n)
        if n > 3:
            # Slicer drops the directions of a file with time, also in labels drawn on it.
            directions = np.eye(3)
        return affine_of(directions * spacing[:3], origin[:3])


def _fields(name: str, file: BinaryIO) -> dict[str, str]:
    """Read the header's fields, up to the one that says where the voxels are."""
    fields: dict[str, str] = {}
    left = _MAX_HEADER_LENGTH
    while True:
        line = file.readline(left)
        left -= len(line)
        match = re.fullmatch(r"\s*([^=:]*[^=:\s])\s*[=:](.*)", line.decode("latin-1").rstrip("\r\n"))
        if not match or not line.endswith(b"\n"):
            raise InvalidVolume(f"{name} cannot be read: it is damaged, or not a MetaImage file")
        fields[match[1]] = match[2].strip()
        if match[1] == "ElementDataFile":
            return fields


def _is_true(value: str) -> bool:
    return value[:1] in ("T", "t", "1")
