"""The simulated annotator: its labels, its clicks, and the counted amount of correction."""

import nibabel as nib
import numpy as np
import pytest

from deformux.interactive.simulated_annotator import Click, ClickAnnotator, WholeLabelAnnotator, dense_labels


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


def test_a_correction_is_the_truth_and_counts_the_edits() -> None:
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


def test_the_corrected_label_is_a_copy() -> None:
    truth = np.zeros((2, 2), np.uint8)
    WholeLabelAnnotator(["a"]).correct(truth).label[0, 0] = 1
    assert truth.sum() == 0


def test_wrong_shapes_and_values_are_refused() -> None:
    annotator = WholeLabelAnnotator(["a"])
    with pytest.raises(ValueError, match=r"got shape \(3,\), expected the truth's shape \(2,\)"):
        annotator.correct(np.zeros(2, np.uint8), np.zeros(3, np.uint8))
    with pytest.raises(ValueError, match="got 2, expected 0 to 1 for a"):
        annotator.correct(np.array([2], np.uint8))


def depth(inside: np.ndarray) -> np.ndarray:
    """Return the distance of each voxel to the nearest one outside, by brute force."""
    padded = np.pad(inside, 1)
    out, within = np.argwhere(~padded), np.argwhere(padded)
    result = np.zeros(padded.shape)
    result[tuple(within.T)] = np.sqrt(((within[:, None] - out) ** 2).sum(-1)).min(1)
    return result[1:-1, 1:-1, 1:-1]


def test_the_largest_error_is_clicked_where_it_is_thickest() -> None:
    truth, shown = np.zeros((2, 12, 12, 12), np.uint8)
    truth[1:8, 1:6, 2:7] = 2
    shown[1:8, 1:6, 2:5] = 2
    shown[9:12, 9:12, 9:12] = 1
    truth[0, 11, 0] = 1
    missing = (truth == 2) & (shown == 0)
    clicks = ClickAnnotator(2).clicks(truth, shown, most=9)
    assert [click.label for click in clicks] == [2, 0, 1]
    assert depth(missing)[clicks[0].voxel] == depth(missing).max()
    assert clicks[1:] == [Click(0, (10, 10, 10)), Click(1, (0, 11, 0))]
    assert ClickAnnotator(2).clicks(truth, shown) == clicks[:1]
    assert ClickAnnotator(2).clicks(truth, shown, label=1) == clicks[2:]
    assert ClickAnnotator(2).clicks(truth, truth) == []


def test_fewer_clicks_are_the_first_of_more() -> None:
    rng = np.random.default_rng(0)
    truth, shown = (np.kron(rng.integers(0, 9, (4, 4, 4)), np.ones((3, 3, 3), int)).astype(np.uint8) for _ in range(2))
    every = ClickAnnotator(8).clicks(truth, shown, most=1000)
    assert sum(truth[click.voxel] != shown[click.voxel] for click in every) == len(every) > 20
    one_by_one = [ClickAnnotator(8).clicks(truth, shown, most=1000, label=label) for label in range(9)]
    assert sorted(map(repr, every)) == sorted(repr(click) for clicks in one_by_one for click in clicks)
    for most in (0, 1, 2, 5, 20):
        assert ClickAnnotator(8).clicks(truth, shown, most=most) == every[:most]


def test_a_thin_error_is_clicked_in_its_middle() -> None:
    truth = np.zeros((9, 9, 1), np.uint8)
    truth[1:8, 4] = 1
    assert ClickAnnotator(1).clicks(truth, np.zeros_like(truth)) == [Click(1, (4, 4, 0))]
    slab = np.zeros((11, 1, 11), np.uint8)
    slab[2:9, 0, 2:9] = 1
    assert ClickAnnotator(1).clicks(slab, np.zeros_like(slab)) == [Click(1, (5, 0, 5))]


def test_thickness_is_measured_in_millimetres() -> None:
    truth = np.zeros((20, 20, 20), np.uint8)
    truth[1:6, 1:6, 1:6] = 1
    truth[6:15, 1:10, 1:4] = 1  # wider, but flat
    shown = np.zeros_like(truth)
    assert ClickAnnotator(1).clicks(truth, shown) == [Click(1, (3, 3, 3))]
    assert ClickAnnotator(1, spacing=(1, 1, 10)).clicks(truth, shown) == [Click(1, (10, 5, 2))]


def test_jitter_stays_in_the_component_and_follows_the_seed() -> None:
    rng = np.random.default_rng(0)
    truth = (rng.random((10, 10, 10)) < 0.35).astype(np.uint8)
    truth[2:7, 2:7, 2:7] = 1
    shown = np.zeros_like(truth)
    centre = ClickAnnotator(1).clicks(truth, shown)[0].voxel
    jittered = {j: ClickAnnotator(1, jitter=j, seed=1).clicks(truth, shown)[0].voxel for j in (0.25, 1.0)}
    assert ClickAnnotator(1, jitter=1.0, seed=1).clicks(truth, shown)[0].voxel == jittered[1.0]
    everywhere = ClickAnnotator(1, jitter=1.0, seed=2)
    seen = {everywhere.clicks(truth, shown)[0].voxel for _ in range(50)}
    assert len(seen) > 20
    assert all(truth[voxel] for voxel in seen)
    deep = depth(truth == 1)
    assert deep[jittered[0.25]] >= 0.75 * deep[centre]
    with pytest.raises(ValueError, match="jitter must be between 0 and 1"):
        ClickAnnotator(1, jitter=2)


def test_an_unannotated_class_is_not_an_error() -> None:
    truth = np.array([255, 0, 0, 1, 1, 0], np.uint8).reshape(6, 1, 1)
    shown = np.array([1, 2, 1, 2, 1, 0], np.uint8).reshape(6, 1, 1)
    annotator = ClickAnnotator(2)
    everything = {(click.label, click.voxel[0]) for click in annotator.clicks(truth, shown, most=9)}
    assert everything == {(0, 1), (1, 3)}, "two voxels of background in a row are one error"
    partly = annotator.clicks(truth, shown, most=9, annotated=np.array([True, True, False]))
    assert {(click.label, click.voxel[0]) for click in partly} == {(0, 2), (1, 3)}


def test_clicks_into_volumes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shown: got shape \(2, 2, 2\), expected the truth's shape \(3, 3, 3\)"):
        ClickAnnotator(1).clicks(np.zeros((3, 3, 3), np.uint8), np.zeros((2, 2, 2), np.uint8))
    with pytest.raises(ValueError, match=r"got 2, expected 0 \(background\) to 1"):
        ClickAnnotator(1).clicks(np.zeros((3, 3, 3), np.uint8), np.zeros((3, 3, 3), np.uint8), label=2)
