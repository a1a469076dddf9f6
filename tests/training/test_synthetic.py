"""The synthetic cohort against independent readings of its files: nibabel geometry, HU per label, connectedness."""

import json
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from deformux.data.synthetic import LABELS, synthetic_volume, write_cohort

VOLUMES = 6
# mean HU inside the true label, in the portal venous to late arterial range that the phantom imitates
EXPECTED_HU = {"liver": (75, 140), "spleen": (75, 150), "kidneys": (120, 215), "vessels": (130, 260)}
# millilitres: from a small to a large adult; the field of view cuts kidneys and vessels at neither end of the liver
EXPECTED_ML = {"liver": (500, 1700), "spleen": (80, 450), "kidneys": (130, 450), "vessels": (40, 160)}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cohort(tmp_path_factory.mktemp("cohort"), volumes=VOLUMES, seed=3)


def read(folder: Path) -> list[tuple[nib.Nifti1Image, nib.Nifti1Image]]:
    images = sorted((folder / "images").glob("*.nii.gz"))
    return [(nib.load(path), nib.load(folder / "labels" / path.name)) for path in images]


def test_cohort_has_images_labels_and_a_description(cohort: Path) -> None:
    pairs = read(cohort)
    assert len(pairs) == VOLUMES
    description = json.loads((cohort / "dataset.json").read_text())
    assert description["labels"] == {"0": "background", "1": "liver", "2": "spleen", "3": "kidneys", "4": "vessels"}
    assert description["modality"] == {"0": "CT"}
    for image, label in pairs:
        assert image.get_data_dtype() == np.int16
        assert label.get_data_dtype() == np.uint8
        assert image.shape == label.shape
        np.testing.assert_array_equal(image.affine, label.affine)
        assert image.header.get_xyzt_units()[0] == "mm"


def test_voxels_are_anisotropic_and_grids_vary(cohort: Path) -> None:
    images = [image for image, _ in read(cohort)]
    for image in images:
        x, y, z = np.linalg.norm(image.affine[:3, :3], axis=0)
        assert x == pytest.approx(y, rel=1e-5)
        assert 1.15 < z / x < 1.8
        assert 2.9 < x < 4.3
        assert 250 < x * image.shape[0] < 360  # field of view of an adult's abdomen, mm
        assert 165 < z * image.shape[2] < 195
    assert len({image.shape for image in images}) > 1
    assert len({nib.aff2axcodes(image.affine) for image in images}) > 1
    assert len({tuple(image.affine[:3, 3].round()) for image in images}) == VOLUMES


def test_organs_have_realistic_hu_and_volume(cohort: Path) -> None:
    for image, label in read(cohort):
        hu, values = np.asarray(image.dataobj), np.asarray(label.dataobj)
        assert set(np.unique(values)) == {0, 1, 2, 3, 4}
        voxel_ml = abs(np.linalg.det(image.affine[:3, :3])) / 1000
        for value, name in enumerate(LABELS, start=1):
            low, high = EXPECTED_HU[name]
            assert low < hu[values == value].mean() < high, name
            low, high = EXPECTED_ML[name]
            assert low < np.count_nonzero(values == value) * voxel_ml < high, name
        core = ndimage.binary_erosion(values == 4, iterations=2)  # the aorta without partial volume
        assert 190 < hu[core].mean() < 290
        assert np.percentile(hu, 1) < -950  # air around the body
        assert hu.max() > 350  # bone


def test_noise_resembles_a_scanners(cohort: Path) -> None:
    for image, label in read(cohort):
        core = ndimage.binary_erosion(np.asarray(label.dataobj) == 1, iterations=2)
        hu = np.asarray(image.dataobj, np.float64)
        residual = hu - ndimage.median_filter(hu, 5)
        assert 7 < residual[core].std() < 30


def test_vessels_are_one_connected_tree_and_kidneys_two_organs(cohort: Path) -> None:
    for _, label in read(cohort):
        values = np.asarray(label.dataobj)
        anywhere = np.ones((3, 3, 3))
        assert ndimage.label(values == 4, anywhere)[1] == 1
        _, parts = ndimage.label(values == 3, anywhere)
        assert parts == 2


def test_liver_lies_right_and_spleen_left_whatever_the_orientation(cohort: Path) -> None:
    for image, label in read(cohort):
        values = np.asarray(label.dataobj)
        centre = {
            name: nib.affines.apply_affine(image.affine, np.argwhere(values == value).mean(axis=0))
            for value, name in enumerate(LABELS, start=1)
        }
        assert centre["liver"][0] > centre["vessels"][0] > centre["spleen"][0]  # RAS: x grows to the right
        assert centre["liver"][1] > centre["kidneys"][1]  # kidneys lie behind
        assert centre["liver"][2] > centre["kidneys"][2]


def test_same_seed_gives_the_same_patient_and_another_seed_another() -> None:
    first, again, other = (synthetic_volume(seed, voxel_scale=2) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.label, again.label)
    np.testing.assert_array_equal(first.affine, again.affine)
    if first.label.shape == other.label.shape:
        assert np.mean(first.label != other.label) > 0.02


def test_patients_differ(cohort: Path) -> None:
    fractions, hu = [], []
    for image, label in read(cohort):
        values = np.asarray(label.dataobj)
        fractions.append([np.mean(values == value) for value in range(1, 5)])
        hu.append([np.asarray(image.dataobj)[values == value].mean() for value in range(1, 5)])
    assert np.all(np.std(fractions, axis=0) / np.mean(fractions, axis=0) > 0.05)
    assert np.all(np.std(hu, axis=0) > 3)


def test_voxel_scale_keeps_the_anatomy_in_millimetres() -> None:
    fine, coarse = synthetic_volume(8), synthetic_volume(8, voxel_scale=2)
    assert coarse.image.size < fine.image.size / 6
    extent = [np.linalg.norm(v.affine[:3, :3], axis=0) * v.image.shape for v in (fine, coarse)]
    np.testing.assert_allclose(*extent, rtol=0.05)


def test_a_full_cohort_is_quick(tmp_path: Path) -> None:
    start = time.process_time()
    write_cohort(tmp_path, volumes=2)
    assert (time.process_time() - start) * 8 < 20 * 2  # 16 volumes in 20 s, with room for a slow machine


@pytest.mark.parametrize("bad", [0, -1, float("nan")])
def test_bad_voxel_scale_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match=r"voxel_scale: got .* expected at least 0\.5"):
        synthetic_volume(0, voxel_scale=bad)


def test_an_empty_cohort_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="volumes: got 0, expected at least 1"):
        write_cohort(tmp_path / "cohort", volumes=0)
    assert not (tmp_path / "cohort").exists()
