"""Labels that were copied into the folder by hand: used if they can be, else listed with the reason."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from live import LABELS, Volume, rotation, write, write_volume

from deformux_label.lib.store import external_labels, studies_folder
from deformux_label.lib.store.datastore import CheckedDatastore
from deformux_label.lib.store.label_check import label_array
from deformux_label.lib.store.volume_writer import write_labels

pytestmark = pytest.mark.usefixtures("unwatched")


@pytest.fixture
def volume(tmp_path: Path) -> Volume:
    axes = rotation(10, 20, 30)
    return write_volume(tmp_path / "studies" / "scan.nii.gz", tmp_path / "label.nii.gz", spacing=(4, 4, 5), axes=axes)


def opened(volume: Volume) -> CheckedDatastore:
    return CheckedDatastore(str(volume.image.parent), labels=LABELS)


def folder_of(volume: Volume, tag: str = "final") -> Path:
    folder = volume.image.parent / "labels" / tag
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def third_axis_turned(volume: Volume) -> tuple[np.ndarray, np.ndarray]:
    affine = volume.affine @ np.diag([1.0, 1, -1, 1])
    affine[:3, 3] = nib.affines.apply_affine(volume.affine, [0, 0, volume.truth.shape[2] - 1])
    return np.ascontiguousarray(volume.truth[:, :, ::-1]), affine


def moved(affine: np.ndarray, mm: float) -> np.ndarray:
    return affine + np.array([[0, 0, 0, mm]] + [[0, 0, 0, 0]] * 3)


@pytest.mark.parametrize("how", ["as it is", "turned", "turned nrrd", "5e-4 mm off", "seg.nrrd", "capitals", "linked"])
def test_usable_labels_are_used(volume: Volume, how: str) -> None:
    folder = folder_of(volume)
    outside = volume.label.with_name("outside.nii.gz")
    original = {
        "as it is": lambda: write(folder / "scan.nii.gz", volume.truth, volume.affine),
        "turned": lambda: write(folder / "scan.nii.gz", *third_axis_turned(volume)),
        "turned nrrd": lambda: write(folder / "scan.nrrd", *third_axis_turned(volume)),
        "5e-4 mm off": lambda: write(folder / "scan.nii.gz", volume.truth, moved(volume.affine, 5e-4)),
        "seg.nrrd": lambda: segmentation(folder / "scan.seg.nrrd", volume),
        "capitals": lambda: Path(shutil.copy(volume.label, folder / "scan.NII.GZ")),
        "linked": lambda: linked(folder / "scan.nii.gz", write(outside, *third_axis_turned(volume))),
    }[how]()
    content = original.read_bytes()
    store = opened(volume)
    assert store.get_labeled_images() == ["scan"]
    assert store.status()["unusable_labels"]["count"] == 0
    uri = Path(store.get_label_uri("scan", "final"))
    assert (label_array(uri, volume.image, "scan", LABELS, {}) == volume.truth).all()
    if uri.suffix == ".gz":
        assert (np.asarray(nib.load(uri).dataobj) == volume.truth).all()
        np.testing.assert_allclose(nib.load(uri).affine, volume.affine, atol=1e-3)
    history = store.revisions.history("scan", "final")
    assert store.revisions.file(history[0]).read_bytes() == content, "the original is kept"
    if how in ("as it is", "turned", "turned nrrd"):
        assert len(history) == (1 if how == "as it is" else 2)
    assert history[-1].labels == list(LABELS)
    assert [path.name for path in folder.iterdir()] == [Path(store.get_label_uri("scan", "final")).name]
    if how == "linked":
        assert outside.read_bytes() == content
    assert opened(volume).revisions.history("scan", "final") == history, "checked once"


def segmentation(path: Path, volume: Volume) -> Path:
    write_labels(path, volume.truth, volume.affine, {"liver": 1, "spleen": 2})
    return path


def linked(path: Path, target: Path) -> Path:
    path.symlink_to(target)
    return path


@pytest.mark.parametrize("how", ["another grid", "5 mm off", "foreign values", "half", "text", "a folder", "no volume"])
def test_unusable_labels_are_listed(volume: Volume, how: str, caplog: pytest.LogCaptureFixture) -> None:
    file = folder_of(volume) / "scan.nii.gz"
    if how == "another grid":
        write(file, volume.truth[:-1], volume.affine)
    elif how == "5 mm off":
        write(file, volume.truth, moved(volume.affine, 5.0))
    elif how == "foreign values":
        write(file, volume.truth * 5, volume.affine)
    elif how == "half":
        file.write_bytes(volume.label.read_bytes()[: volume.label.stat().st_size // 2])
    elif how == "text":
        file.write_text("nothing")
    elif how == "a folder":
        file.mkdir()
    else:
        shutil.copy(volume.label, file.with_name("other.nii.gz"))
    store = opened(volume)
    assert store.get_labeled_images() == []
    assert store.get_unlabeled_images() == ["scan"]
    status = store.status()
    assert (status["completed"], status["label_tags"], status["unusable_labels"]["count"]) == (0, {}, 1)
    (named,) = status["unusable_labels"]["first"]
    assert named["file"] == ("final/other.nii.gz" if how == "no volume" else "final/scan.nii.gz").replace(
        "other.nii.gz", "other"
    )
    assert named["reason"]
    assert "scan.nii.gz" in caplog.text or "other" in caplog.text
    assert store.revisions.known() == {}
    assert opened(volume).status() == status
    # A submitted label takes its place, and the copied file is kept.
    if how not in ("a folder", "no volume"):
        content = file.read_bytes()
        store.save_label("scan", str(volume.label), "final", {"client_id": "anna"})
        assert store.get_labeled_images() == ["scan"]
        history = store.revisions.history("scan", "final")
        assert [r.annotator for r in history] == ["", "anna"]
        assert store.revisions.file(history[0]).read_bytes() == content


@pytest.mark.parametrize("how", ["another grid", "foreign values", "half"])
def test_an_unusable_label_is_restored_with_its_scan(volume: Volume, how: str) -> None:
    file = folder_of(volume) / "scan.nii.gz"
    if how == "half":
        file.write_bytes(volume.label.read_bytes()[: volume.label.stat().st_size // 2])
    else:
        other = (volume.truth[:-1], 1) if how == "another grid" else (volume.truth, 5)
        write(file, other[0] * other[1], volume.affine)
    content, scan = file.read_bytes(), volume.image.read_bytes()
    store = opened(volume)
    before = store.status()
    store.remove_image("scan")
    (entry,) = store.trash.entries()
    assert store.bring_back(entry.name, "anna") == "scan"
    assert (file.read_bytes(), volume.image.read_bytes()) == (content, scan)
    assert store.trash.entries() == []
    assert store.status() == before
    assert opened(volume).status() == before


def test_labels_follow_a_scan_that_was_restored_without_them(volume: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(volume)
    store.save_label("scan", str(volume.label), "final", {"client_id": "anna"})
    store.remove_image("scan")
    (entry,) = store.trash.entries()
    with monkeypatch.context() as patch:
        patch.setattr(CheckedDatastore, "restore_label", lambda *_: (_ for _ in ()).throw(OSError("the power fails")))
        with pytest.raises(OSError, match="power"):
            store.bring_back(entry.name, "anna")
    again = opened(volume)
    assert again.bring_back(entry.name, "anna") == "scan"
    assert again.get_labeled_images() == ["scan"]
    assert again.trash.entries() == []


def test_a_file_that_changes_is_looked_at_again(volume: Volume) -> None:
    file = folder_of(volume) / "scan.nii.gz"
    file.write_text("nothing")
    store = opened(volume)
    assert store.get_labeled_images() == []
    shutil.copy(volume.label, file)
    store.refresh()
    assert store.get_labeled_images() == ["scan"]


def test_foreign_values_may_be_those_of_another_list(volume: Volume) -> None:
    write(folder_of(volume) / "scan.nii.gz", volume.truth, volume.affine)
    assert CheckedDatastore(str(volume.image.parent), labels=("liver",)).get_labeled_images() == []
    assert opened(volume).get_labeled_images() == ["scan"]


def test_two_files_for_one_label(volume: Volume) -> None:
    store = opened(volume)
    store.save_label("scan", str(volume.label), "final", {})
    write(folder_of(volume) / "scan.nrrd", volume.truth, volume.affine)
    store.refresh()
    assert [item["file"] for item in store.status()["unusable_labels"]["first"]] == ["final/scan.nrrd"]


def test_no_request_waits_for_the_checks(volume: Volume, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands may be copied in at once; a start waits only a moment, and requests do not wait."""
    folder = folder_of(volume)
    for number in range(40):
        shutil.copy(volume.image, volume.image.with_name(f"more_{number}.nii.gz"))
        shutil.copy(volume.label, folder / f"more_{number}.nii.gz")
    go, judge = threading.Event(), external_labels.judge

    def slow(*arguments: object) -> object:
        go.wait(60)
        return judge(*arguments)

    monkeypatch.setattr(studies_folder, "_WAIT_FOR_CHECKS_S", 0.1)
    monkeypatch.setattr(external_labels, "judge", slow)
    start = time.monotonic()
    store = opened(volume)
    assert time.monotonic() - start < 5
    assert (store.get_labeled_images(), store.get_unlabeled_images()) == ([], ["scan"])
    assert store.status()["unusable_labels"]["count"] == 40
    store.save_label("scan", str(volume.label), "final", {})
    go.set()
    assert store._checks.wait(120)
    assert len(store.get_labeled_images()) == 41
    assert opened(volume).get_labeled_images() == store.get_labeled_images()
