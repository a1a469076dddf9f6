"""Headers that lie and files that grow when read: refused at once, without using their size in memory."""

from __future__ import annotations

import bz2
import gzip
import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from deformux.data.header import MAX_VOXELS_VARIABLE
from deformux.data.loading import LoadLabeld, LoadVolumed
from deformux.data.preprocessing import Preprocessing
from deformux.data.transforms import inference_transforms, run_transforms
from deformux.data.volume_reader import InvalidVolume, open_volume, read_volume

# Reads in a process of its own, whose peak memory can be measured from file to file.
_READER = """
import json, sys, time
from pathlib import Path
from deformux.data.loading import LoadLabeld, LoadVolumed
from deformux.data.volume_reader import InvalidVolume
def megabytes(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))
for line in sys.stdin:
    label, image = json.loads(line)
    data = {"image": LoadVolumed()({"image": image})["image"]} if image else {}
    Path("/proc/self/clear_refs").write_text("5")
    before, start, said = megabytes("VmRSS"), time.process_time(), ""
    try:
        LoadLabeld(n_labels=2)({**data, "label": label}) if image else LoadVolumed()({"image": label})
    except InvalidVolume as error:
        said = str(error)
    print(json.dumps([said, time.process_time() - start, megabytes("VmHWM") - before]), flush=True)
"""
QUICK_S, SMALL_MB = 1.0, 64
Read = Callable[..., tuple[str, float, float]]


