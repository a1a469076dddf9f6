"""Input of the fuzzer: text, values, types, names, and files, whole or damaged."""

from __future__ import annotations

import gzip
import io
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

REMOVED = (
    "/reload",
    "/proxy/dicom/studies",
    "/proxy/dicom/../x",
    "/ohif/..",
    "/static/{model}",
    "/login",
    "/infer/wsi/{model}",
    "/infer/wsi_v2/{model}",
    "/model/info/{model}",
)
OFTEN = (
    ("POST", "/infer/{model}"),
    ("POST", "/infer/segmentation"),
    ("PUT", "/session/"),
    ("PUT", "/datastore/image"),
    ("PUT", "/datastore/label"),
)
TEXT = (
    "",
    " ",
    ".",
    "..",
    "../../../x",
    "/",
    "a/b",
    "a\\b",
    "\0",
    "a\0b",
    "\n",
    "\x7f",
    "\ud800",
    "é" * 120,
    "x" * 300,
    "x" * 9_000,
    "%00",
    "%2e%2e%2f",
    "'; --",
    "{}",
    "null",
    "-1",
    "1e309",
    "NaN",
    "9" * 400,
    "\u202e\ufeff",
    "𝕏" * 20,
    ".hidden",
    "a.nii.gz",
    "$(x)",
    "{0.__class__}",
    "%s%n",
)
VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1.5,
    2**31,
    2**63,
    10**40,
    float("nan"),
    float("inf"),
    [],
    [[]],
    {},
    {"a": None},
    [None] * 50,
    "x",
    "\ud800",
    ["a", 1, {}],
    [[1, 2], [3]],
    [[10**30, 0, 0]],
    [[-5, -5, -5]],
    [[float("nan"), 0, 0]],
)
OPTIONS = (
    "client_id",
    "model",
    "image",
    "label",
    "device",
    "result_extension",
    "result_dtype",
    "logging",
    "label_tag",
    "uncertainty",
    "label_info",
    "liver",
    "spleen",
    "background",
    "voxel_order",
    "roi",
    "selected_label_name",
    "session",
    "steps",
    "gpus",
    "max_workers",
    "x\ud800",
    "y" * 500,
)
TYPES = (
    "application/json",
    "application/json; charset=utf-16",
    "text/plain",
    "",
    "multipart/form-data",
    "multipart/form-data; boundary=",
    "multipart/form-data; boundary=b; charset=hex",
    "application/x-www-form-urlencoded",
    "application/x-www-form-urlencoded; charset=utf-7",
    "application/octet-stream",
)
NAMES = ("a.nii.gz", "a.NII", "a.nrrd", "a.seg.nrrd", "a.mha", "a.nhdr", "a.tar", "", "../../x.nii", "x" * 400)
FITTING: tuple[Any, ...] = (
    *("cpu", ".nrrd", ".seg.nrrd", "uint8", "float32", "INFO", "liver", "on", "lps", "file", "final"),
    *([[3, 3, 3]], [[1, 1, 1], [2, 2, 2]], [0, 5, 0, 5, 0, 5], [{"name": "liver", "id": 1}], [{"name": 5}]),
)


def _header_lies(data: bytes, rng: random.Random) -> bytes:
    """Return a NIfTI header with other numbers for shape, type, offset and affine, or with other text."""
    raw = bytearray(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)
    for _ in range(rng.randrange(1, 4)):
        place = rng.choice((0, 40, 42, 44, 46, 48, 70, 72, 76, 80, 108, 112, 252, 254, 280, 296, 312, 344))
        value = rng.choice((0, -1, 1, 7, 255, 32767, -32768))
        if rng.random() < 0.5:
            raw[place : place + 2] = struct.pack("<h", value)
        else:
            raw[place : place + 4] = struct.pack("<f", rng.choice((0.0, float("nan"), float("inf"), -1e30, 1e-30)))
    return gzip.compress(bytes(raw), 1) if data[:2] == b"\x1f\x8b" else bytes(raw)


def _text_lies(data: bytes, rng: random.Random) -> bytes:
    """Return a NRRD or MHA header with another value, or with another file for its voxels."""
    old, new = rng.choice(
        (
            (b"sizes: ", b"sizes: 0 "),
            (b"sizes: ", b"sizes: 99999 99999 "),
            (b"type: ", b"type: x"),
            (b"encoding: ", b"data file: ../../canary/secret.raw\nencoding: "),
            (b"space directions: ", b"space directions: (0,0,0) (0,0,0) (0,0,nan)\nx:= "),
            (b"DimSize = ", b"DimSize = 0 "),
            (b"DimSize = ", b"DimSize = 32767 32767 "),
            (b"ElementDataFile = LOCAL", b"HeaderSize = 3\nElementDataFile = ../../canary/secret.raw"),
            (b"ElementType = ", b"ElementType = X"),
            (b"NRRD000", b"NRRD999"),
        )
    )
    return data.replace(old, new, 1)


def _archive(data: bytes, rng: random.Random) -> bytes:
    buffer = io.BytesIO()
    if rng.random() < 0.5:
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr("../../../fuzzed", data)
    else:
        with tarfile.open(fileobj=buffer, mode="w:gz") as file:
            member = tarfile.TarInfo("../../../fuzzed")
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


SPOILT: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    lambda data, rng: b"",
    lambda data, rng: data[: rng.randrange(len(data))],
    lambda data, rng: rng.randbytes(rng.randrange(1, 500)),
    lambda data, rng: gzip.compress(data),
    lambda data, rng: data + rng.randbytes(50),
    _header_lies,
    _header_lies,
    _text_lies,
    _text_lies,
    _archive,
)


def volumes_of(folder: Path, *, labels: bool = False) -> dict[str, bytes]:
    """Return a small whole scan of each suffix, or a label on the same grid."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, 3, (6, 7, 8)).astype(np.uint8) if labels else rng.normal(0, 50, (6, 7, 8)).astype(np.int16)
    image = sitk.GetImageFromArray(values)
    made = {}
    for suffix in (".nii.gz", ".nii", ".nrrd", ".mha"):
        path = folder / f"whole{suffix}"
        sitk.WriteImage(image, str(path), useCompression=suffix == ".nii.gz")
        made[suffix] = path.read_bytes()
    return made
