"""Frames: exact turns of voxels that no angle decides."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from benchmarks.common.turned_headers import turned_affine, write_turned
from monai.transforms import Orientation
from scipy.spatial.transform import Rotation

from deformux.data.frame import choose_frame, frame_axes, frame_codes, frame_grid, through_plane_axis
from deformux.data.grid import ScanGrid
from deformux.data.loading import LoadVolumed
from deformux.data.preprocessing import Preprocessing
from deformux.data.transforms import (
    inference_transforms,
    label_grid_transforms,
    labelled_transforms,
    restore_transforms,
    run_transforms,
)

SHAPE = (20, 18, 7)
SHORT_AXIS = np.array([[-1.25, 0, 0, 30], [0, -1.25, 0, 40], [0, 0, 8, -20], [0, 0, 0, 1.0]])
ACQUISITION = Preprocessing("mr", frame="acquisition")
ROTATIONS = Rotation.random(12, random_state=0)
# Converters of one DICOM series: in its order, with rows reversed (dcm2niix), with slices first.
STORED = {
    "as DICOM": ((0, 1, 2), ()),
    "rows reversed": ((0, 1, 2), (1,)),
    "slices first": ((2, 0, 1), ()),
    "slices first, rows reversed": ((2, 0, 1), (2,)),
    "slices between": ((0, 2, 1), ()),
}


def stored_as(array: np.ndarray, affine: np.ndarray, how: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the same voxels at the same places, with axes in another order and some of them reversed."""
    order, flips = STORED[how]
    orientation = np.stack([np.argsort(order), [1, 1, 1]], axis=1)
    for flip in flips:
        orientation[orientation[:, 0] == flip, 1] = -1
    turned = nib.orientations.apply_orientation(array, orientation)
    return turned, affine @ nib.orientations.inv_ornt_aff(orientation, array.shape)


@pytest.fixture
def heart(tmp_path: Path) -> tuple[Path, Path]:
    """Write a noisy short-axis stack and its label, and return their paths."""
    rng = np.random.default_rng(0)
    image, label = tmp_path / "image.nii.gz", tmp_path / "label.nii.gz"
    nib.save(nib.Nifti1Image(rng.normal(100, 20, SHAPE).astype(np.float32), SHORT_AXIS), image)
    nib.save(nib.Nifti1Image(rng.integers(0, 4, SHAPE, dtype=np.uint8), SHORT_AXIS), label)
    return image, label


def network_input(image: Path, label: Path, prep: Preprocessing = ACQUISITION) -> dict:
    return run_transforms(labelled_transforms(prep, n_labels=3), {"image": image, "label": label})


def restored(data: dict) -> np.ndarray:
    logits = torch.nn.functional.one_hot(data["label"][0].long().as_tensor(), 4).movedim(-1, 0).float()
    return run_transforms(restore_transforms(), {**data, "pred": logits})["pred"][0].numpy()


def test_a_turned_header_changes_nothing(heart: tuple[Path, Path], tmp_path: Path) -> None:
    expected = network_input(*heart)
    truth = np.asarray(nib.load(heart[1]).dataobj)
    for n, rotation in enumerate(ROTATIONS):
        turned = (tmp_path / f"image{n}.nii.gz", tmp_path / f"label{n}.nii.gz")
        for source, target in zip(heart, turned, strict=True):
            write_turned(source, target, rotation)
        found = network_input(*turned)
        for key in ("image", "label"):
            np.testing.assert_array_equal(found[key].numpy(), expected[key].numpy())
        np.testing.assert_array_equal(restored(found), truth)


def test_the_networks_grid_keeps_the_patients_places(heart: tuple[Path, Path], tmp_path: Path) -> None:
    for n, rotation in enumerate(ROTATIONS):
        target = tmp_path / f"{n}.nii.gz"
        write_turned(heart[0], target, rotation)
        image = run_transforms([LoadVolumed("image"), *label_grid_transforms(ACQUISITION, "image")], {"image": target})
        file, turned = nib.load(target), image["image"]
        voxels = np.argwhere(np.ones(SHAPE, bool))
        places = nib.affines.apply_affine(np.linalg.inv(turned.affine.numpy()) @ file.affine, voxels)
        index = np.rint(places).astype(int)
        np.testing.assert_allclose(places, index, atol=1e-4)
        np.testing.assert_array_equal(ScanGrid.of(turned).nearest(voxels), index)
        np.testing.assert_array_equal(turned[0].numpy()[tuple(index.T)], np.asarray(file.dataobj)[tuple(voxels.T)])


@pytest.mark.parametrize("how", STORED)
def test_converters_of_one_series_agree(heart: tuple[Path, Path], tmp_path: Path, how: str) -> None:
    expected = network_input(*heart)
    paths = tmp_path / "image2.nii.gz", tmp_path / "label2.nii.gz"
    for source, target in zip(heart, paths, strict=True):
        file = nib.load(source)
        nib.save(nib.Nifti1Image(*stored_as(np.asarray(file.dataobj), file.affine, how)), target)
    found = network_input(*paths)
    for key in ("image", "label"):
        np.testing.assert_array_equal(found[key].numpy(), expected[key].numpy())
    np.testing.assert_allclose(found["image"].affine.numpy(), expected["image"].affine.numpy(), atol=1e-4)
    np.testing.assert_array_equal(restored(found), np.asarray(nib.load(paths[1]).dataobj))


