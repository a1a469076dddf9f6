"""The reader of volumes: scans and labels, in every format that is served.

The header is read and checked before any voxel. Everything it names must be in the file itself, and messages quote
nothing of a file. Positions are those that ITK and Slicer give the same file.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from deformux.data.header import InvalidVolume, VolumeHeader, check_affine
from deformux.data.metaimage import metaimage_header
from deformux.data.nifti import nifti_header
from deformux.data.nrrd import nrrd_header
from deformux.data.streams import Damaged, is_too_short, open_voxels

__all__ = [
    "VOLUME_SUFFIXES",
    "InvalidVolume",
    "OpenVolume",
    "Volume",
    "is_compressed_too_far",
    "open_volume",
    "read_volume",
    "volume_suffix",
]

VOLUME_SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".mha")
# The first bytes of a NIfTI file that hold the header of either version.
_NIFTI_START = 540
_GZIP = b"\x1f\x8b"
# Bytes decoded and converted at a time.
_SLAB = 4 * 2**20
# Scans, with their noise, compress to a tenth; masked ones to a hundredth. Anything smaller holds no scan.
_MAX_COMPRESSED_SCAN, _SMALL_SCAN = 250, 64 * 2**20


@dataclass(frozen=True)
class Volume:
    """The voxels of a file ``(X, Y, Z)``, or ``(L, X, Y, Z)`` of several layers, and its header."""

    values: npt.NDArray
    header: VolumeHeader

    @property
    def affine(self) -> npt.NDArray[np.float64]:
        """Map from voxels to RAS millimetres, ``(4, 4)``."""
        return self.header.affine


@dataclass(frozen=True)
class OpenVolume:
    """An open file whose header is usable."""

    name: str
    header: VolumeHeader
    file: BinaryIO
    size: int

    def refuse_constant(self) -> None:
        """Refuse a file compressed too far to be a scan, without decompressing it.

        Raises:
            InvalidVolume: it is compressed too far.
        """
        header = self.header
        compressed = header.encoding in ("gzip", "zlib", "bzip2")
        if compressed and is_compressed_too_far(header.n_bytes, self.size) and not is_too_short(self.size, header):
            raise InvalidVolume(
                f"{self.name} is compressed {header.n_bytes // self.size} times, so that it has almost the same "
                "intensity everywhere; expected a scan"
            )

    def read(self, dtype: npt.DTypeLike = np.float32) -> Volume:
        """Read the voxels, using no more memory than they take in ``dtype``.

        Raises:
            InvalidVolume: they end too early, or are damaged.
        """
        header = self.header
        try:
            stream = open_voxels(self.file, self.size, header)
            *within, last = header.file_shape
            values = np.empty(header.file_shape, dtype=dtype)
            row = math.prod(within) * header.dtype.itemsize
            step = max(1, _SLAB // row)
            buffer = bytearray(row * min(step, last))
            for begin in range(0, last, step):
                n = min(step, last - begin)
                block = memoryview(buffer)[: n * row]
                _fill(block, stream.read)
                slab = np.frombuffer(block, dtype=header.dtype).reshape(n, *within[::-1])
                values[..., begin : begin + n] = _scaled(slab, header).T
            stream.finish()
        except Damaged as error:
            raise self._damaged() from error
        if header.layers > 1:
            values = np.moveaxis(values, header.layer_axis, 0)
            return Volume(values.reshape(header.layers, *header.shape), header)
        return Volume(values.reshape(header.shape), header)

    def read_slices(self, count: int, *, most_bytes: int) -> npt.NDArray[np.float32]:
        """Read evenly spaced slices ``(X, Y, n)`` along the file's last axis, as float32, from its first bytes.

        Args:
            count: largest number of slices.
            most_bytes: decoded bytes after which nothing more is read, beyond the first slice.

        Raises:
            InvalidVolume: the voxels end too early, or are damaged.
        """
        header = self.header
        sizes = list(header.file_shape)
        while len(sizes) > 1 and sizes[-1] == 1:
            sizes.pop()
        *within, last = sizes
        row = math.prod(within) * header.dtype.itemsize
        reachable = max(1, min(last, most_bytes // row))
        wanted = {int(index) for index in np.linspace(0, reachable - 1, min(count, reachable)).round()}
        found = []
        block = memoryview(bytearray(row))
        try:
            stream = open_voxels(self.file, self.size, header)
            for index in range(max(wanted) + 1):
                _fill(block, stream.read)
                if index in wanted:
                    values = _scaled(np.frombuffer(block, dtype=header.dtype), header)
                    found.append(values.astype(np.float32).reshape(within, order="F"))
        except Damaged as error:
            raise self._damaged() from error
        return np.stack(found, axis=-1)

    def _damaged(self) -> InvalidVolume:
        return InvalidVolume(f"{self.name} cannot be read: its voxels are damaged, or the file is cut off")


def is_compressed_too_far(n_bytes: int, size: int) -> bool:
    """Return whether a file of ``size`` bytes is too small for the noise of a scan of ``n_bytes`` in memory."""
    return n_bytes > _SMALL_SCAN and n_bytes > _MAX_COMPRESSED_SCAN * size


def volume_suffix(name: str) -> str | None:
    """Return the suffix of a volume's file name as written, such as ``.NII.GZ``, or None if it has none."""
    lower = name.lower()
    return next((name[-len(suffix) :] for suffix in VOLUME_SUFFIXES if lower.endswith(suffix)), None)


