"""Headers of NRRD files, with the geometry that ITK and Slicer give them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from deformux.data.header import LPS_TO_RAS, InvalidVolume, VolumeHeader, affine_of, check_shape, one_volume

__all__ = ["is_segmentation", "nrrd_header"]

_MAX_HEADER_LENGTH = 4 * 2**20
_MAX_AXES = 16
_TYPES = {
    "i1": ("signed char", "int8", "int8_t"),
    "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "i4": ("int", "signed int", "int32", "int32_t"),
    "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
    "i8": ("longlong", "long long", "long long int", "signed long long", "signed long long int", "int64", "int64_t"),
    "u8": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"),
    "f4": ("float",),
    "f8": ("double",),
}
_TYPE_OF = {name: dtype for dtype, names in _TYPES.items() for name in names}
_ENCODINGS = {
    "raw": "raw", "gzip": "gzip", "gz": "gzip", "bzip2": "bzip2", "bz2": "bzip2", "ascii": "text", "text": "text",
    "txt": "text", "hex": "hex",
}  # fmt: skip
_FILE_POINTERS = ("datafile", "datafiles")
# Kinds of axes along space or time; all others hold several numbers for one place.
_DOMAINS = ("domain", "space", "time", "???", "none", "")
_COLOURS = ("rgb-color", "rgba-color", "hsv-color", "xyz-color", "3-color", "4-color")
# Signs that turn a space's directions into ITK's left, posterior, superior; any other space is treated as that.
_TO_LPS = {
    "right-anterior-superior": (-1.0, -1.0, 1.0), "ras": (-1.0, -1.0, 1.0),
    "left-anterior-superior": (1.0, -1.0, 1.0), "las": (1.0, -1.0, 1.0),
}  # fmt: skip
_WITH_TIME = re.compile(r".*-time|rast|last|lpst")
_SEGMENT = re.compile(r"Segment[0-9]+_(ID|Name|LabelValue)|Segmentation_\w+")

_Vector = npt.NDArray[np.float64]


def is_segmentation(fields: dict[str, str] | VolumeHeader) -> bool:
    """Return whether a NRRD file names segments, as Slicer's ``.seg.nrrd`` files do."""
    pairs = fields.fields if isinstance(fields, VolumeHeader) else fields
    return any(_SEGMENT.fullmatch(key) for key in pairs)


def nrrd_header(name: str, file: BinaryIO, size: int) -> VolumeHeader:
    """Read the header of an open file of ``size`` bytes, from its beginning.

    Raises:
        InvalidVolume: it is damaged, or does not describe one scalar volume in this file.
    """
    fields, pairs = _fields(name, file)
    if any(key in fields for key in _FILE_POINTERS):
        raise InvalidVolume(f"{name} has its voxels in another file; expected a volume stored in a single file")
    header = _Header(name, fields, pairs)
    file_shape = header.sizes()
    check_shape(name, file_shape)
    dtype, encoding = header.dtype(), header.encoding()
    axes = header.axes(len(file_shape))
    layers, layer_axis = header.layers(file_shape, axes)
    rest = [1 if axis == layer_axis and layers > 1 else n for axis, n in enumerate(file_shape)]
    shape = one_volume(name, rest, axes.spatial, header.others(rest, axes))
    affine = LPS_TO_RAS @ header.affine(axes)
    start, skip = file.tell(), header.number("byteskip")
    for _ in range(max(0, header.number("lineskip"))):
        if not file.readline(_MAX_HEADER_LENGTH):
            break
        start = file.tell()
    if encoding == "raw" and skip:
        # -1: the voxels fill the end of the file.
        start = size - math.prod(file_shape) * dtype.itemsize if skip < 0 else start + skip
        skip = 0
    if not 0 <= skip <= _MAX_HEADER_LENGTH or not 0 <= start <= size:
        raise header.damaged("it gives no place for the voxels")
    return VolumeHeader(
        shape, affine, file_shape, dtype, encoding, start, skip, layers=layers, layer_axis=layer_axis, fields=pairs
    )


@dataclass(frozen=True)
class _Axes:
    """The axes of a file: their directions ``(n)`` in the file's space or None, and which are spatial."""

    directions: Sequence[_Vector | None] | None
    kinds: Sequence[str]
    spatial: Sequence[int]


