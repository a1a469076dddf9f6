"""Formats, numbers and headers as SimpleITK reads them, and errors that name what a file is instead."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from deformux.data.cases import find_images, volume_id
from deformux.data.loading import LoadLabeld, LoadVolumed
from deformux.data.volume_reader import InvalidVolume, read_volume

TYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float32", "float64")
NRRD_NAMES = {"int8": "signed char", "float32": "float", "float64": "double"}
FIELDS = {"dim": (40, "8h"), "pixdim": (76, "8f"), "scaling": (112, "2f"), "srow": (280, "12f")}
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
SHAPE = (3, 4, 5)
VALUES = np.arange(60).reshape(SHAPE, order="F")
AFFINE = np.array([[0, -2.0, 0, 5], [1.5, 0, 0, -6], [0, 0, 3.0, 7], [0, 0, 0, 1]])
GRID = "space: LPS\nspace directions: (0,1.5,0) (2,0,0) (0,0,3)\nspace origin: (5,-6,7)\n"


def nrrd(path: Path, body: bytes, fields: str, *, sizes: str = "3 4 5", n: int = 3, encoding: str = "raw") -> Path:
    header = f"NRRD0005\ntype: int16\ndimension: {n}\nsizes: {sizes}\nendian: little\nencoding: {encoding}\n{fields}\n"
    path.write_bytes(header.encode() + body)
    return path


def mha(
    path: Path, body: bytes, fields: str = "", *, sizes: str = "3 4 5", n: int = 3, kind: str = "MET_SHORT"
) -> Path:
    text = (
        f"ObjectType = Image\nNDims = {n}\n{fields}DimSize = {sizes}\nElementType = {kind}\nElementDataFile = LOCAL\n"
    )
    path.write_bytes(text.encode() + body)
    return path


def nifti(path: Path, values: np.ndarray = VALUES, **fields: Sequence[float]) -> Path:
    """Write a file with the given header fields, unchecked by nibabel."""
    image = nib.Nifti1Image(values.astype(np.int16) if values is VALUES else values, AFFINE)
    image.header.set_qform(AFFINE, code=1)
    image.header.set_sform(AFFINE, code=1)
    plain = path.with_name("plain.nii")
    nib.save(image, plain)
    data = bytearray(plain.read_bytes())
    for name, value in fields.items():
        struct.pack_into(f"<{FIELDS[name][1]}", data, FIELDS[name][0], *value)
    plain.unlink()
    path.write_bytes(gzip.compress(bytes(data)) if path.name.endswith(".gz") else bytes(data))
    return path


def same_as_simpleitk(path: Path) -> None:
    image, own = sitk.ReadImage(str(path)), read_volume(path)
    n = min(image.GetDimension(), 3)
    affine = np.eye(4)
    steps = np.reshape(image.GetDirection(), (image.GetDimension(),) * 2) * image.GetSpacing()
    affine[:n, :n], affine[:n, 3] = steps[:n, :n], image.GetOrigin()[:n]
    np.testing.assert_allclose(own.affine, LPS @ affine, atol=1e-4)
    np.testing.assert_array_equal(own.values.ravel(), sitk.GetArrayFromImage(image).T.astype(np.float32).ravel())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("order", ["<", ">"])
def test_numbers_of_every_type_and_byte_order(tmp_path: Path, dtype: str, order: str) -> None:
    header = nib.Nifti1Image(VALUES.astype(dtype), AFFINE, dtype=dtype).header.as_byteswapped(order)
    nib.save(nib.Nifti1Image(VALUES.astype(dtype), AFFINE, header, dtype=dtype), tmp_path / "a.nii.gz")
    name, endian = NRRD_NAMES.get(dtype, dtype), "little" if order == "<" else "big"
    stored = VALUES.astype(np.dtype(dtype).newbyteorder(order)).tobytes("F")
    nrrd(tmp_path / "a.nrrd", stored, GRID)
    text = (tmp_path / "a.nrrd").read_bytes().replace(b"int16", name.encode()).replace(b"little", endian.encode())
    (tmp_path / "a.nrrd").write_bytes(text)
    image = sitk.GetImageFromArray(VALUES.T.astype(dtype))
    sitk.WriteImage(image, str(tmp_path / "a.mha"))
    for suffix in (".nii.gz", ".nrrd", ".mha"):
        same_as_simpleitk(tmp_path / f"a{suffix}")


RAW = VALUES.astype("<i2").tobytes("F")
ENCODED = {
    "raw": RAW,
    "gzip": gzip.compress(RAW),
    "gz": gzip.compress(RAW[:50]) + gzip.compress(RAW[50:]),
    "ascii": " ".join(map(str, range(60))).encode(),
    "text": "\n".join(map(str, range(60))).encode(),
    "hex": RAW.hex().encode(),
}


@pytest.mark.parametrize("encoding", ENCODED)
def test_encodings_of_nrrd(tmp_path: Path, encoding: str) -> None:
    same_as_simpleitk(nrrd(tmp_path / "a.nrrd", ENCODED[encoding], GRID, encoding=encoding))


def test_bzip2_and_text_that_simpleitk_does_not_read(tmp_path: Path) -> None:
    found = [
        read_volume(nrrd(tmp_path / "a.nrrd", bz2.compress(RAW), GRID, encoding="bzip2")),
        read_volume(mha(tmp_path / "a.mha", ENCODED["text"], "BinaryData = False\n")),
        read_volume(mha(tmp_path / "b.mha", zlib.compress(RAW), "CompressedData = True\n")),
    ]
    nib.save(nib.Nifti2Image(VALUES.astype(np.int16), AFFINE), tmp_path / "a.nii")
    found.append(read_volume(tmp_path / "a.nii"))
    np.testing.assert_allclose(found[-1].affine, AFFINE)
    for volume in found:
        np.testing.assert_array_equal(volume.values, VALUES)


NIFTI_FIELDS: dict[str, dict[str, Sequence[float]]] = {
    "slope and intercept": {"scaling": (0.5, -10)},
    "slope 0": {"scaling": (0, 10)},
    "slope NaN": {"scaling": (np.nan, 10)},
    "one volume in 4D": {"dim": (4, 3, 4, 5, 1, 1, 1, 1)},
    "singleton axes in 5D": {"dim": (5, 3, 4, 5, 1, 1, 1, 1)},
    "a size of 0 behind the third": {"dim": (4, 3, 4, 5, 0, 0, 0, 0)},
    "2D": {"dim": (2, 12, 5, 1, 1, 1, 1, 1)},
    "voxel sizes that differ from the sform's": {"pixdim": (1, 2, 3, 4, 1, 1, 1, 1)},
    "negative voxel size": {"pixdim": (1, -1.5, 2, 3, 1, 1, 1, 1)},
    "voxel size 0": {"pixdim": (1, 0, 2, 3, 1, 1, 1, 1)},
    "qfac 0": {"pixdim": (0, 1.5, 2, 3, 1, 1, 1, 1)},
}


@pytest.mark.parametrize("kind", NIFTI_FIELDS)
def test_headers_of_nifti(tmp_path: Path, kind: str) -> None:
    same_as_simpleitk(nifti(tmp_path / "a.nii.gz", **NIFTI_FIELDS[kind]))


@pytest.mark.parametrize("unit", ["meter", "mm", "micron", "unknown"])
def test_units_of_nifti(tmp_path: Path, unit: str) -> None:
    image = nib.Nifti1Image(VALUES.astype(np.int16), AFFINE)
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "a.nii")
    same_as_simpleitk(tmp_path / "a.nii")


LIST_BEHIND = GRID.replace("(0,0,3)", "(0,0,3) none") + "kinds: domain domain domain list\n"
LIST_IN_FRONT = GRID.replace("(0,1.5,0)", "none (0,1.5,0)") + "kinds: list domain domain domain\n"
NRRD_FIELDS: dict[str, tuple[str, str, int]] = {
    "spacings and no directions": ("spacings: 1 2 3\n", "3 4 5", 3),
    "spacings and minima": ("spacings: 1 2 3\naxis mins: 5 6 7\n", "3 4 5", 3),
    "spacings and minima of nodes": ("spacings: 1 2 3\naxis mins: 5 6 7\ncenterings: node node node\n", "3 4 5", 3),
    "nothing": ("", "3 4 5", 3),
    "space alone": ("space: RAS\n", "3 4 5", 3),
    "one volume, list behind": (LIST_BEHIND, "3 4 5 1", 4),
    "one volume, list in front": (LIST_IN_FRONT, "1 3 4 5", 4),
    "one volume, spacings": ("spacings: 1 2 3 1\n", "3 4 5 1", 4),
    "2D": ("spacings: 1 2\n", "12 5", 2),
    "shear": (GRID.replace("(2,0,0)", "(2,0.3,0)"), "3 4 5", 3),
}  # fmt: skip


@pytest.mark.parametrize("kind", NRRD_FIELDS)
def test_headers_of_nrrd(tmp_path: Path, kind: str) -> None:
    fields, sizes, n = NRRD_FIELDS[kind]
    same_as_simpleitk(nrrd(tmp_path / "a.nrrd", RAW, fields, sizes=sizes, n=n))


@pytest.mark.parametrize(
    "fields", ["", "ElementSize = 1 2 3\n", "Rotation = 0 1 0 -1 0 0 0 0 1\nPosition = 1 2 3\n", "HeaderSize = -1\n"]
)
def test_headers_of_metaimage(tmp_path: Path, fields: str) -> None:
    same_as_simpleitk(mha(tmp_path / "a.mha", RAW, fields))


@pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".nii.gz"])
def test_volumes_on_a_fourth_axis(tmp_path: Path, suffix: str) -> None:
    image = sitk.GetImageFromArray(np.ascontiguousarray(VALUES.T.astype(np.int16)))
    sitk.WriteImage(sitk.JoinSeries([image]), str(tmp_path / f"one{suffix}"))
    same_as_simpleitk(tmp_path / f"one{suffix}")
    sitk.WriteImage(sitk.JoinSeries([image, image]), str(tmp_path / f"two{suffix}"))
    with pytest.raises(InvalidVolume, match="time points"):
        read_volume(tmp_path / f"two{suffix}")


def test_a_sheared_sform_alone_is_read_though_itk_refuses_it(tmp_path: Path) -> None:
    sheared = AFFINE.copy()
    sheared[0, 0] = 0.4
    nib.save(nib.Nifti1Image(VALUES.astype(np.int16), sheared), tmp_path / "a.nii")
    np.testing.assert_allclose(read_volume(tmp_path / "a.nii").affine, sheared, atol=1e-6)


@pytest.mark.parametrize("name", ["A.NII.GZ", "b.Nii", "c.NRRD", "d.MHA"])
def test_capitals_in_a_suffix(tmp_path: Path, name: str) -> None:
    make = {"gz": nifti, "ii": nifti, "rd": lambda p: nrrd(p, RAW, GRID), "ha": lambda p: mha(p, RAW)}
    path = make[name[-2:].lower()](tmp_path / name)
    np.testing.assert_array_equal(read_volume(path).values, VALUES)
    assert find_images(tmp_path) == [path]
    assert volume_id(path) == name[0]


def with_nan(share: int) -> np.ndarray:
    values = VALUES.astype(np.float32)
    values[0] = np.nan
    values[1, 0, 0], values[1, 0, 1] = np.inf, -np.inf
    return values if share < 100 else np.full_like(values, np.nan)


def test_non_finite_voxels_get_the_lowest_intensity(tmp_path: Path) -> None:
    image = LoadVolumed()({"image": nifti(tmp_path / "a.nii.gz", with_nan(50))})["image"]
    expected = with_nan(50)
    lowest = expected[np.isfinite(expected)].min()
    np.testing.assert_array_equal(image[0].numpy(), np.where(np.isfinite(expected), expected, lowest))
    assert image.meta["non_finite"] == 22
    assert LoadVolumed()({"image": nifti(tmp_path / "b.nii.gz")})["image"].meta["non_finite"] == 0
    with pytest.raises(InvalidVolume, match="all are NaN or infinite"):
        LoadVolumed()({"image": nifti(tmp_path / "c.nii.gz", with_nan(100))})


def colour(path: Path) -> Path:
    rgb = np.zeros(SHAPE, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.save(nib.Nifti1Image(rgb, AFFINE), path)
    return path


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def truncated(path: Path) -> Path:
    whole = nifti(path, np.random.default_rng(0).integers(0, 99, (20, 20, 20)).astype(np.int16)).read_bytes()
    path.write_bytes(whole[:-200])
    return path


def wrong_checksum(path: Path) -> Path:
    whole = bytearray(nifti(path, np.random.default_rng(0).integers(0, 99, (20, 20, 20)).astype(np.int16)).read_bytes())
    whole[-6] ^= 1
    path.write_bytes(whole)
    return path


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


THREE = GRID.replace("(0,1.5,0)", "none (0,1.5,0)")
NOT_VOLUMES: dict[str, tuple[str, Callable[[Path], Path], str]] = {
    "colour NIfTI": ("a.nii", colour, "is a colour image"),
    "complex NIfTI": ("a.nii", lambda p: nifti(p, VALUES.astype(np.complex64)), "is a complex image"),
    "vector NIfTI": ("a.nii", lambda p: nifti(p, dim=(5, 3, 4, 1, 1, 5, 1, 1)), "is a vector image of 5 values"),
    "time points of NIfTI": ("a.nii", lambda p: nifti(p, dim=(4, 3, 4, 1, 5, 1, 1, 1)), "holds 5 time points"),
    "zero size": ("a.nii.gz", lambda p: nifti(p, dim=(3, 0, 4, 5, 1, 1, 1, 1)), "has no voxels"),
    "negative size": ("a.nii.gz", lambda p: nifti(p, dim=(3, -3, 4, 5, 1, 1, 1, 1)), "has no voxels"),
    "singular affine": ("a.nii.gz", lambda p: nifti(p, srow=(0,) * 12) and zero_qform(p), "singular affine"),
    "infinite affine": ("a.nii.gz", lambda p: nifti(p, srow=(np.inf,) * 12), "not finite"),
    "NaN affine": ("a.nii.gz", lambda p: nifti(p, srow=(np.nan,) * 12), "not finite"),
    "NRRD of zero size": ("a.nrrd", lambda p: nrrd(p, RAW, GRID, sizes="0 4 5"), "has no voxels"),
    "singular NRRD": ("a.nrrd", lambda p: nrrd(p, RAW, GRID.replace("(2,0,0)", "(0,3,0)")), "singular affine"),
    "colour NRRD": (
        "a.nrrd",
        lambda p: nrrd(p, RAW, THREE + "kinds: RGB-color domain domain domain\n", sizes="3 1 4 5", n=4),
        "it is a colour image",
    ),
    "vector NRRD": (
        "a.nrrd",
        lambda p: nrrd(p, RAW, THREE + "kinds: vector domain domain domain\n", sizes="3 1 4 5", n=4),
        "it is a vector image",
    ),
    "time points of NRRD": ("a.nrrd", lambda p: nrrd(p, RAW, "", sizes="3 4 1 5", n=4), "holds 5 time points"),
    "channels of MetaImage": (
        "a.mha",
        lambda p: mha(p, RAW, "ElementNumberOfChannels = 3\n", sizes="4 5 1"),
        "of 3 values in each voxel",
    ),
    "time points of MetaImage": ("a.mha", lambda p: mha(p, RAW, sizes="3 4 1 5", n=4), "holds 5 time points"),
    "cut NIfTI": ("a.nii.gz", truncated, "voxels are damaged, or the file is cut off"),
    "wrong checksum": ("a.nii.gz", wrong_checksum, "voxels are damaged"),
    "cut NRRD": ("a.nrrd", lambda p: nrrd(p, RAW[:-1], GRID), "cut off"),
    "cut MetaImage": ("a.mha", lambda p: mha(p, RAW[:-1]), "cut off"),
    "NRRD header without end": ("a.nrrd", lambda p: written(p, b"NRRD0004\ntype: short\n"), "has no end"),
    "text": ("a.nrrd", lambda p: written(p, b"this is no image"), "not a NRRD file"),
    "empty": ("a.mha", lambda p: written(p, b""), "not a MetaImage file"),
    "folder": ("a.nii.gz", folder, "it is a folder"),
    "pipe": ("a.nii.gz", pipe, "it is not a file"),
    "missing": ("a.nii.gz", lambda p: p, "there is no such file"),
    "compressed .nii": ("a.nii", lambda p: written(p, gzip.compress(b"x" * 999)), "rename it"),
}  # fmt: skip


def zero_qform(path: Path) -> Path:
    data = bytearray(gzip.decompress(path.read_bytes()))
    struct.pack_into("<2h", data, 252, 0, 1)
    return written(path, gzip.compress(bytes(data)))


@pytest.mark.parametrize("kind", NOT_VOLUMES)
def test_an_error_says_what_a_file_is(tmp_path: Path, kind: str) -> None:
    name, make, words = NOT_VOLUMES[kind]
    with pytest.raises(InvalidVolume) as error:
        read_volume(make(tmp_path / name))
    assert str(error.value).startswith(f"{name} ")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_impossible_label_values_are_not_shown(tmp_path: Path) -> None:
    image = LoadVolumed()({"image": nifti(tmp_path / "image.nii.gz")})["image"]
    for values, words in (
        (VALUES * 1000.0 + 0.5, "holds values that no label has"),
        (VALUES * 1e6, "holds values that no label has"),
        (VALUES.astype(float), "holds the values 0, 1, 2, 3, 4, 5, …"),
    ):
        label = nifti(tmp_path / "label.nii.gz", values.astype(np.float32))
        with pytest.raises(InvalidVolume) as error:
            LoadLabeld(n_labels=2)({"image": image, "label": label})
        assert words in str(error.value)
        assert "expected whole numbers from 0 to 2" in str(error.value)


def test_random_damage_is_always_reported_in_a_sentence(tmp_path: Path) -> None:
    """Replace, cut and insert bytes of headers: reading gives a volume or InvalidVolume, nothing else."""
    rng = np.random.default_rng(7)
    originals = [
        nifti(tmp_path / "a.nii"),
        nrrd(tmp_path / "b.nrrd", RAW, GRID + "kinds: domain domain domain\n"),
        mha(tmp_path / "c.mha", RAW, "BinaryData = True\nElementSpacing = 1 2 3\n"),
    ]
    whole = {path: path.read_bytes() for path in originals}
    for number in range(1500):
        path = originals[number % 3]
        data = bytearray(whole[path])
        for _ in range(int(rng.integers(1, 6))):
            at = int(rng.integers(min(len(data), 400)))
            digits = bytes(rng.choice(list(b"0123456789-.:= \nnaif\xff\x00"), int(rng.integers(1, 4))).tolist())
            data[at : at + int(rng.integers(0, 4))] = digits
        path.write_bytes(data)
        with contextlib.suppress(InvalidVolume):
            assert np.isfinite(read_volume(path).affine).all()