@pytest.fixture(scope="module")
def read() -> Iterator[Read]:
    """Yield a function that reads a file, or a label of an image: message, processor seconds, extra megabytes."""
    command = [sys.executable, "-c", _READER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ask(path: Path, image: Path | None = None) -> tuple[str, float, float]:
            process.stdin.write(json.dumps([str(path), str(image) if image else None]) + "\n")
            process.stdin.flush()
            return tuple(json.loads(process.stdout.readline()))

        yield ask
        process.stdin.close()


def zeros(n: int) -> Iterator[bytes]:
    while n > 0:
        yield bytes(min(n, 2**20))
        n -= 2**20


def compressed(head: bytes, n: int, make: Callable[[], Any]) -> bytes:
    compressor = make()
    parts = [compressor.compress(head), *(compressor.compress(part) for part in zeros(n)), compressor.flush()]
    return b"".join(parts)


def gzipped(head: bytes, n: int) -> bytes:
    return compressed(head, n, lambda: zlib.compressobj(9, zlib.DEFLATED, 31))


def nifti_start(*shape: int, dtype: type = np.uint8, spacing: float = 1.0) -> bytes:
    header = nib.Nifti1Header()
    header.set_data_dtype(dtype)
    dims = [len(shape), *shape, *[1] * (7 - len(shape))]
    header["dim"] = dims
    header["pixdim"] = [1, *[spacing] * 3, 1, 1, 1, 1]
    header["vox_offset"], header["magic"] = 352, b"n+1"
    return header.binaryblock + bytes(4)


def nrrd_start(*shape: int, encoding: str, kind: str = "uint8") -> bytes:
    sizes = " ".join(map(str, shape))
    text = f"NRRD0004\ntype: {kind}\ndimension: {len(shape)}\nsizes: {sizes}\nendian: little\nencoding: {encoding}\n\n"
    return text.encode()


def mha_start(*shape: int) -> bytes:
    sizes = " ".join(map(str, shape))
    return f"NDims = {len(shape)}\nCompressedData = True\nDimSize = {sizes}\nElementType = MET_UCHAR\n".encode() + (
        b"ElementDataFile = LOCAL\n"
    )


CUBE = 900**3
BOMBS: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "zeros as NIfTI": ("a.nii.gz", lambda: gzipped(nifti_start(900, 900, 900), CUBE), "same intensity everywhere"),
    "zeros as NRRD": (
        "a.nrrd",
        lambda: nrrd_start(900, 900, 900, encoding="gzip") + gzipped(b"", CUBE),
        "same intensity everywhere",
    ),
    "zeros as bzip2": (
        "a.nrrd",
        lambda: nrrd_start(900, 900, 900, encoding="bzip2") + bz2.compress(bytes(CUBE // 81)) * 81,
        "same intensity everywhere",
    ),
    "zeros as MetaImage": (
        "a.mha",
        lambda: mha_start(900, 900, 900) + compressed(b"", CUBE, zlib.compressobj),
        "same intensity everywhere",
    ),
    "a line": ("a.nii.gz", lambda: gzipped(nifti_start(1, 1, 32767), 32767), "a shape that no scan has"),
    "almost a line": ("a.nii.gz", lambda: gzipped(nifti_start(2, 2, 32767), 4 * 32767), "a shape that no scan has"),
    "a slice too wide": ("a.nrrd", lambda: nrrd_start(20000, 20000, 1, encoding="raw"), "a shape that no scan has"),
    "too many voxels": ("a.nii.gz", lambda: gzipped(nifti_start(2000, 2000, 2000), 0), "at most 1,500,000,000"),
    "too many voxels of NRRD": ("a.nrrd", lambda: nrrd_start(*[9000] * 16, encoding="gzip"), "at most 1,500,000,000"),
    "too many time points": ("a.nii", lambda: nifti_start(500, 500, 500, 30000), "at most 1,500,000,000"),
    "nothing behind a large header": ("a.nii.gz", lambda: gzipped(nifti_start(900, 900, 900), 0), "cut off"),
    "nothing behind a raw header": ("a.nrrd", lambda: nrrd_start(900, 900, 900, encoding="raw"), "cut off"),
    "text behind a large header": ("a.nrrd", lambda: nrrd_start(900, 900, 900, encoding="text") + b"1 2", "cut off"),
    "a header without end": ("a.nrrd", lambda: b"NRRD0004\n" + b"# comment\n" * 10**6, "no end"),
    "voxels behind a gigabyte": (
        "a.nii.gz",
        lambda: gzipped(nifti_start(9, 9, 9)[:108] + struct.pack("<f", 1e9) + nifti_start(9, 9, 9)[112:], 10**8),
        "no place for the voxels",
    ),
    "lines to skip": (
        "a.nrrd",
        lambda: nrrd_start(9, 9, 9, encoding="raw").replace(b"\n\n", b"\nline skip: 999999999999\n\n"),
        "cut off",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bad_file_is_refused_in_a_second(read: Read, tmp_path: Path, kind: str) -> None:
    name, make, words = BOMBS[kind]
    path = tmp_path / name
    path.write_bytes(make())
    assert path.stat().st_size < 11e6
    said, seconds, megabytes = read(path)
    assert words in said
    assert seconds < QUICK_S
    assert megabytes < SMALL_MB


@pytest.mark.parametrize("layers", [0, 900])
def test_a_label_is_compared_with_its_image_before_it_is_decompressed(read: Read, tmp_path: Path, layers: int) -> None:
    image = np.random.default_rng(0).normal(size=(20, 20, 20)).astype(np.float32)
    nib.save(nib.Nifti1Image(image, np.eye(4)), tmp_path / "image.nii.gz")
    label = tmp_path / "label.nii.gz"
    label.write_bytes(gzipped(nifti_start(900, 900, 900), CUBE))
    if layers:
        label = tmp_path / "label.seg.nrrd"
        head = nrrd_start(layers, 900, 900, 900, encoding="gzip").replace(
            b"\n\n", b"\nkinds: list domain domain domain\nSegment0_Name:=liver\n\n"
        )
        label.write_bytes(head + gzipped(b"", 10**6))
    said, seconds, megabytes = read(label, tmp_path / "image.nii.gz")
    assert "at most 1,500,000,000" in said if layers else "not on its image's grid" in said
    assert seconds < QUICK_S
    assert megabytes < SMALL_MB


def test_decompressing_stops_where_the_header_says(read: Read, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 99, (20, 20, 20)).astype(np.uint8)
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzipped(nifti_start(20, 20, 20) + values.tobytes("F"), 10**9))
    said, seconds, megabytes = read(path)
    assert said == ""
    assert seconds < QUICK_S
    assert megabytes < SMALL_MB
    np.testing.assert_array_equal(read_volume(path).values, values)


def test_reading_takes_the_memory_of_the_array(read: Read, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 99, (200, 200, 300)).astype(np.int16)
    nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "a.nii.gz")
    said, _, megabytes = read(tmp_path / "a.nii.gz")
    assert said == ""
    # 48 MB as float32; stored numbers pass in blocks of 4 MB.
    assert megabytes < 48 + 24


def test_the_bound_is_an_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nib.save(nib.Nifti1Image(np.arange(1000, dtype=np.int16).reshape(10, 10, 10), np.eye(4)), tmp_path / "a.nii")
    monkeypatch.setenv(MAX_VOXELS_VARIABLE, "999")
    with pytest.raises(InvalidVolume, match=r"10 x 10 x 10 voxels, 1,000 in total; at most 999 are read"):
        read_volume(tmp_path / "a.nii")
    monkeypatch.setenv(MAX_VOXELS_VARIABLE, "1000")
    assert read_volume(tmp_path / "a.nii").values.shape == (10, 10, 10)


def test_a_scan_too_large_for_the_networks_spacing(tmp_path: Path) -> None:
    """Ten metres at one millimetre: the file is small, the resampled scan is not."""
    path = tmp_path / "a.nii"
    values = np.random.default_rng(0).integers(0, 99, (20, 20, 20)).astype(np.uint8)
    path.write_bytes(nifti_start(20, 20, 20, spacing=500) + values.tobytes("F"))
    with pytest.raises(InvalidVolume, match=r"a\.nii measures 1e\+04 x 1e\+04 x 1e\+04 mm, too large"):
        run_transforms(inference_transforms(Preprocessing("ct", spacing_mm=(1, 1, 1))), {"image": path})
    assert run_transforms(inference_transforms(Preprocessing("ct")), {"image": path})["image"].shape == (1, 20, 20, 20)


@pytest.mark.parametrize("shape", [(512, 512), (512, 512, 1), (1, 400, 300), (40, 2000), (512, 512, 8), (7, 7, 300)])
def test_images_slices_and_thin_slabs_are_scans(tmp_path: Path, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).integers(0, 99, shape).astype(np.uint8)
    nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "a.nii.gz")
    assert LoadVolumed()({"image": tmp_path / "a.nii.gz"})["image"].shape == (1, *shape, *[1] * (3 - len(shape)))


def test_an_empty_label_may_be_compressed_as_far_as_it_goes(tmp_path: Path) -> None:
    """Compression that shows a scan to be constant is usual for a label."""
    shape = (256, 256, 1100)
    path = tmp_path / "label.nii.gz"
    path.write_bytes(gzipped(nifti_start(*shape), int(np.prod(shape))))
    with open_volume(path) as opened:
        assert not opened.read(np.uint8).values.any()
        image = type("Image", (), {"shape": (1, *shape), "affine": opened.header.affine})()
    assert LoadLabeld(n_labels=1)({"image": image, "label": path})["label"].shape == (1, *shape)


def test_gzip_members_and_trailing_bytes(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 99, (20, 20, 20)).astype(np.uint8)
    whole = nifti_start(20, 20, 20) + values.tobytes("F")
    path = tmp_path / "a.nii.gz"
    members = b"".join(gzip.compress(whole[start : start + 100]) for start in range(0, len(whole), 100))
    path.write_bytes(members + b"not a member")
    np.testing.assert_array_equal(read_volume(path).values, values)
    path.write_bytes(members[:-40])
    with pytest.raises(InvalidVolume, match="cut off"):
        read_volume(path)
