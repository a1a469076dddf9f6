"""The simulated annotator: what is handed in, and how the amount of correction is counted."""

import nibabel as nib
import numpy as np
import pytest

from deformux.annotator import WholeLabelAnnotator, dense_labels


def test_dense_labels_number_by_position() -> None:
    sparse = np.array([0, 5, 52, 7, 5, 1])
    np.testing.assert_array_equal(dense_labels(sparse, [52, 5]), [0, 2, 1, 0, 2, 0])
    assert dense_labels(sparse, [52, 5]).dtype == np.uint8


def test_dense_labels_of_a_real_scan_keep_every_voxel_count(shared_data) -> None:
    label = np.asarray(nib.load(shared_data / "ct" / "example_seg.nii.gz").dataobj)
    values = sorted(int(v) for v in np.unique(label) if v)
    counts = np.bincount(dense_labels(label, values).ravel())
    expected = np.unique(label, return_counts=True)[1]
    np.testing.assert_array_equal(counts, expected)


@pytest.mark.parametrize("values", [[1, 1], [0, 1], list(range(1, 300))])
def test_dense_labels_refuse_ambiguous_values(values: list[int]) -> None:
    with pytest.raises(ValueError, match="expected at most 255 different values other than 0"):
        dense_labels(np.zeros(3, int), values)


def test_correction_hands_in_the_truth_and_counts_the_edits() -> None:
    truth = np.array([0, 1, 1, 2, 2, 2], np.uint8)
    shown = np.array([1, 1, 1, 2, 2, 0], np.uint8)
    correction = WholeLabelAnnotator(["liver", "spleen", "kidneys"]).correct(truth, shown)
    np.testing.assert_array_equal(correction.label, truth)
    assert correction.edited == pytest.approx({"liver": 1 / 3, "spleen": 1 / 3})  # kidneys: in neither
    assert correction.edited_voxels == 2


def test_a_perfect_prediction_needs_no_edit_and_none_needs_everything() -> None:
    truth = np.array([[0, 1], [2, 2]], np.uint8)
    annotator = WholeLabelAnnotator(["a", "b"])
    assert annotator.correct(truth, truth).edited == {"a": 0, "b": 0}
    assert annotator.correct(truth).edited == {"a": 1, "b": 1}
    assert annotator.correct(truth).edited_voxels == 3


def test_the_handed_in_label_is_a_copy() -> None:
    truth = np.zeros((2, 2), np.uint8)
    WholeLabelAnnotator(["a"]).correct(truth).label[0, 0] = 1
    assert truth.sum() == 0


def test_wrong_shapes_and_values_are_refused() -> None:
    annotator = WholeLabelAnnotator(["a"])
    with pytest.raises(ValueError, match=r"got shape \(3,\), expected the truth's shape \(2,\)"):
        annotator.correct(np.zeros(2, np.uint8), np.zeros(3, np.uint8))
    with pytest.raises(ValueError, match="got 2, expected 0 to 1 for a"):
        annotator.correct(np.array([2], np.uint8))
