"""Preprocessing and restoring, against nibabel and scipy."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy.ndimage import affine_transform

from deformux.data.loading import LoadLabeld, LoadVolumed
from deformux.data.preprocessing import Preprocessing
from deformux.data.transforms import inference_transforms, labelled_transforms, restore_transforms, run_transforms
from deformux.data.volume_reader import InvalidVolume


def save(path: Path, array: np.ndarray, affine: np.ndarray) -> Path:
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def test_ct_is_clipped_to_its_window(write_case) -> None:
    case = write_case("a")
    hu = np.asarray(nib.load(case.image).dataobj)
    image = run_transforms(inference_transforms(Preprocessing("ct", window_hu=(-100, 100))), {"image": case.image})[
        "image"
    ]
    np.testing.assert_allclose(image[0].numpy(), (np.clip(hu, -100, 100) + 100) / 200, atol=1e-5)


def test_mr_is_clipped_to_percentiles_and_standardised(write_case) -> None:
    case = write_case("a")
    values = np.asarray(nib.load(case.image).dataobj)
    image = run_transforms(inference_transforms(Preprocessing("mr", percentiles=(1, 99))), {"image": case.image})[
        "image"
    ]
    clipped = np.clip(values, *np.percentile(values, (1, 99)))
    np.testing.assert_allclose(image[0].numpy(), (clipped - clipped.mean()) / clipped.std(), atol=1e-3)


def test_mr_does_not_depend_on_the_scanners_scale(write_case, tmp_path: Path) -> None:
    case = write_case("a")
    scan = nib.load(case.image)
    scaled = save(tmp_path / "b.nii.gz", np.asarray(scan.dataobj) * 4711 + 99, scan.affine)
    both = [
        run_transforms(inference_transforms(Preprocessing("mr")), {"image": path})["image"]
        for path in (case.image, scaled)
    ]
    torch.testing.assert_close(both[0].as_tensor(), both[1].as_tensor(), rtol=1e-3, atol=1e-3)


def test_the_networks_grid_is_right_anterior_superior(write_case, oblique: np.ndarray) -> None:
    case = write_case("a", affine=oblique)
    image = run_transforms(inference_transforms(Preprocessing("ct")), {"image": case.image})["image"]
    assert nib.aff2axcodes(image.affine.numpy()) == ("R", "A", "S")


def test_spacing_is_the_requested_one(write_case, oblique: np.ndarray) -> None:
    case = write_case("a", affine=oblique)
    image = run_transforms(
        inference_transforms(Preprocessing("ct", spacing_mm=(1.5, 2.0, 2.5))), {"image": case.image}
    )["image"]
    np.testing.assert_allclose(nib.affines.voxel_sizes(image.affine.numpy()), (1.5, 2.0, 2.5), atol=1e-4)


@pytest.mark.parametrize("spacing", [None, (1.0, 0.9, 1.0)])
def test_labels_come_back_on_the_scans_own_grid(write_case, oblique: np.ndarray, spacing) -> None:
    case = write_case("a", affine=oblique, size=(30, 26, 21))
    prep = Preprocessing("ct", spacing_mm=spacing)
    data = run_transforms(labelled_transforms(prep, n_labels=2), {"image": case.image, "label": case.label})
    one_hot = torch.nn.functional.one_hot(data["label"][0].long().as_tensor(), 3).movedim(-1, 0).float()
    restored = run_transforms(restore_transforms(), {**data, "pred": one_hot})["pred"]
    file = nib.load(case.label)
    truth = np.asarray(file.dataobj)
    np.testing.assert_allclose(restored.affine.numpy(), file.affine, atol=1e-5)
    assert restored.dtype == torch.uint8
    if spacing is None:
        np.testing.assert_array_equal(restored[0].numpy(), truth)
    else:
        # Through a finer grid only single voxels on an edge may change.
        for label in (1, 2):
            a, b = restored[0].numpy() == label, truth == label
            assert 2 * (a & b).sum() / (a.sum() + b.sum()) > 0.95


def test_logits_are_interpolated_as_scipy_does(write_case, oblique: np.ndarray) -> None:
    case = write_case("a", affine=oblique, size=(30, 26, 21))
    data = run_transforms(inference_transforms(Preprocessing("ct", spacing_mm=(3.0, 2.0, 4.0))), {"image": case.image})
    image = data["image"]
    logits = torch.randn(4, *image.shape[1:], generator=torch.Generator().manual_seed(0))
    restored = run_transforms(restore_transforms(), {**data, "pred": logits})["pred"][0].numpy()
    file = nib.load(case.image)
    matrix = np.linalg.inv(image.affine.numpy()) @ file.affine
    sampled = [
        affine_transform(channel, matrix[:3, :3], matrix[:3, 3], file.shape, order=1, mode="nearest")
        for channel in logits.numpy().astype(float)
    ]
    # Where two classes tie to rounding, either may win.
    ranked = np.sort(sampled, axis=0)
    decided = ranked[-1] - ranked[-2] > 1e-3
    np.testing.assert_array_equal(restored[decided], np.argmax(sampled, axis=0)[decided])
    assert decided.mean() > 0.99


def test_real_ct_survives_the_round_trip(shared_data: Path) -> None:
    image, label = (shared_data / "ct" / name for name in ("example_ct_sm.nii.gz", "example_seg.nii.gz"))
    truth = np.asarray(nib.load(label).dataobj)
    n = int(truth.max())
    data = run_transforms(labelled_transforms(Preprocessing("ct"), n_labels=n), {"image": image, "label": label})
    one_hot = torch.nn.functional.one_hot(data["label"][0].long().as_tensor(), n + 1).movedim(-1, 0).float()
    np.testing.assert_array_equal(
        run_transforms(restore_transforms(), {**data, "pred": one_hot})["pred"][0].numpy(), truth
    )


def broken_volumes(folder: Path) -> dict[str, tuple[Path, str]]:
    rng = np.random.default_rng(0)
    good = rng.normal(size=(12, 12, 12)).astype(np.float32)
    text = folder / "text.nii.gz"
    text.write_text("this is no image")
    whole = save(folder / "whole.nii.gz", good, np.eye(4)).read_bytes()
    cut = folder / "cut.nii.gz"
    cut.write_bytes(whole[: len(whole) // 2])
    return {
        "text": (text, "cannot be read"),
        "cut": (cut, "cannot be read"),
        "line": (save(folder / "line.nii.gz", good[:, 0, 0], np.eye(4)), "1 dimensions"),
        "series": (save(folder / "series.nii.gz", np.stack([good] * 3, axis=-1), np.eye(4)), "holds 3 time points"),
        "nan": (save(folder / "nan.nii.gz", np.full_like(good, np.nan), np.eye(4)), "NaN"),
        "constant": (save(folder / "constant.nii.gz", np.ones_like(good), np.eye(4)), "same intensity"),
        "missing": (folder / "missing.nii.gz", "cannot be read"),
    }


@pytest.mark.parametrize("kind", ["text", "cut", "line", "series", "nan", "constant", "missing"])
def test_an_unusable_scan_is_named_in_one_sentence(tmp_path: Path, kind: str) -> None:
    path, reason = broken_volumes(tmp_path)[kind]
    with pytest.raises(InvalidVolume) as error:
        LoadVolumed()({"image": path})
    assert path.name in str(error.value)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
@pytest.mark.parametrize("spacing", [None, (1.5, 1.0, 2.0)])
def test_an_image_is_a_volume_of_one_slice(
    tmp_path: Path, suffix: str, spacing: tuple[float, float, float] | None
) -> None:
    # ITK's origin and spacing are in LPS millimetres.
    image = sitk.GetImageFromArray(np.add.outer(np.arange(20.0), np.zeros(30, dtype=np.float32)))
    image.SetSpacing((2.0, 3.0))
    image.SetOrigin((5.0, 7.0))
    sitk.WriteImage(image, str(tmp_path / f"a{suffix}"))
    data = run_transforms(
        inference_transforms(Preprocessing(modality="mr", spacing_mm=spacing)), {"image": tmp_path / f"a{suffix}"}
    )
    logits = torch.cat([-data["image"], data["image"]])
    labels = run_transforms(restore_transforms(), {**data, "pred": logits})["pred"]
    assert labels.shape == (1, 30, 20, 1)
    np.testing.assert_allclose(labels.affine[:2], [[-2.0, 0, 0, -5.0], [0, -3.0, 0, -7.0]])
    assert (np.asarray(labels)[0, :, :, 0] == (np.arange(20) >= 10)).all()


def test_a_fourth_axis_of_one_is_a_volume(tmp_path: Path) -> None:
    array = np.random.default_rng(0).normal(size=(6, 7, 8, 1)).astype(np.float32)
    image = LoadVolumed()({"image": save(tmp_path / "a.nii.gz", array, np.eye(4))})["image"]
    assert image.shape == (1, 6, 7, 8)


def test_a_label_on_another_grid_is_refused(write_case, tmp_path: Path) -> None:
    case = write_case("a")
    file = nib.load(case.label)
    moved = file.affine.copy()
    moved[0, 3] += 0.01
    array = np.asarray(file.dataobj)
    for name, other, reason in (
        ("moved.nii.gz", save(tmp_path / "moved.nii.gz", array, moved), "0.01 mm"),
        ("cropped.nii.gz", save(tmp_path / "cropped.nii.gz", array[1:], file.affine), "voxels"),
    ):
        data = LoadVolumed()({"image": case.image, "label": other})
        with pytest.raises(InvalidVolume, match=name) as error:
            LoadLabeld(n_labels=2)(data)
        assert reason in str(error.value)


@pytest.mark.parametrize("value", [3, -1, 0.5])
def test_a_label_value_outside_the_list_is_refused(write_case, tmp_path: Path, value: float) -> None:
    case = write_case("a")
    file = nib.load(case.label)
    array = np.asarray(file.dataobj).astype(np.float32)
    array[0, 0, 0] = value
    data = LoadVolumed()({"image": case.image, "label": save(tmp_path / "bad.nii.gz", array, file.affine)})
    with pytest.raises(InvalidVolume, match="expected whole numbers from 0 to 2"):
        LoadLabeld(n_labels=2)(data)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("pet", "native", "96,96,96"), ["ct, mr", "pet"]),
        (("ct", "1,2", "96,96,96"), ["spacing"]),
        (("ct", "a,b,c", "96,96,96"), ["spacing", "a,b,c"]),
        (("ct", "0,1,1", "96,96,96"), ["spacing", "0.05"]),
        (("ct", "nan,1,1", "96,96,96"), ["spacing"]),
        (("ct", "native", "96"), ["patch size"]),
        (("ct", "native", "0,96,96"), ["patch size", "between 1 and 512"]),
        (("ct", "native", "96,96,9.5"), ["patch size", "whole"]),
    ],
)
def test_a_bad_option_names_the_valid_ones(options: tuple[str, str, str], words: list[str]) -> None:
    with pytest.raises(ValueError, match=r".+") as error:
        Preprocessing.from_options(*options)
    assert all(word in str(error.value) for word in words)


def test_preprocessing_survives_the_card() -> None:
    prep = Preprocessing.from_options("mr", "1.5,1.5,2", "48,64,48")
    assert Preprocessing.from_dict(prep.to_dict()) == prep
