"""Frames: exact turns of voxels that no angle decides."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from benchmarks.common.turned_headers import turned_affine, write_turned
from monai.data import MetaTensor
from monai.transforms import Orientation
from scipy.spatial.transform import Rotation

from deformux.data.frame import (
    AUGMENTATION_REASONS,
    choose_frame,
    frame_augmentation,
    frame_axes,
    frame_codes,
    frame_grid,
    through_plane_axis,
)
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
from deformux.interactive.editor import Editor
from deformux.interactive.open_scan import open_scan
from deformux.networks.deformux_net import DeformUXNet

SHAPE = (20, 18, 7)
SHORT_AXIS = np.array([[-1.25, 0, 0, 30], [0, -1.25, 0, 40], [0, 0, 8, -20], [0, 0, 0, 1.0]])
ACQUISITION = Preprocessing("mr", frame="acquisition")
ROTATIONS = Rotation.random(12, random_state=0)
RESAMPLED = Preprocessing("mr", frame="acquisition", spacing_mm=(1.5, 1.0, 5.0))
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


def left_handed(path: Path) -> None:
    """Mirror a file: the same stored numbers, the second axis the other way."""
    file = nib.load(path)
    nib.save(nib.Nifti1Image(np.asarray(file.dataobj), file.affine * [1, -1, 1, 1]), path)


def on_grid(path: Path, shape: tuple[int, ...], affine: np.ndarray, *, linear: bool) -> np.ndarray:
    """Resample a file with SimpleITK, which reads its header itself; NaN outside."""
    steps = affine[:3, :3] * np.array([[-1], [-1], [1]])  # ITK counts towards left and posterior
    spacing = np.linalg.norm(steps, axis=0)
    grid = sitk.ResampleImageFilter()
    grid.SetSize([int(n) for n in shape])
    grid.SetOutputSpacing(spacing.tolist())
    grid.SetOutputDirection((steps / spacing).ravel().tolist())
    grid.SetOutputOrigin((affine[:3, 3] * [-1, -1, 1]).tolist())
    grid.SetInterpolator(sitk.sitkLinear if linear else sitk.sitkNearestNeighbor)
    grid.SetDefaultPixelValue(np.nan)
    return sitk.GetArrayFromImage(grid.Execute(sitk.ReadImage(str(path), sitk.sitkFloat64))).T


@pytest.mark.parametrize("mirrored", [False, True])
def test_spacing_along_the_frames_axes_is_as_simpleitk_resamples(
    heart: tuple[Path, Path], tmp_path: Path, mirrored: bool
) -> None:
    for n, rotation in enumerate(ROTATIONS[:4]):
        for source, key in zip(heart, ("image", "label"), strict=True):
            target = tmp_path / f"{key}{n}.nii.gz"
            write_turned(source, target, rotation)
            if mirrored:
                left_handed(target)
            data = {key: LoadVolumed(key)({key: target})[key]}
            native = run_transforms(label_grid_transforms(ACQUISITION, key), data)[key].affine.numpy()
            found = run_transforms(label_grid_transforms(RESAMPLED, key), data)[key]
            np.testing.assert_array_equal(data[key].affine.numpy(), data[key].meta["original_affine"])
            affine = found.affine.numpy()
            np.testing.assert_allclose(nib.affines.voxel_sizes(affine), RESAMPLED.spacing_mm, rtol=1e-5)
            np.testing.assert_array_equal(affine[:3, 3], native[:3, 3])
            assert np.linalg.det(affine) > 0
            expected = on_grid(target, found.shape[1:], affine, linear=key == "image")
            # The outermost voxels lie on the border or beyond it, where rounding decides what ITK calls inside.
            inside = (slice(1, -1),) * 3
            assert np.isfinite(expected[inside]).all()
            if key == "image":
                np.testing.assert_allclose(found[0].numpy()[inside], expected[inside], atol=2e-3)
            else:
                # Half way between two voxels either is the nearest.
                assert np.mean(found[0].numpy()[inside] != expected[inside]) < 0.1


@pytest.mark.parametrize("step", [(1.5, 1.0, 5.0), (3.7, 2.9, 9.1)])
def test_a_turned_header_changes_nothing_at_another_spacing(heart: tuple[Path, Path], tmp_path: Path, step) -> None:
    prep = Preprocessing("mr", frame="acquisition", spacing_mm=step)
    expected = network_input(*heart, prep)
    logits = torch.randn(4, *expected["image"].shape[1:], generator=torch.Generator().manual_seed(0))
    mask = run_transforms(restore_transforms(), {**expected, "pred": logits})["pred"]
    for n, rotation in enumerate(ROTATIONS):
        turned = (tmp_path / f"image{n}.nii.gz", tmp_path / f"label{n}.nii.gz")
        for source, target in zip(heart, turned, strict=True):
            write_turned(source, target, rotation)
        found = network_input(*turned, prep)
        for key in ("image", "label"):
            np.testing.assert_array_equal(found[key].numpy(), expected[key].numpy())
        restored_mask = run_transforms(restore_transforms(), {**found, "pred": logits})["pred"]
        # Where two classes tie to rounding, either may win.
        assert np.mean(restored_mask.numpy() != mask.numpy()) < 2e-3


def test_clicks_and_drawn_masks_land_on_the_files_voxels(heart: tuple[Path, Path], tmp_path: Path) -> None:
    prep = Preprocessing("mr", frame="acquisition", patch_size=(16, 16, 16))
    torch.manual_seed(0)
    network = DeformUXNet(1, 4, "tiny", guidance=True).eval()
    clicks = {1: [(3, 4, 5)], 2: [(15, 2, 1), (14, 2, 1)], 0: [(8, 8, 6)]}
    drawn = np.asarray(nib.load(heart[1]).dataobj)
    expected = Editor(open_scan(network, heart[0], prep), network, prep).apply(clicks)
    from_drawn = Editor(open_scan(network, heart[0], prep), network, prep, mask=drawn).apply(clicks)
    for n, rotation in enumerate(ROTATIONS[:3]):
        turned = tmp_path / f"{n}.nii.gz"
        write_turned(heart[0], turned, rotation)
        scan = open_scan(network, turned, prep)
        mask = Editor(scan, network, prep).apply(clicks)
        np.testing.assert_array_equal(mask, expected)
        np.testing.assert_array_equal(Editor(scan, network, prep, mask=drawn).apply(clicks), from_drawn)
        for label, voxels in clicks.items():
            assert all(mask[voxel] == label for voxel in voxels)


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
                turned = turn(MetaTensor(torch.zeros(1, *array.shape), affine=torch.as_tensor(own)))
                order, signs = frame_axes(frame, array.shape, own)
                matrix = own[:3, list(order)] * signs
                assert np.linalg.det(matrix) > 0
                shape, spacing = frame_grid(frame, array.shape, own)
                np.testing.assert_allclose(spacing, np.linalg.norm(matrix, axis=0))
                assert turned.shape[1:] == shape
                np.testing.assert_allclose(turned.affine.numpy()[:3, :3], matrix, atol=1e-9)
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


def test_augmentation_follows_the_frame_and_its_spacing() -> None:
    isotropic = frame_augmentation("ras", (1, 1, 1))
    assert isotropic["rotation_degrees"] == (15, 15, 15)
    assert isotropic["voxel_aspect"] == (1, 1, 1)
    heart = frame_augmentation("acquisition", (1.25, 1.25, 8))
    assert heart["rotation_degrees"] == (0, 0, 30)
    assert heart["voxel_aspect"] == (1, 1, 6.4)
    assert frame_augmentation("ras", (4, 1, 1))["rotation_degrees"] == (15, 0, 0)
    assert frame_augmentation("ras", (1, 1, 1.5))["rotation_degrees"] == (10, 10, 15)
    for changes in (isotropic, heart):
        assert changes["flip_axes"] == ()
        assert changes.keys() == AUGMENTATION_REASONS.keys()


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
