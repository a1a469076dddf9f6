"""Facts of scans and labels, and the file that keeps them."""

import itertools
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from deformux.data import fingerprint as module
from deformux.data.cases import Case, find_cases
from deformux.data.checked_json import read_checked, write_checked
from deformux.data.fingerprint import FingerprintStopped, declared_modality, read_fingerprint
from deformux.data.scan_facts import LEVELS, read_case_facts, read_scan_facts
from deformux.data.scan_folder import scans_and_cases
from deformux.data.volume_reader import open_volume


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were opened, in order."""
    names: list[str] = []

    def counting(path: Path):
        names.append(path.name)
        return open_volume(path)

    monkeypatch.setattr("deformux.data.scan_facts.open_volume", counting)
    return names


def write(path: Path, values: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, np.eye(4) if affine is None else affine), path)
    return path


def noise(shape=(9, 8, 7), seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1000, shape).astype(np.int16)


def labelled(folder: Path, n: int, **options) -> list[Case]:
    """Write cases whose label 2 is a box of 4×3×2 voxels at (1, 2, 3)."""
    cases = []
    for i in range(n):
        label = np.zeros((9, 8, 7), np.uint8)
        label[1:5, 2:5, 3:5] = 2
        image = write(folder / "images" / f"c{i}.nii.gz", noise(seed=i), **options)
        cases.append(Case(f"c{i}", image, write(folder / "labels" / f"c{i}.nii.gz", label, **options)))
    return cases


def runs_of(label: np.ndarray, value: int, axis: int) -> list[int]:
    """Lengths of all runs of a value along an axis, line by line."""
    lines = np.moveaxis(label, axis, -1).reshape(-1, label.shape[axis])
    return [len(list(same)) for line in lines for key, same in itertools.groupby(line) if key == value]


def test_facts_of_a_label_with_a_known_answer(tmp_path: Path) -> None:
    values = noise()
    label = np.zeros(values.shape, np.uint8)
    label[1:5, 2:5, 3:5] = 2
    label[7, 7, 6] = 9
    label[0] = 255
    affine = np.array([[0, 0, 3.0, 5], [-2.0, 0, 0, 6], [0, 1.5, 0, 7], [0, 0, 0, 1]])
    scan, facts = read_case_facts(
        write(tmp_path / "i.nii.gz", values, affine), write(tmp_path / "l.nii.gz", label, affine)
    )
    np.testing.assert_allclose(scan.affine, affine, atol=1e-5)
    assert scan.shape == (9, 8, 7)
    assert scan.intensities is not None
    assert scan.intensities.whole
    assert (scan.intensities.lowest, scan.intensities.highest) == (values.min(), values.max())
    assert facts.voxels == {2: 24, 9: 1}
    assert facts.boxes == {2: ((1, 2, 3), (5, 5, 5)), 9: ((7, 7, 6), (8, 8, 7))}
    assert facts.chords_vox == {2: (4.0, 3.0, 2.0), 9: (1.0, 1.0, 1.0)}
    assert facts.largest_share == 24 / 25
    assert facts.union([2]) == ((1, 2, 3), (5, 5, 5))
    assert facts.union([2, 9]) == ((1, 2, 3), (8, 8, 7))
    assert facts.union([1]) is None
    inside = values[(label > 0) & (label < 255)]
    np.testing.assert_allclose(facts.percentiles, np.percentile(inside, LEVELS), rtol=1e-5)


@pytest.mark.parametrize("name", ["heart_mr_acdc", "spine_mr", "mouse_brain_mr"])
def test_facts_of_real_cases_equal_numpy(shared_data: Path, name: str) -> None:
    case = find_cases(shared_data / name)[1]
    scan, facts = read_case_facts(case.image, case.label)
    image, label = nib.load(case.image), np.asarray(nib.load(case.label).dataobj).astype(int)
    values = np.asarray(image.dataobj)
    assert scan.shape == image.shape
    np.testing.assert_allclose(scan.affine, image.affine, atol=1e-4)
    assert scan.intensities is not None
    assert scan.intensities.low == pytest.approx(np.percentile(values, 0.5), rel=0.02, abs=2)
    assert scan.intensities.high == pytest.approx(np.percentile(values, 99.5), rel=0.02)
    found = [value for value in np.unique(label) if value]
    assert list(facts.voxels) == found
    for value in found:
        where = np.argwhere(label == value)
        assert facts.voxels[value] == len(where)
        assert facts.boxes[value] == (tuple(where.min(0)), tuple(where.max(0) + 1))
    pieces, _ = ndimage.label(label > 0, np.ones((3, 3, 3)))
    assert facts.largest_share == np.bincount(pieces[pieces > 0]).max() / np.count_nonzero(label)
    for value in found[:3]:
        means = [np.mean(runs_of(label, value, axis)) for axis in range(3)]
        np.testing.assert_allclose(facts.chords_vox[value], means)
    expected = np.percentile(values[label > 0], (0.5, 50, 99.5))
    found_percentiles = np.interp((0.5, 50, 99.5), LEVELS, facts.percentiles)
    np.testing.assert_allclose(found_percentiles, expected, rtol=0.01, atol=1)


def test_percentiles_of_all_labelled_voxels_count_each_scan_the_same(shared_data: Path) -> None:
    """Against nnU-Net's way: 10,000 labelled voxels of each case, drawn with replacement."""
    cases = find_cases(shared_data / "heart_mr_acdc")[:12]
    found = read_fingerprint([], cases).labelled_percentiles((0.5, 50, 99.5))
    rng = np.random.default_rng(0)
    drawn = []
    for case in cases:
        label, values = (np.asarray(nib.load(path).dataobj) for path in (case.label, case.image))
        drawn.append(rng.choice(values[label > 0], 10_000))
    np.testing.assert_allclose(found, np.percentile(np.concatenate(drawn), (0.5, 50, 99.5)), rtol=0.03)


