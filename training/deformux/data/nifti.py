"""Headers of NIfTI-1 and NIfTI-2 files, with the geometry that ITK and Slicer give them."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from deformux.data.header import LPS_TO_RAS, InvalidVolume, VolumeHeader, affine_of, check_shape, one_volume

__all__ = ["MAX_HEADER_LENGTH", "nifti_header"]

_Matrix = npt.NDArray[np.float64]
_TYPES = {
    2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8",
}  # fmt: skip
_OTHER_TYPES = {
    1: "a bitmap", 32: "a complex image", 128: "a colour image", 1536: "an image of 128-bit numbers",
    1792: "a complex image", 2048: "a complex image", 2304: "a colour image",
}  # fmt: skip
# Millimetres in each unit of space: unknown, metre, millimetre, micrometre.
_UNITS = {0: 1.0, 1: 1e3, 2: 1.0, 3: 1e-3}
# Bytes before the voxels: the header, and extensions such as a copy of the DICOM header.
MAX_HEADER_LENGTH = 16 * 2**20
# The tolerances by which ITK chooses between the two affines of a header.
_ORTHONORMAL, _SAME_MATRIX, _SAME_OFFSET, _SIMILAR = 1e-4, 1e-5, 1e-7, 1e-4


@dataclass(frozen=True)
class _Layout:
    """Offsets and struct formats of the fields in one version of the header."""

    size: int
    magic: tuple[int, bytes]
    dim: tuple[int, str]
    datatype: tuple[int, str]
    pixdim: tuple[int, str]
    vox_offset: tuple[int, str]
    scaling: tuple[int, str]
    codes: tuple[int, str]
    quaternion: tuple[int, str]
    srow: tuple[int, str]
    units: tuple[int, str]


_NIFTI_1 = _Layout(
    348, (344, b"n+1\0"), (40, "8h"), (70, "h"), (76, "8f"), (108, "f"), (112, "2f"), (252, "2h"), (256, "6f"),
    (280, "12f"), (123, "B"),
)  # fmt: skip
_NIFTI_2 = _Layout(
    540, (4, b"n+2\0\r\n\x1a\n"), (16, "8q"), (12, "h"), (104, "8d"), (168, "q"), (176, "2d"), (344, "2i"),
    (352, "6d"), (400, "12d"), (500, "i"),
)  # fmt: skip


def nifti_header(name: str, start: bytes, *, compressed: bool) -> VolumeHeader:
    """Read the header from the first 540 bytes of a file, decompressed.

    Raises:
        InvalidVolume: it is damaged, or does not describe one scalar volume in this file.
    """
    layout, order = _layout(name, start)

    def values(where: tuple[int, str]) -> tuple[Any, ...]:
        return struct.unpack_from(order + where[1], start, where[0])

    if start[layout.magic[0] :][:4] in (b"ni1\0", b"ni2\0"):
        raise InvalidVolume(f"{name} has its voxels in another file; expected a volume stored in a single file")
    if not start[layout.magic[0] :].startswith(layout.magic[1]):
        raise InvalidVolume(f"{name} cannot be read: it is damaged, or not a NIfTI file")
    n_dims, *sizes = values(layout.dim)
    # Sizes of 0 after the third axis are common, and mean 1.
    file_shape = tuple(max(n, 1) if axis > 2 else n for axis, n in enumerate(sizes[:n_dims]))
    check_shape(name, file_shape)
    (code,) = values(layout.datatype)
    if code not in _TYPES:
        kind = _OTHER_TYPES.get(code, f"an image of the unknown type {code}")
        raise InvalidVolume(f"{name} is {kind}; expected one number in each voxel")
    if n_dims >= 5 and math.prod(file_shape[4:]) > 1:
        count = math.prod(file_shape[4:])
        raise InvalidVolume(f"{name} is a vector image of {count} values in each voxel; expected one number")
    shape = one_volume(name, file_shape, range(min(n_dims, 3)))
    (offset,) = values(layout.vox_offset)
    if not layout.size + 4 <= offset <= MAX_HEADER_LENGTH or offset != int(offset):
        raise InvalidVolume(f"{name} cannot be read: it is damaged, its header gives no place for the voxels")
    slope, intercept = (float(v) if math.isfinite(v) else 0.0 for v in values(layout.scaling))
    pixdim = values(layout.pixdim)
    geometry = _Geometry(
        flat=len(file_shape) == 2,
        qfac=-1.0 if pixdim[0] < 0 else 1.0,
        spacing=np.array([v if v and math.isfinite(v) else 1.0 for v in pixdim[1:4]]),
        codes=tuple(max(0, c) for c in values(layout.codes)),
        quaternion=np.array(values(layout.quaternion)),
        sform=np.vstack([np.reshape(values(layout.srow), (3, 4)), [0, 0, 0, 1]]),
        unit_mm=_UNITS.get(values(layout.units)[0] & 7, 1.0),
    )
    return VolumeHeader(
        shape=shape,
        affine=geometry.affine(),
        file_shape=file_shape,
        dtype=np.dtype(_TYPES[code]).newbyteorder(order),
        encoding="gzip" if compressed else "raw",
        start=0 if compressed else int(offset),
        skip=int(offset) if compressed else 0,
        # As in ITK, the intercept counts even without a slope.
        slope=slope or 1.0,
        intercept=intercept,
    )


def _layout(name: str, start: bytes) -> tuple[_Layout, Literal["<", ">"]]:
    orders: tuple[Literal["<", ">"], ...] = ("<", ">")
    for order in orders:
        for layout in (_NIFTI_1, _NIFTI_2):
            if len(start) >= layout.size and struct.unpack_from(f"{order}i", start)[0] == layout.size:
                (n_dims,) = struct.unpack_from(order + layout.dim[1][1], start, layout.dim[0])
                if 1 <= n_dims <= 7:
                    return layout, order
    raise InvalidVolume(f"{name} cannot be read: it is damaged, or not a NIfTI file")


@dataclass(frozen=True)
class _Geometry:
    """The fields of a header that give the affine."""

    flat: bool
    qfac: float
    spacing: _Matrix
    codes: tuple[int, ...]
    quaternion: _Matrix
    sform: _Matrix
    unit_mm: float

    def affine(self) -> _Matrix:
        """Return the map from voxels to RAS millimetres, not yet checked.

        ITK takes directions and origin from one of the two affines, and voxel sizes from ``pixdim``.
        """
        qform_code, sform_code = self.codes
        if not qform_code and not sform_code:
            n = 2 if self.flat else 3
            return LPS_TO_RAS @ affine_of(np.diag(self.spacing[:n]) * self.unit_mm, np.zeros(n))
        matrix = self.sform if self._prefers_sform() else self._qform()
        n = 2 if self.flat and abs(np.linalg.det(matrix[:2, :2])) > 0 else 3
        steps = matrix[:n, :n]
        if self._sheared_only(matrix):
            # ITK refuses such a file; all other readers agree on its geometry.
            return affine_of(steps * self.unit_mm, matrix[:n, 3] * self.unit_mm)
        with np.errstate(invalid="ignore", divide="ignore"):
            directions = steps / np.linalg.norm(steps, axis=0)
        return affine_of(directions * self.spacing[:n] * self.unit_mm, matrix[:n, 3] * self.unit_mm)

    def _sheared_only(self, matrix: _Matrix) -> bool:
        return matrix is self.sform and not _is_orthonormal(matrix) and bool(np.isfinite(matrix).all())

    def _qform(self) -> _Matrix:
        """Return the qform by method 2 of nifti1.h: a unit quaternion, whose real part is not stored."""
        b, c, d, *offset = self.quaternion
        rest = 1.0 - (b * b + c * c + d * d)
        if rest < 1e-7:
            b, c, d = np.array([b, c, d]) / math.sqrt(b * b + c * c + d * d)
        a = math.sqrt(rest) if rest >= 1e-7 else 0.0
        rotation = np.array(
            [
                [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
                [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
                [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
            ]
        )
        spacing = np.where(self.spacing > 0, self.spacing, 1.0)
        return affine_of(rotation * spacing * [1, 1, self.qfac], offset)

    def _prefers_sform(self) -> bool:
        """Choose between the affines as ITK 5.4 and Slicer do.

        The sform counts if its axes are perpendicular and it is the only one, or has scanner coordinates (code 1),
        or equals the qform. Otherwise the qform counts.
        """
        qform_code, sform_code = self.codes
        if not sform_code or not qform_code:
            return bool(sform_code)
        qform = self._qform()
        difference = np.abs(self.sform - qform)
        if difference[:, :3].max() <= _SAME_MATRIX and difference[:, 3].sum() <= _SAME_OFFSET:
            return True
        if not _is_orthonormal(self.sform):
            # If it is not finite, the check of the affine will say so.
            return not np.isfinite(self.sform).all()
        return sform_code == 1 or _are_similar(self.sform, qform)


def _is_orthonormal(matrix: _Matrix) -> bool:
    if not np.isfinite(matrix).all() or np.linalg.det(matrix[:3, :3]) == 0:
        return False
    directions = matrix[:3, :3] / np.linalg.norm(matrix[:3, :3], axis=0)
    return bool(np.abs(directions @ directions.T - np.eye(3)).max() <= _ORTHONORMAL)


def _are_similar(sform: _Matrix, qform: _Matrix) -> bool:
    u_s, w_s, _ = np.linalg.svd(sform[:3, :3].astype(np.float32))
    u_q, w_q, _ = np.linalg.svd(qform[:3, :3].astype(np.float32))
    return bool(
        np.abs(w_s - w_q).max() <= _SIMILAR
        and np.abs(u_s @ np.linalg.inv(u_q) - np.eye(3)).max() <= _SIMILAR
        and np.abs(sform[:3, 3] - qform[:3, 3]).max() <= _SIMILAR
    )