@dataclass(frozen=True)
class _Header:
    name: str
    fields: dict[str, str]
    pairs: dict[str, str]

    def damaged(self, why: str) -> InvalidVolume:
        return InvalidVolume(f"{self.name} cannot be read: its NRRD header is damaged, {why}")

    def sizes(self) -> tuple[int, ...]:
        try:
            n = int(self.fields["dimension"])
            sizes = tuple(int(part) for part in self.fields["sizes"].split())
        except (KeyError, ValueError) as error:
            raise self.damaged("it gives no sizes") from error
        if not 1 <= n <= _MAX_AXES or len(sizes) != n:
            raise self.damaged("its sizes do not match its dimension")
        return sizes

    def dtype(self) -> np.dtype:
        given = " ".join(self.fields.get("type", "").lower().split())
        if given not in _TYPE_OF:
            raise self.damaged("it gives no type of numbers")
        dtype = np.dtype(_TYPE_OF[given])
        endian = self.fields.get("endian", "").lower()
        if endian == "big":
            return dtype.newbyteorder(">")
        if endian != "little" and dtype.itemsize > 1 and self.encoding() != "text":
            raise self.damaged("it gives no byte order")
        return dtype.newbyteorder("<")

    def encoding(self) -> str:
        given = self.fields.get("encoding", "").lower()
        if given not in _ENCODINGS:
            raise self.damaged("it gives no known encoding")
        return _ENCODINGS[given]

    def number(self, field: str) -> int:
        try:
            return int(self.fields.get(field, "0"))
        except ValueError as error:
            raise self.damaged(f"{field} is not a number") from error

    def axes(self, n: int) -> _Axes:
        kinds = _words(self.fields.get("kinds", ""), n, "").copy()
        directions = self._directions(n)
        domains = [axis for axis in range(n) if kinds[axis] in _DOMAINS]
        if directions is not None and any(d is not None for d in directions):
            domains = [axis for axis in domains if directions[axis] is not None]
        # Time follows the three spatial axes.
        return _Axes(directions, kinds, domains[:3])

    def layers(self, file_shape: Sequence[int], axes: _Axes) -> tuple[int, int]:
        """Return the number of layers of a segmentation and their axis; 1 and 0 for any other file."""
        others = [axis for axis in range(len(file_shape)) if axis not in axes.spatial and file_shape[axis] > 1]
        if len(others) == 1 and is_segmentation(self.pairs):
            return file_shape[others[0]], others[0]
        return 1, 0

    def others(self, file_shape: Sequence[int], axes: _Axes) -> str:
        kinds = [axes.kinds[axis] for axis, n in enumerate(file_shape) if axis not in axes.spatial and n > 1]
        if any(kind in _COLOURS for kind in kinds):
            return "values in each voxel: it is a colour image"
        if any(kind not in (*_DOMAINS, "list") for kind in kinds):
            return "values in each voxel: it is a vector image"
        return "time points or channels" if "list" in kinds else "time points"

    def affine(self, axes: _Axes) -> _Vector:
        """Return the map from voxels of the spatial axes to LPS millimetres, not yet checked."""
        n = len(axes.spatial)
        space = self.fields.get("space", "").lower()
        if axes.directions is None or all(d is None for d in axes.directions):
            return self._without_directions(axes)
        directions = [axes.directions[axis] for axis in axes.spatial]
        steps = np.array([d for d in directions if d is not None])
        origin = self._vector(self.fields.get("spaceorigin", ""), steps.shape[1])
        if _WITH_TIME.fullmatch(space) or (steps.shape[1] == 4 and n == 3):
            # Slicer keeps voxel sizes but no directions of a file with time, also in labels drawn on it.
            return affine_of(np.diag(np.linalg.norm(steps[:, :3], axis=1)), origin[:3])
        if steps.shape[1] == 3 and n == 2:
            normal = np.cross(*steps)
            steps = np.vstack([steps, normal / max(float(np.linalg.norm(normal)), 1e-300)])
        signs = np.array(_TO_LPS.get(space, (1.0, 1.0, 1.0)))[: steps.shape[1]]
        if len(steps) != steps.shape[1]:
            raise self.damaged("its space directions do not match its axes")
        return affine_of((steps * signs).T, origin * signs)

    def _without_directions(self, axes: _Axes) -> _Vector:
        n = len(axes.spatial)
        n_axes = len(axes.kinds)
        spacings = self._numbers("spacings", n_axes)
        in_space = "space" in self.fields or "spacedimension" in self.fields
        if in_space and spacings is not None and any(math.isfinite(spacings[axis]) for axis in axes.spatial):
            raise InvalidVolume(
                f"{self.name} has spacings in a space, but no directions; expected `space directions`, or `spacings` "
                "without a `space`"
            )
        sizes = [1.0 if spacings is None or math.isnan(spacings[axis]) else spacings[axis] for axis in axes.spatial]
        origin = np.zeros(n)
        if in_space:
            space = self.fields.get("space", "").lower()
            signs = np.array(_TO_LPS.get(space, (1.0, 1.0, 1.0)))[:n]
            origin = self._vector(self.fields.get("spaceorigin", ""), n) * signs
        elif (minima := self._numbers("axismins", n_axes)) is not None:
            origin = self._first_centres(minima, axes, sizes)
        return affine_of(np.diag(sizes), origin)

    def _first_centres(self, minima: Sequence[float], axes: _Axes, sizes: Sequence[float]) -> _Vector:
        """Return the centre of the first voxel of axes that begin at a minimum: half a voxel on, except for nodes."""
        centers = _words(self.fields.get("centerings", self.fields.get("centers", "")), len(axes.kinds), "cell")
        origin = [
            minima[axis] + (0.0 if centers[axis] == "node" else step / 2)
            for axis, step in zip(axes.spatial, sizes, strict=True)
        ]
        return np.array(origin) if np.isfinite(origin).all() else np.zeros(len(origin))

    def _directions(self, n: int) -> list[_Vector | None] | None:
        if "spacedirections" not in self.fields:
            return None
        parts = re.findall(r"none|\([^()]*\)", self.fields["spacedirections"].lower())
        if len(parts) != n:
            raise self.damaged("its space directions do not match its axes")
        found = [None if part == "none" else self._coordinates(part) for part in parts]
        if len({len(vector) for vector in found if vector is not None}) > 1:
            raise self.damaged("its space directions differ in length")
        return found

    def _vector(self, text: str, n: int) -> _Vector:
        if not text:
            return np.zeros(n)
        vector = self._coordinates(text)
        if len(vector) < n:
            raise self.damaged("its space origin has too few coordinates")
        return vector[:n]

    def _coordinates(self, text: str) -> _Vector:
        try:
            return np.array([float(part) for part in text.strip().strip("()").split(",")])
        except ValueError as error:
            raise self.damaged("it has a vector that is not made of numbers") from error

    def _numbers(self, field: str, n: int) -> list[float] | None:
        if field not in self.fields:
            return None
        try:
            values = [float(part) for part in self.fields[field].split()]
        except ValueError as error:
            raise self.damaged(f"{field} is not made of numbers") from error
        if len(values) != n:
            raise self.damaged(f"{field} does not match its axes")
        return values


def _fields(name: str, file: BinaryIO) -> tuple[dict[str, str], dict[str, str]]:
    """Read the header's fields, their names in lower case and without spaces, and its key/value pairs."""
    if not re.fullmatch(rb"NRRD000[1-6]\r?\n", file.readline(16)):
        raise InvalidVolume(f"{name} cannot be read: it is damaged, or not a NRRD file")
    fields: dict[str, str] = {}
    pairs: dict[str, str] = {}
    left = _MAX_HEADER_LENGTH
    while True:
        line = file.readline(left)
        left -= len(line)
        if not line.endswith(b"\n"):
            raise InvalidVolume(f"{name} cannot be read: it is damaged, its NRRD header has no end")
        text = line.decode("utf-8", "replace").strip("\r\n")
        if not text:
            return fields, pairs
        if text.startswith("#"):
            continue
        key, value = re.match(r"([^:]*):?(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
        if value.startswith("="):
            pairs[key] = value[1:].replace("\\n", "\n")
        else:
            fields[re.sub(r"\s", "", key.lower())] = value.strip()


def _words(text: str, n: int, missing: str) -> list[str]:
    """Return one word for each axis, in lower case."""
    words = text.lower().split()
    return words if len(words) == n else [missing] * n