def test_an_unlabelled_scan_is_read_in_some_slices(tmp_path: Path) -> None:
    values = noise((20, 20, 100))
    for name in ("a.nii", "a.nii.gz"):
        facts = read_scan_facts(write(tmp_path / name, values))
        assert facts.intensities is not None
        assert facts.intensities.high == pytest.approx(np.percentile(values, 99.5), rel=0.02)
    with open_volume(tmp_path / "a.nii.gz") as opened_volume:
        some = opened_volume.read_slices(5, most_bytes=10**9)
    np.testing.assert_array_equal(some, values[..., [0, 25, 50, 74, 99]])
    with open_volume(tmp_path / "a.nii.gz") as opened_volume:
        some = opened_volume.read_slices(5, most_bytes=20 * 20 * 2 * 3)
    np.testing.assert_array_equal(some, values[..., :3])


def test_slices_of_a_cut_off_scan(tmp_path: Path) -> None:
    path = write(tmp_path / "a.nii", noise())
    path.write_bytes(path.read_bytes()[:-100])
    found = read_fingerprint([path])
    assert not found.scans
    assert "a.nii" in found.unusable[0]
    assert "cut off" in found.unusable[0]


def test_unchanged_files_are_not_opened(tmp_path: Path, opened: list[str]) -> None:
    cases = labelled(tmp_path, 2)
    alone = write(tmp_path / "images" / "alone.nii.gz", noise())
    cache = tmp_path / "state" / "facts.json"
    first = read_fingerprint([alone], cases, cache=cache)
    assert len(opened) == 5
    opened.clear()
    assert read_fingerprint([alone], cases, cache=cache) == first
    assert opened == []
    # Without the cache all of them are read again, to the same facts.
    assert read_fingerprint([alone], cases) == first


def test_a_changed_file_is_read_again_and_a_removed_one_forgotten(tmp_path: Path, opened: list[str]) -> None:
    cases = labelled(tmp_path, 3)
    cache = tmp_path / "facts.json"
    read_fingerprint([], cases, cache=cache)
    opened.clear()
    os.utime(cases[1].image, ns=(1, 1))
    read_fingerprint([], cases, cache=cache)
    assert opened == ["c1.nii.gz", "c1.nii.gz"]
    opened.clear()
    write(cases[2].label, np.pad(np.full((3, 3, 3), 4, np.uint8), ((2, 4), (2, 3), (2, 2))))
    facts = read_fingerprint([], cases, cache=cache)
    assert facts.labels[str(cases[2].image)].voxels == {4: 27}
    assert opened == ["c2.nii.gz", "c2.nii.gz"]
    cases[0].image.unlink()
    facts = read_fingerprint([], cases, cache=cache)
    assert len(facts.scans) == 2
    assert "c0.nii.gz cannot be read: there is no such file" in facts.unusable
    read_fingerprint([], cases[1:], cache=cache)
    assert str(cases[0].image) not in cache.read_text()


def test_damaged_files_are_skipped_with_a_sentence(tmp_path: Path) -> None:
    cases = labelled(tmp_path, 3)
    cases[0].image.write_text("no image")
    cases[1].label.write_text("no label")
    found = read_fingerprint([], cases, cache=tmp_path / "facts.json")
    # The scan of a damaged label is still a scan.
    assert list(found.scans) == [str(cases[1].image), str(cases[2].image)]
    assert list(found.labels) == [str(cases[2].image)]
    assert len(found.unusable) == 2
    assert all("c0.nii.gz" in text or "c1.nii.gz" in text for text in found.unusable)


def test_a_label_on_another_grid_is_skipped(tmp_path: Path) -> None:
    (case,) = labelled(tmp_path, 1)
    write(case.label, np.ones((9, 8, 6), np.uint8))
    found = read_fingerprint([], [case])
    assert list(found.scans) == [str(case.image)]
    assert "is not on its image's grid" in found.unusable[0]


