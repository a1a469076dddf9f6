"""Labels of some slices: which are found, what a plan and a training make of them."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from deformux.data.label_values import UNLABELLED
from deformux.data.partial_labels import AnnotatedSlices, drawn_slices, filled_between_slices, spread_labels
from deformux.data.preprocessing import Preprocessing
from deformux.data.scan_facts import read_case_facts
from deformux.data.transforms import labelled_transforms, run_transforms

SPACING = (1.0, 1.0, 1.0)


def ball(size: tuple[int, int, int] = (40, 44, 48), radius: float = 14.0) -> np.ndarray:
    """Label 1 in a ball, with a core of label 2."""
    far = np.linalg.norm(np.indices(size) - (np.array(size)[:, None, None, None] - 1) / 2, axis=0)
    return np.where(far < radius / 2, 2, far < radius).astype(np.uint8)


def every(labels: np.ndarray, axis: int, step: int, value: int = 0) -> np.ndarray:
    """The same labels in every so many slices, and another value in the rest."""
    kept = np.full_like(labels, value)
    index = [slice(None)] * 3
    index[axis] = slice(2, None, step)
    kept[tuple(index)] = labels[tuple(index)]
    return kept


@pytest.mark.parametrize("step", [2, 5])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_label_of_every_so_many_slices_is_recognised(axis: int, step: int) -> None:
    sparse = every(ball(), axis, step)
    found = drawn_slices(sparse, SPACING)
    assert found is not None
    assert found.axis == axis
    drawn = {int(at) for at in np.argwhere(sparse > 0)[:, axis]}
    assert found.slices == tuple(sorted(drawn))
    known = found.apply(sparse) != UNLABELLED
    others = tuple(a for a in range(3) if a != axis)
    np.testing.assert_array_equal(np.flatnonzero(known.any(others)), sorted(drawn))
    np.testing.assert_array_equal(known.all(others), known.any(others))


def test_a_complete_label_is_complete() -> None:
    one_gap = ball()
    one_gap[:, :, 22] = 0
    points = np.zeros((20, 20, 20), np.uint8)
    points[[2, 8, 14], [3, 9, 12], [4, 7, 17]] = 1
    two_slices = np.zeros((20, 20, 20), np.uint8)
    two_slices[5:9, 5:9, [4, 9]] = 1
    for labels in (ball(), one_gap, points, two_slices, np.zeros((5, 5, 5), np.uint8)):
        assert drawn_slices(labels, SPACING) is None
    assert drawn_slices(every(ball(), 2, 5), SPACING, "all") is None


def test_with_the_rule_of_drawn_slices_the_others_count_nowhere() -> None:
    block = ball()
    found = drawn_slices(block, (1.0, 1.0, 3.0), "drawn")
    assert found == AnnotatedSlices(2, tuple(range(10, 38))), "the thick axis, where nothing else tells"
    assert drawn_slices(every(ball(), 1, 4), (1.0, 1.0, 3.0), "drawn").axis == 1


def test_a_plan_takes_sizes_as_if_the_slices_between_were_labelled(tmp_path: Path) -> None:
    whole = ball()
    facts = {}
    for name, labels in {"whole": whole, "sparse": every(whole, 2, 5, UNLABELLED)}.items():
        image = np.random.default_rng(0).normal(size=whole.shape).astype(np.float32)
        nib.save(nib.Nifti1Image(image, np.eye(4)), tmp_path / f"{name}.nii.gz")
        nib.save(nib.Nifti1Image(labels, np.eye(4)), tmp_path / f"{name}_label.nii.gz")
        _, facts[name] = read_case_facts(tmp_path / f"{name}.nii.gz", tmp_path / f"{name}_label.nii.gz")
    expected, found = facts["whole"], facts["sparse"]
    assert found.largest_share == expected.largest_share == 1.0
    for label in (1, 2):
        assert found.voxels[label] == pytest.approx(expected.voxels[label], rel=0.25)
        np.testing.assert_allclose(found.boxes[label], expected.boxes[label], atol=5)
        np.testing.assert_allclose(found.chords_vox[label], expected.chords_vox[label], rtol=0.35)


def test_complete_labels_and_strokes_are_not_filled() -> None:
    strokes = np.full((9, 9, 9), UNLABELLED, np.uint8)
    strokes[2:7, 4, 4] = 1
    for labels in (ball(), strokes):
        np.testing.assert_array_equal(filled_between_slices(labels), labels)


def test_spreading_takes_the_nearest_labelled_voxel_and_no_more() -> None:
    rng = np.random.default_rng(1)
    labels = np.where(rng.random((1, 1, 60)) < 0.15, rng.integers(0, 3, (1, 1, 60)), UNLABELLED).astype(np.uint8)
    found = spread_labels(labels, (0, 0, 2))
    known = np.flatnonzero(labels[0, 0] != UNLABELLED)
    for at in range(60):
        far = np.abs(known - at)
        if far.min() > 2:
            assert found[0, 0, at] == UNLABELLED
        else:
            assert found[0, 0, at] in labels[0, 0, known[far == far.min()]]


@pytest.mark.parametrize("frame", ["ras", "acquisition"])
def test_a_coarser_grid_keeps_every_annotated_slice(frame: str, tmp_path: Path) -> None:
    """Every fifth slice of 0.8 mm lies 4 mm from the next; the network's slices of 3 mm would miss most."""
    whole = ball((48, 48, 60), 18.0)
    sparse = every(whole, 2, 5, UNLABELLED)
    affine = np.diag([1.0, 1.0, 0.8, 1.0])
    image = np.random.default_rng(2).normal(size=whole.shape).astype(np.float32)
    nib.save(nib.Nifti1Image(image, affine), tmp_path / "scan.nii.gz")
    nib.save(nib.Nifti1Image(sparse, affine), tmp_path / "label.nii.gz")
    prep = Preprocessing("mr", spacing_mm=(1.0, 1.0, 3.0), patch_size=(16, 16, 16), frame=frame)
    given = {"image": (tmp_path / "scan.nii.gz",), "label": tmp_path / "label.nii.gz"}
    label = run_transforms(labelled_transforms(prep, n_labels=2), given)["label"][0].numpy()
    known = np.flatnonzero((label != UNLABELLED).any((0, 1)))
    annotated = 0.8 * np.arange(2, 60, 5)
    # The last one lies beyond the file, and repeats its last slice.
    places = np.minimum(3.0 * np.arange(label.shape[2]), 0.8 * 59)
    near = np.abs(places[:, None] - annotated).min(1)
    assert set(np.flatnonzero(near <= 0.8)) <= set(known)
    assert near[known].max() <= 2.0
    each = np.abs(places[known][:, None] - annotated).min(0)
    assert each.max() <= 1.5, "every annotated slice is there"
    # What is known is that of an annotated slice.
    for at in known:
        own = sparse[:, :, 2 + 5 * int(np.abs(annotated - places[at]).argmin())]
        assert (label[:, :, at] == own).mean() > 0.99
