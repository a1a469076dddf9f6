"""DICOM files with false headers: refused before a pixel is decoded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import psutil
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    RLELossless,
    generate_uid,
)

from deformux.data.volume_reader import InvalidVolume
from deformux_label.lib.requests.dicom_series import write_series

SERIES = generate_uid()


def slice_file(folder: Path, number: int, *, syntax: str = ExplicitVRLittleEndian, **changed: Any) -> Path:
    """Write one slice of a CT of 24 x 16 voxels, with some fields changed afterwards."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
    meta.TransferSyntaxUID = syntax
    data = Dataset()
    data.file_meta = meta
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.StudyInstanceUID, data.SeriesInstanceUID, data.Modality = SERIES, SERIES, "CT"
    data.Rows, data.Columns, data.SamplesPerPixel, data.PhotometricInterpretation = 16, 24, 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
    data.PixelSpacing, data.SliceThickness = [1.5, 1.5], 2.0
    data.ImageOrientationPatient, data.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, 2.0 * number]
    data.InstanceNumber = number + 1
    pixels = np.random.default_rng(number).integers(-500, 500, (16, 24)).astype("<i2").tobytes()
    data.PixelData = encapsulate([pixels]) if syntax == RLELossless else pixels
    for name, value in changed.items():
        setattr(data, name, value)
    data["PixelData"].VR = "OB" if syntax == RLELossless else "OW"
    data.is_little_endian, data.is_implicit_VR = True, False
    folder.mkdir(exist_ok=True)
    path = folder / f"{number:04d}.dcm"
    data.save_as(path, write_like_original=False)
    return path


@pytest.fixture
def refused(tmp_path: Path) -> Callable[[], str]:
    """Return why the series below ``series`` is refused; check that this takes little time and memory."""

    def why() -> str:
        process = psutil.Process()
        rss, spent = process.memory_info().rss, sum(process.cpu_times()[:2])
        with pytest.raises(InvalidVolume) as caught:
            write_series(tmp_path / "series", tmp_path / "out.nii.gz")
        assert process.memory_info().rss - rss < 100e6
        assert sum(process.cpu_times()[:2]) - spent < 5
        assert not (tmp_path / "out.nii.gz").exists()
        return str(caught.value)

    return why


def test_a_series_is_one_volume(tmp_path: Path) -> None:
    for number in range(5):
        slice_file(tmp_path / "series", number)
    write_series(tmp_path / "series", tmp_path / "out.nii.gz")
    volume = nib.load(tmp_path / "out.nii.gz")
    assert volume.shape == (24, 16, 5)
    np.testing.assert_allclose(np.abs(np.diag(volume.affine)[:3]), (1.5, 1.5, 2.0))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"Rows": 60_000, "Columns": 60_000}, "voxels"),
        ({"Rows": 10_000, "Columns": 10_000}, "damaged"),
        ({"Rows": 17}, "damaged"),
        ({"NumberOfFrames": 100_000}, "shape that no scan has"),
        ({"NumberOfFrames": 2}, "damaged"),
        ({"Rows": 0}, "no voxels"),
        ({"SamplesPerPixel": 3}, "3 values in each pixel"),
        ({"syntax": RLELossless, "Rows": 9_000, "Columns": 9_000}, "damaged"),
        ({"syntax": DeflatedExplicitVRLittleEndian}, "deflated"),
    ],
)
def test_false_sizes(tmp_path: Path, refused: Callable[[], str], changed: dict, words: str) -> None:
    slice_file(tmp_path / "series", 0, **changed)
    assert words in refused()


def test_slices_of_different_sizes(tmp_path: Path, refused: Callable[[], str]) -> None:
    slice_file(tmp_path / "series", 0)
    slice_file(tmp_path / "series", 1, Rows=8)
    assert "different sizes" in refused()


@pytest.mark.parametrize("content", [b"", b"DICM", b"(" * 100_000, b"\x08\x00\x05\x00SQ\0\0\xff\xff\xff\xff" * 5_000])
def test_files_that_only_begin_as_dicom(tmp_path: Path, refused: Callable[[], str], content: bytes) -> None:
    (tmp_path / "series").mkdir()
    (tmp_path / "series" / "0000.dcm").write_bytes(b"\0" * 128 + b"DICM" + content)
    assert "cannot be read as the slices of one series" in refused()