@pytest.mark.parametrize(
    "text", ["", "{", '{"version": 1}', '{"version": 0}', '{"version": 1, "scans": {"x": 1}, "labels": [1]}']
)
def test_a_damaged_cache_is_made_anew(tmp_path: Path, text: str) -> None:
    cases = labelled(tmp_path, 1)
    cache = tmp_path / "facts.json"
    cache.write_text(text)
    first = read_fingerprint([], cases, cache=cache)
    assert len(first.labels) == 1
    assert read_fingerprint([], cases, cache=cache) == first


def test_facts_of_an_older_version_are_read_again(tmp_path: Path, opened: list[str]) -> None:
    cases = labelled(tmp_path, 2)
    cache = tmp_path / "facts.json"
    first = read_fingerprint([], cases, cache=cache)
    kept = read_checked(cache, dict)
    del kept["labels"][str(cases[0].label)]["facts"]["largest_share"]
    write_checked(cache, kept)
    opened.clear()
    assert read_fingerprint([], cases, cache=cache) == first
    assert opened == ["c0.nii.gz", "c0.nii.gz"]


def test_a_stop_keeps_what_was_read(tmp_path: Path, opened: list[str]) -> None:
    paths = [write(tmp_path / f"s{i}.nii.gz", noise(seed=i)) for i in range(4)]
    cache = tmp_path / "facts.json"
    done: list[tuple[int, int]] = []
    with pytest.raises(FingerprintStopped):
        read_fingerprint(
            paths, cache=cache, on_progress=lambda *counts: done.append(counts), stop=lambda: len(done) == 2
        )
    assert done == [(1, 4), (2, 4)]
    opened.clear()
    assert len(read_fingerprint(paths, cache=cache).scans) == 4
    assert opened == ["s2.nii.gz", "s3.nii.gz"]


def test_when_time_is_up_headers_are_read_and_intensities_the_next_time(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"s{i}.nii.gz", noise(seed=i)) for i in range(2)]
    cache = tmp_path / "facts.json"
    hurried = read_fingerprint(paths, cache=cache, seconds=0)
    assert [scan.shape for scan in hurried.scans.values()] == [(9, 8, 7)] * 2
    assert all(scan.intensities is None for scan in hurried.scans.values())
    assert all(scan.intensities for scan in read_fingerprint(paths, cache=cache).scans.values())


def test_ten_thousand_unchanged_scans_open_no_file(tmp_path: Path, opened: list[str]) -> None:
    first = write(tmp_path / "scans" / "0.nii", noise((4, 4, 4)))
    paths = [first]
    for i in range(1, 10_000):
        paths.append(first.with_name(f"{i}.nii"))
        os.link(first, paths[-1])
    cache = tmp_path / "facts.json"
    facts = read_fingerprint(paths, cache=cache)
    assert len(opened) == 10_000
    opened.clear()
    assert read_fingerprint(paths, cache=cache) == facts
    assert opened == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"modality": {"0": "MRI"}}', "MRI"),
        ('{"channel_names": {"0": "CT"}}', "CT"),
        ('{"modality": "ct"}', "CT"),
        ('{"labels": {}}', ""),
        ("[]", ""),
        ("{", ""),
    ],
)
def test_modality_in_dataset_json(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "dataset.json").write_text(text)
    assert declared_modality(tmp_path) == expected
    assert declared_modality(tmp_path / "nowhere") == ""


def test_modality_in_a_header(tmp_path: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    image = sitk.GetImageFromArray(noise())
    image.SetMetaData("0008|0060", "CT")
    sitk.WriteImage(image, str(tmp_path / "a.nrrd"))
    assert read_scan_facts(tmp_path / "a.nrrd").modality == "CT"


def test_folders_of_scans(tmp_path: Path) -> None:
    labelled(tmp_path / "set", 2)
    write(tmp_path / "set" / "images" / "other.nii.gz", noise())
    images, cases = scans_and_cases(tmp_path / "set")
    assert (len(images), [case.id for case in cases]) == (3, ["c0", "c1"])
    studies = tmp_path / "studies"
    write(studies / "a.nii.gz", noise())
    write(studies / "b.nii.gz", noise())
    assert scans_and_cases(studies) == ([studies / "a.nii.gz", studies / "b.nii.gz"], [])
    label = write(studies / "labels" / "final" / "b.nii.gz", np.ones((9, 8, 7), np.uint8))
    write(studies / "labels" / "original" / "a.nii.gz", np.ones((9, 8, 7), np.uint8))
    assert scans_and_cases(studies)[1] == [Case("b", studies / "b.nii.gz", label)]


def test_facts_are_saved_from_time_to_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a killed process loses little."""
    monkeypatch.setattr(module, "_SAVE_SECONDS", 0.0)
    paths = [write(tmp_path / f"s{i}.nii.gz", noise(seed=i)) for i in range(2)]
    cache = tmp_path / "facts.json"
    seen: list[bool] = []
    read_fingerprint(paths, cache=cache, on_progress=lambda done, _: seen.append(done > 1 and cache.exists()))
    assert seen == [False, True]
