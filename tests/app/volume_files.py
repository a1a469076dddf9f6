"""Volumes in every geometry and format that people have, written without the app's own code."""

from __future__ import annotations

import gzip
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from live import rotation

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
SHAPE, SPACING = (3, 4, 5), np.array([1.0, 2.0, 3.0])
# All different, so that any exchange of two voxels shows.
VALUES = np.arange(60, dtype=np.int16).reshape(SHAPE)
NRRD_SPACES = {
    "right-anterior-superior": (-1, -1, 1),
    "RAS": (-1, -1, 1),
    "left-anterior-superior": (1, -1, 1),
    "LAS": (1, -1, 1),
    "left-posterior-superior": (1, 1, 1),
    "LPS": (1, 1, 1),
    "scanner-xyz": (1, 1, 1),
    None: (1, 1, 1),
}
_MHA = "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\nCompressedData = False\n"


@dataclass(frozen=True)
class Geometry:
    """One of the 48 orders and directions of axes, turned or not."""

    order: tuple[int, ...]
    signs: tuple[int, ...]
    oblique: bool

    def affine(self) -> np.ndarray:
        """From voxels to RAS millimetres."""
        directions = np.zeros((3, 3))
        for axis, (along, sign) in enumerate(zip(self.order, self.signs, strict=True)):
            directions[along, axis] = sign
        if self.oblique:
            directions = rotation(20, -15, 30) @ directions
        affine = np.eye(4)
        affine[:3, :3], affine[:3, 3] = directions * SPACING, (31.0, -17.0, 59.0)
        return affine


def all_geometries() -> Iterator[Geometry]:
    for order, signs, oblique in itertools.product(
        itertools.permutations(range(3)), itertools.product((1, -1), repeat=3), (False, True)
    ):
        yield Geometry(order, signs, oblique)


def all_kinds() -> list[tuple[str, object]]:
    """What a file of a geometry can be: a NIfTI file of each pair of codes, a NRRD file of each space, a MetaImage."""
    kinds: list[tuple[str, object]] = [("nifti", pair) for pair in itertools.product(range(6), repeat=2)]
    return [*kinds, *[("nrrd", space) for space in NRRD_SPACES], ("mha", None)]


def write_kind(folder: Path, kind: tuple[str, object], geometry: Geometry) -> Path:
    name = f"{kind[0]}_{kind[1]}_{geometry}".translate({ord(c): "_" for c in " (),='"})
    affine = geometry.affine()
    if kind[0] == "nifti":
        return _nifti(folder / f"{name}.nii.gz", affine, *kind[1])  # type: ignore[misc]
    if kind[0] == "nrrd":
        return _nrrd(folder / f"{name}.nrrd", affine, kind[1])  # type: ignore[arg-type]
    return _mha(folder / f"{name}.mha", affine)


def _nifti(path: Path, affine: np.ndarray, qform_code: int, sform_code: int) -> Path:
    """The qform is as given; the sform lies elsewhere and is turned."""
    image = nib.Nifti1Image(VALUES, None)
    image.header.set_qform(affine, code=1)
    other = affine.copy()
    other[:3, :3] = rotation(3, 5, -7) @ affine[:3, :3]
    other[:3, 3] += (3, -20, 48)
    image.header.set_sform(other, code=1)
    image.header["qform_code"], image.header["sform_code"] = qform_code, sform_code
    nib.save(image, path)
    return path


def _nrrd(path: Path, affine: np.ndarray, space: str | None) -> Path:
    lps = LPS @ affine
    signs = np.array(NRRD_SPACES[space])

    def vector(values: np.ndarray) -> str:
        return f"({','.join(repr(float(v)) for v in values)})"

    lines = [
        "NRRD0004",
        "type: int16",
        "dimension: 3",
        f"space: {space}" if space else "space dimension: 3",
        f"sizes: {' '.join(map(str, SHAPE))}",
        "space directions: " + " ".join(vector(signs * lps[:3, axis]) for axis in range(3)),
        f"space origin: {vector(signs * lps[:3, 3])}",
        "kinds: domain domain domain",
        "endian: little",
        "encoding: gzip",
    ]
    path.write_bytes("\n".join([*lines, "", ""]).encode() + gzip.compress(VALUES.tobytes("F"), 1))
    return path


def _mha(path: Path, affine: np.ndarray) -> Path:
    lps = LPS @ affine

    def numbers(values: np.ndarray) -> str:
        return " ".join(repr(float(v)) for v in values)

    text = _MHA + (
        f"TransformMatrix = {numbers((lps[:3, :3] / SPACING).T.ravel())}\nOffset = {numbers(lps[:3, 3])}\n"
        f"CenterOfRotation = 1 2 3\nAnatomicalOrientation = LAS\nElementSpacing = {numbers(SPACING)}\n"
        f"DimSize = {' '.join(map(str, SHAPE))}\nElementType = MET_SHORT\nElementDataFile = LOCAL\n"
    )
    path.write_bytes(text.encode() + VALUES.tobytes("F"))
    return path
