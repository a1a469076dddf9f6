"""Segmentations as 3D Slicer saves them, drawn and written by real Slicer, become the project's labels by name."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from fastapi import HTTPException
from live import rotation, slicer, write

from deformux.data.volume_reader import read_volume
from deformux_label.lib.store.label_check import checked_labels, label_array

SHAPE = (12, 14, 16)
NAMES = ("liver", "spleen", "kidney")
Box = tuple[tuple[int, int, int], tuple[int, int, int]]
# In the voxel order of Slicer; the second lies partly in the first.
A: Box = ((1, 2, 3), (5, 7, 9))
B: Box = ((3, 5, 6), (8, 10, 12))
C: Box = ((9, 10, 12), (11, 13, 15))
# The shapes in order of drawing; None deletes a segment.
DRAWN: dict[str, tuple[list[tuple[str, list[Box] | None]], bool]] = {
    "two": ([("liver", [A]), ("spleen", [C])], False),
    "other order": ([("spleen", [C]), ("liver", [A])], False),
    "one deleted": ([("liver", [A]), ("gone", [B]), ("gone", None), ("kidney", [C])], False),
    "deleted and added again": ([("liver", [A]), ("spleen", [C]), ("liver", None), ("liver", [B])], False),
    "cropped": ([("liver", [A]), ("spleen", [C])], True),
    "an empty one": ([("liver", [A]), ("spleen", [])], False),
    "an empty foreign one": ([("liver", [A]), ("tumour", [])], False),
    "several layers of one label": ([("liver", [A]), ("liver", [B]), ("spleen", [C])], False),
    "several layers, cropped": ([("liver", [A]), ("liver", [B]), ("spleen", [C])], True),
    "overlap": ([("liver", [A]), ("spleen", [B]), ("kidney", [C])], False),
    "foreign": ([("liver", [A]), ("tumour", [C])], False),
    "nothing": ([], False),
}
GRIDS = {
    "axial": rotation(0, 0, 0),
    # Slicer mirrors the third axis of this one.
    "left-handed": np.diag([-1.0, 1.0, 1.0]),
    "oblique": rotation(20, -15, 30),
}


@dataclass(frozen=True)
class Saved:
    """A scan, a segmentation that Slicer saved for it, and what Slicer reads from that."""

    image: Path
    file: Path
    segments: dict[str, Any]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Saved]:
    folder = tmp_path_factory.mktemp("segmentations")
    jobs, files = [], {}
    for grid, axes in GRIDS.items():
        affine = np.eye(4)
        affine[:3, :3], affine[:3, 3] = axes * (1.5, 2.0, 2.5), (5, -6, 7)
        scan = np.random.default_rng(0).normal(0, 99, SHAPE).astype(np.float32)
        image = write(folder / f"{grid}.nii.gz", scan, affine)
        for kind, (drawn, crop) in DRAWN.items():
            file = folder / f"{grid} {kind}.seg.nrrd"
            jobs.append({"image": str(image), "draw": drawn, "crop": crop, "segmentation": str(file)})
            files[grid, kind] = (image, file)
    answers = slicer(jobs)
    return {key: Saved(*files[key], answer["segments"]) for key, answer in zip(files, answers, strict=True)}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", [kind for kind in DRAWN if kind not in ("overlap", "foreign", "nothing")])
def test_segments_lie_where_slicer_shows_them(saved: dict[tuple[str, str], Saved], grid: str, kind: str) -> None:
    case = saved[grid, kind]
    values = label_array(case.file, case.image, "scan", NAMES, {})
    affine = nib.load(case.image).affine
    found = {name for name in case.segments if case.segments[name]["voxels"]}
    assert found <= set(NAMES)
    for number, name in enumerate(NAMES, start=1):
        voxels = np.argwhere(values == number)
        boxes = _drawn_last(kind, name)
        assert len(voxels) == len({voxel for box in boxes for voxel in _voxels(box)})
        # Two segments of one name are one label; Slicer's answer contains the last of them.
        if kind.startswith("several") or not len(voxels):
            continue
        centre = nib.affines.apply_affine(affine, voxels.mean(0))
        np.testing.assert_allclose(centre, case.segments[name]["centre"], atol=1e-3)


def _drawn_last(kind: str, name: str) -> list[Box]:
    boxes: list[Box] = []
    for drawn, more in DRAWN[kind][0]:
        if drawn == name:
            boxes = [] if more is None else [*boxes, *more]
    return boxes


def _voxels(box: Box) -> set[tuple[int, ...]]:
    return {tuple(v) for v in np.argwhere(np.ones(np.subtract(box[1], box[0]))) + np.array(box[0])}


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("overlap", ("'liver'", "'spleen'", "overlap in 12 voxels", "the label for scan")),
        ("foreign", ("'tumour' is not a label of this project", "liver, spleen, kidney")),
        ("nothing", ("is not on its image's grid", "the label for scan")),
    ],
)
def test_files_that_cannot_be_labels(saved: dict[tuple[str, str], Saved], kind: str, words: tuple[str, ...]) -> None:
    case = saved["oblique", kind]
    with pytest.raises(HTTPException) as error:
        label_array(case.file, case.image, "scan", NAMES, {})
    assert error.value.status_code == 422
    for word in words:
        assert word in error.value.detail


def test_names_of_the_file_win(saved: dict[tuple[str, str], Saved]) -> None:
    """The positions that the request lists are not the values of this file."""
    case = saved["axial", "one deleted"]
    listed = {"label_info": [{"name": "kidney", "idx": 1}, {"name": "liver", "idx": 2}]}
    np.testing.assert_array_equal(
        label_array(case.file, case.image, "scan", NAMES, listed),
        label_array(case.file, case.image, "scan", NAMES, {}),
    )


def test_a_file_with_the_projects_own_values_stays_unchanged(saved: dict[tuple[str, str], Saved]) -> None:
    case = saved["axial", "two"]
    with checked_labels(case.file, case.image, "scan", NAMES, {}) as checked:
        assert checked == case.file
    with checked_labels(case.file, case.image, "scan", ("spleen", "liver"), {}) as checked:
        assert checked != case.file
        values = read_volume(checked, np.uint8).values
    original = read_volume(case.file, np.uint8).values
    np.testing.assert_array_equal(values, np.array([0, 2, 1], dtype=np.uint8)[original])


def test_segments_beyond_the_scan(saved: dict[tuple[str, str], Saved], tmp_path: Path) -> None:
    case = saved["axial", "two"]
    image = nib.load(case.image)
    smaller = write(tmp_path / "smaller.nii.gz", np.asarray(image.dataobj)[:8], image.affine)
    with pytest.raises(HTTPException, match="outside its image"):
        label_array(case.file, smaller, "scan", NAMES, {})
    # The corner with the kidney is cut off, and nothing is in it.
    only = saved["axial", "an empty one"]
    values = label_array(only.file, smaller, "scan", NAMES, {})
    assert values.shape == (8, *SHAPE[1:])
    assert (values == 1).sum() == len(_voxels(A))
    shifted = image.affine.copy()
    shifted[:3, 3] += 0.4
    with pytest.raises(HTTPException, match="not on its image's grid"):
        label_array(only.file, write(tmp_path / "b.nii.gz", np.asarray(image.dataobj), shifted), "scan", NAMES, {})


def test_a_file_far_larger_than_its_scan_is_not_decompressed(tmp_path: Path) -> None:
    image = write(tmp_path / "scan.nii.gz", np.random.default_rng(0).normal(size=SHAPE).astype(np.float32), np.eye(4))
    bomb = tmp_path / "bomb.seg.nrrd"
    header = (
        "NRRD0004\ntype: double\ndimension: 3\nspace: right-anterior-superior\nsizes: 600 600 600\n"
        "space directions: (1,0,0) (0,1,0) (0,0,1)\nkinds: domain domain domain\nendian: little\nencoding: gzip\n"
        "space origin: (0,0,0)\nSegment0_ID:=liver\nSegment0_Name:=liver\nSegment0_LabelValue:=1\n"
        "Segment0_Layer:=0\n\n"
    )
    # Only a header: the file is refused before its data is read.
    bomb.write_bytes(header.encode() + gzip.compress(b""))
    with (
        pytest.raises(HTTPException, match=r"1,728 MB of 600 x 600 x 600 values for an image of 12 x 14 x 16 voxels"),
        checked_labels(bomb, image, "scan", NAMES, {}),
    ):
        pass