@contextmanager
def open_volume(path: Path) -> Iterator[OpenVolume]:
    """Open a file and read its header, in the format of its suffix.

    Raises:
        InvalidVolume: it cannot be opened, or its header is not usable.
    """
    suffix = (volume_suffix(path.name) or "").lower()
    if not suffix:
        raise InvalidVolume(
            f"{path.name} cannot be read as a volume; expected a file named {', '.join(VOLUME_SUFFIXES)}"
        )
    with _opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        if suffix == ".nrrd":
            header = nrrd_header(path.name, file, size)
        elif suffix == ".mha":
            header = metaimage_header(path.name, file, size)
        else:
            header = _nifti(path.name, file, suffix)
        check_affine(path.name, header.affine)
        yield OpenVolume(path.name, header, file, size)


def read_volume(path: Path, dtype: npt.DTypeLike = np.float32) -> Volume:
    """Read a whole file.

    Raises:
        InvalidVolume: it is not usable.
    """
    with open_volume(path) as opened:
        return opened.read(dtype)


def _opened(path: Path) -> BinaryIO:
    try:
        # Do not wait for the writer of a pipe.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        file = os.fdopen(descriptor, "rb")
    except (OSError, ValueError) as error:
        what = "it is a folder" if isinstance(error, IsADirectoryError) else "there is no such file"
        if isinstance(error, PermissionError):
            what = "its permissions forbid it"
        raise InvalidVolume(f"{path.name} cannot be read: {what}") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise InvalidVolume(f"{path.name} cannot be read: it is not a file")
    return file


def _nifti(name: str, file: BinaryIO, suffix: str) -> VolumeHeader:
    start = file.read(_NIFTI_START)
    compressed = start.startswith(_GZIP)
    if compressed and suffix == ".nii":
        raise InvalidVolume(f"{name} is compressed; rename it to end with .nii.gz, so that every viewer can read it")
    if compressed:
        file.seek(0)
        whole = VolumeHeader((1, 1, 1), np.eye(4), (), np.dtype("u1"), "gzip", 0)
        try:
            stream = open_voxels(file, os.fstat(file.fileno()).st_size, whole)
            start = b""
            while len(start) < _NIFTI_START and (more := stream.read(_NIFTI_START - len(start))):
                start += more
        except Damaged as error:
            raise InvalidVolume(f"{name} cannot be read: it is damaged, or not a NIfTI file") from error
    return nifti_header(name, start, compressed=compressed)


def _fill(block: memoryview, read: Callable[[int], bytes]) -> None:
    done = 0
    while done < len(block):
        found = read(len(block) - done)
        if not found:
            raise Damaged
        block[done : done + len(found)] = found
        done += len(found)


def _scaled(slab: npt.NDArray, header: VolumeHeader) -> npt.NDArray:
    """Turn stored numbers into intensities: 32-bit floats if there is a slope or an intercept, as in ITK."""
    if header.slope == 1 and header.intercept == 0:
        return slab
    return (slab * np.float64(header.slope) + header.intercept).astype(np.float32)
