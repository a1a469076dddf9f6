"""Positions of voxels by the reader, compared with SimpleITK and 3D Slicer."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from live import slicer
from volume_files import LPS, all_geometries, all_kinds, write_kind

from deformux.data.volume_reader import Volume, read_volume

TOLERANCE_MM = 1e-3


def corners(shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    index = np.array(list(itertools.product(*((0, n - 1) for n in shape))))
    return index @ affine[:3, :3].T + affine[:3, 3]


def by_simpleitk(path: Path) -> tuple[np.ndarray, np.ndarray]:
    image = sitk.ReadImage(str(path))
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image).T, LPS @ affine


def by_slicer(answer: dict, array: Path, own: Volume) -> tuple[np.ndarray, np.ndarray]:
    """Read by Slicer, which mirrors the third axis of left-handed volumes; return the file's order."""
    values = np.load(array).reshape(answer["dimensions"][::-1]).T
    affine = np.array(answer["matrix"])
    if np.linalg.det(own.affine[:3, :3]) < 0:
        assert np.linalg.det(affine[:3, :3]) > 0
        mirror = np.diag([1.0, 1.0, -1.0, 1.0])
        mirror[2, 3] = values.shape[2] - 1
        return values[:, :, ::-1], affine @ mirror
    return values, affine


def compare(files: list[Path]) -> None:
    arrays = [path.with_name(f"{path.name}.npy") for path in files]
    answers = slicer([{"image": str(path), "array": str(array)} for path, array in zip(files, arrays, strict=True)])
    different = []
    for path, array, answer in zip(files, arrays, answers, strict=True):
        own = read_volume(path)
        for name, (values, affine) in (("itk", by_simpleitk(path)), ("slicer", by_slicer(answer, array, own))):
            distance = np.abs(corners(values.shape, affine) - corners(own.values.shape, own.affine)).max()
            if distance > TOLERANCE_MM or not np.array_equal(values, own.values):
                different.append((path.name, name, float(distance)))
    assert different == []


def test_a_sample_of_all_geometries(tmp_path: Path) -> None:
    """Each kind of file, and each order of axes, in seeded pairs."""
    rng = np.random.default_rng(18)
    geometries, kinds = list(all_geometries()), all_kinds()
    pairs = [(kind, geometries[rng.integers(len(geometries))]) for kind in kinds]
    pairs += [(kinds[rng.integers(len(kinds))], geometry) for geometry in geometries]
    compare([write_kind(tmp_path, kind, geometry) for kind, geometry in pairs])


def test_one_volume_on_a_fourth_axis(tmp_path: Path) -> None:
    """Slicer keeps the directions of such a file for NIfTI only; drawings lie where they are shown."""
    image = sitk.GetImageFromArray(np.arange(60, dtype=np.int16).reshape(5, 4, 3))
    image.SetSpacing((1.5, 2.0, 3.0))
    image.SetOrigin((5, -6, 7))
    image.SetDirection((0, 1, 0, 1, 0, 0, 0, 0, -1))
    files = [tmp_path / f"one{suffix}" for suffix in (".nrrd", ".mha", ".nii.gz")]
    for file in files:
        sitk.WriteImage(sitk.JoinSeries([image]), str(file))
    for file, answer in zip(files, slicer([{"image": str(file)} for file in files]), strict=True):
        own = read_volume(file)
        assert own.header.shape == (3, 4, 5)
        np.testing.assert_allclose(own.affine, answer["matrix"], atol=TOLERANCE_MM)


@pytest.mark.slow
def test_all_geometries(tmp_path: Path) -> None:
    pairs = itertools.product(all_kinds(), all_geometries())
    files = [write_kind(tmp_path, kind, geometry) for kind, geometry in pairs]
    for start in range(0, len(files), 1000):
        compare(files[start : start + 1000])