def test_ras_is_what_it_was(heart: tuple[Path, Path], tmp_path: Path) -> None:
    turn = Orientation("RAS", labels=(("L", "R"), ("P", "A"), ("I", "S")))
    for n, rotation in enumerate(ROTATIONS):
        target = tmp_path / f"{n}.nii.gz"
        write_turned(heart[0], target, rotation)
        expected = turn(LoadVolumed("image")({"image": target})["image"])
        loaded = LoadVolumed("image")({"image": target})
        found = run_transforms(label_grid_transforms(Preprocessing("mr"), "image"), loaded)["image"]
        np.testing.assert_array_equal(found.numpy(), expected.numpy())
        np.testing.assert_array_equal(found.affine.numpy(), expected.affine.numpy())


def test_every_turn_is_right_handed_with_the_grid_that_is_promised() -> None:
    for rotation in ROTATIONS:
        affine = turned_affine(SHORT_AXIS, SHAPE, rotation)
        for how in STORED:
            array, own = stored_as(np.zeros(SHAPE), affine, how)
            for frame in ("ras", "acquisition"):
                turn = Orientation(frame_codes(frame, array.shape, own), labels=(("L", "R"), ("P", "A"), ("I", "S")))
                turned = turn(torch.zeros(1, *array.shape)).affine.numpy()
                order, signs = frame_axes(frame, array.shape, own)
                matrix = own[:3, list(order)] * signs
                assert np.linalg.det(matrix) > 0
                shape, spacing = frame_grid(frame, array.shape, own)
                np.testing.assert_allclose(spacing, np.linalg.norm(matrix, axis=0))
                assert turned.shape == (4, 4)
                assert sorted(shape) == sorted(SHAPE)
            assert frame_grid("acquisition", array.shape, own)[0] == SHAPE


@pytest.mark.parametrize(
    ("shape", "spacing", "expected"),
    [
        ((256, 256, 15), (1.25, 1.25, 8), 2),
        ((15, 256, 256), (8, 1.25, 1.25), 0),
        ((256, 1, 256), (2, 1, 2), 1),
        ((512, 512, 300), (0.8, 0.8, 0.8), None),
        ((512, 512, 300), (0.8, 0.8, 0.9), None),
        ((300, 512, 512), (1.0, 0.8, 0.8), 0),
        ((35, 51, 20), (1, 1, 1), None),
    ],
)
def test_slices_are_stacked_along_the_coarse_axis(shape, spacing, expected: int | None) -> None:
    assert through_plane_axis(shape, np.diag([*spacing, 1.0])) == expected


def test_a_projects_frame_is_ras_only_with_a_margin() -> None:
    straight = [SHORT_AXIS] * 3
    assert choose_frame(straight, [SHAPE] * 3)[0] == "ras"
    by = {angle: turned_affine(SHORT_AXIS, SHAPE, Rotation.from_euler("x", angle, degrees=True)) for angle in (20, 40)}
    assert choose_frame([*straight, by[20]], [SHAPE] * 4)[0] == "ras"
    frame, reason = choose_frame([*straight, by[40]], [SHAPE] * 4)
    assert frame == "acquisition"
    assert "1 of 4 scans" in reason
    assert "40" in reason
    sagittal = turned_affine(SHORT_AXIS, SHAPE, Rotation.from_euler("y", 90, degrees=True))
    frame, reason = choose_frame([*straight, sagittal], [SHAPE] * 4)
    assert frame == "acquisition"
    assert "3 along superior" in reason
    assert "1 along right" in reason


def test_a_frame_is_checked_and_stored_only_if_it_was_chosen() -> None:
    with pytest.raises(ValueError, match="frame must be one of ras, acquisition; got 'las'"):
        Preprocessing(frame="las")
    assert "frame" not in Preprocessing().to_dict()
    assert Preprocessing.from_dict(ACQUISITION.to_dict()) == ACQUISITION


def test_real_hearts_with_turned_headers(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "heart_mr_acdc"
    images = sorted((folder / "images").glob("*.nii.gz"))[:3]
    if not images:
        pytest.skip("no hearts at ../shared/data/heart_mr_acdc")
    affines, shapes = [], []
    for n, (source, rotation) in enumerate(zip(images, ROTATIONS, strict=False)):
        turned = tmp_path / f"image{n}.nii.gz", tmp_path / f"label{n}.nii.gz"
        for path, target in zip((source, folder / "labels" / source.name), turned, strict=True):
            write_turned(path, target, rotation)
        expected = network_input(source, folder / "labels" / source.name)
        found = network_input(*turned)
        for key in ("image", "label"):
            np.testing.assert_array_equal(found[key].numpy(), expected[key].numpy())
        np.testing.assert_array_equal(restored(found), np.asarray(nib.load(turned[1]).dataobj))
        file = nib.load(turned[0])
        affines.append(file.affine)
        shapes.append(file.shape)
    assert choose_frame(affines, shapes)[0] == "acquisition"
    one = run_transforms(inference_transforms(ACQUISITION), {"image": images[0]})["image"]
    assert one.shape[1:] == frame_grid("acquisition", nib.load(images[0]).shape, nib.load(images[0]).affine)[0]
