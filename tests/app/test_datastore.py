"""The datastore: complete files, and an index that two processes may change."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from fastapi import HTTPException
from live import LABELS, Volume, write

from deformux_label.lib.store.datastore import CheckedDatastore

pytestmark = pytest.mark.usefixtures("unwatched")


@pytest.fixture
def store(volume: Volume) -> CheckedDatastore:
    return CheckedDatastore(str(volume.image.parent), labels=LABELS)


def saved(store: CheckedDatastore, tag: str = "final") -> np.ndarray:
    return np.asarray(nib.load(store.get_label_uri("scan", tag)).dataobj)


def test_a_crash_while_saving_leaves_the_earlier_label(
    store: CheckedDatastore, volume: Volume, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save_label("scan", str(volume.label), "final", {})
    index = Path(volume.image.parent, "datastore_v2.json").read_text()
    newer = write(tmp_path / "newer.nii.gz", np.zeros_like(volume.truth), volume.affine)

    def no_space(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    for target in ("shutil.copyfile", "os.fsync", "os.replace"):
        with monkeypatch.context() as broken:
            broken.setattr(target, no_space)
            with pytest.raises(OSError, match="No space"):
                store.save_label("scan", str(newer), "final", {"by": "second"})
        assert (saved(store) == volume.truth).all()
        assert Path(volume.image.parent, "datastore_v2.json").read_text() == index
        assert [p.name for p in Path(store.get_label_uri("scan", "final")).parent.iterdir()] == ["scan.nii.gz"]


def test_a_label_in_another_format_replaces_the_first(store: CheckedDatastore, volume: Volume, tmp_path: Path) -> None:
    store.save_label("scan", str(volume.label), "final", {})
    nrrd = write(tmp_path / "again.nrrd", volume.truth, volume.affine)
    store.save_label("scan", str(nrrd), "final", {})
    folder = Path(store.get_label_uri("scan", "final")).parent
    assert [path.name for path in folder.iterdir()] == ["scan.nrrd"]
    assert CheckedDatastore(str(volume.image.parent), labels=LABELS).datalist()[0]["label"].endswith("scan.nrrd")


@pytest.mark.parametrize(
    ("sent", "names", "expected"),
    [
        ([1, 2], ["liver", "spleen"], [1, 2]),
        ([2, 1], ["spleen", "liver"], [1, 2]),
        ([0, 1], ["spleen"], [0, 2]),
        ([1, 2], ["background", "liver", "spleen"], [1, 2]),
        ([2, 3], ["empty extra segment", "liver", "spleen"], [1, 2]),
        ([1, 2], [], [1, 2]),
    ],
)
def test_segments_are_mapped_by_name(
    store: CheckedDatastore, volume: Volume, tmp_path: Path, sent: list[int], names: list[str], expected: list[int]
) -> None:
    label = write(tmp_path / "sent.nii.gz", np.array([0, *sent], np.uint8)[volume.truth], volume.affine)
    info = {"label_info": [{"name": name, "idx": 99} for name in names]} if names else {}
    store.save_label("scan", str(label), "final", info)
    assert (saved(store) == np.array([0, *expected])[volume.truth]).all()


def test_a_segment_without_a_label_is_refused(store: CheckedDatastore, volume: Volume) -> None:
    info = {"label_info": [{"name": "liver"}, {"name": "tumour"}]}
    with pytest.raises(HTTPException, match="tumour"):
        store.save_label("scan", str(volume.label), "final", info)
    with pytest.raises(HTTPException, match="1 liver"):
        store.save_label("scan", str(volume.label), "final", {"label_info": [{"name": "liver"}]})


def test_a_partly_painted_label(store: CheckedDatastore, volume: Volume, tmp_path: Path) -> None:
    """255 is an unlabelled voxel, however the segments are numbered."""
    sent = np.array([255, 2, 1], np.uint8)[volume.truth]
    label = write(tmp_path / "sent.nii.gz", sent, volume.affine)
    info = {"label_info": [{"name": "spleen"}, {"name": "liver"}], "annotated": ["liver"]}
    store.save_label("scan", str(label), "final", info)
    assert (saved(store) == np.array([255, 1, 2], np.uint8)[volume.truth]).all()
    with pytest.raises(HTTPException, match="liver, spleen"):
        store.save_label("scan", str(volume.label), "final", {"annotated": ["tumour"]})


def test_another_process_changes_the_index_too(store: CheckedDatastore, volume: Volume) -> None:
    """Scoring runs in another process; with MONAI Label's datastore it undoes the server's writes meanwhile."""
    store.update_image_info("scan", {"a": 1})
    program = (
        "import sys; from deformux_label.lib.store.datastore import CheckedDatastore\n"
        "store = CheckedDatastore(sys.argv[1], labels=('liver', 'spleen'))\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "store.update_image_info('scan', {'b': 2})\n"
    )
    environment = {**os.environ, "MONAI_LABEL_DATASTORE_AUTO_RELOAD": "false"}
    command = [sys.executable, "-c", program, str(volume.image.parent)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as other:
        assert other.stdout is not None
        other.stdout.readline()
        store.save_label("scan", str(volume.label), "final", {"by": "me"})
        other.communicate("go\n", timeout=60)
    store.update_image_info("scan", {"c": 3})
    entry = json.loads(Path(volume.image.parent, "datastore_v2.json").read_text())["objects"]["scan"]
    assert {"a": 1, "b": 2, "c": 3}.items() <= entry["image"]["info"].items()
    assert entry["labels"]["final"]["info"]["by"] == "me"


def test_hidden_files_are_not_images(store: CheckedDatastore, volume: Volume) -> None:
    for name in (".writing-x.nii.gz", "._scan.nii.gz"):
        (volume.image.parent / name).write_bytes(b"")
    store.refresh()
    assert store.list_images() == ["scan"]


def test_removing(store: CheckedDatastore, volume: Volume) -> None:
    store.save_label("scan", str(volume.label), "final", {})
    store.remove_label("scan", "final")
    assert store.get_labeled_images() == []
    store.remove_image("scan")
    assert store.list_images() == []
    assert not volume.image.exists()
    for remove in (lambda: store.remove_image("scan"), lambda: store.remove_label("scan", "final")):
        with pytest.raises(HTTPException, match="no image"):
            remove()


def test_a_label_in_another_voxel_order_is_reordered(store: CheckedDatastore, volume: Volume, tmp_path: Path) -> None:
    """Slicer mirrors an axis of left-handed scans: the same positions in another order."""
    mirrored = volume.affine @ np.diag([1.0, 1, -1, 1])
    mirrored[:3, 3] = nib.affines.apply_affine(volume.affine, [0, 0, volume.truth.shape[2] - 1])
    swapped = volume.affine[:, [2, 1, 0, 3]]
    orders = [(volume.truth[:, :, ::-1], mirrored), (volume.truth.transpose(2, 1, 0), swapped)]
    for number, (truth, affine) in enumerate(orders):
        store.save_label(
            "scan", str(write(tmp_path / f"{number}.nrrd", np.ascontiguousarray(truth), affine)), "final", {}
        )
        assert (saved(store) == volume.truth).all()
        np.testing.assert_allclose(nib.load(store.get_label_uri("scan", "final")).affine, volume.affine, atol=1e-4)


def every_third(labels: np.ndarray) -> np.ndarray:
    sparse = np.zeros_like(labels)
    sparse[:, :, ::3] = labels[:, :, ::3]
    return sparse


def learnt(store: CheckedDatastore) -> np.ndarray:
    return np.asarray(nib.load(store.learnt_label("scan", "final")).dataobj)


def test_only_annotated_slices_are_learnt_and_the_label_stays_as_it_was_drawn(
    store: CheckedDatastore, volume: Volume, tmp_path: Path
) -> None:
    store.save_label("scan", str(volume.label), "final", {})
    assert "annotated_slices" not in store.get_label_info("scan", "final")
    assert store.learnt_label("scan", "final") == store.get_label_uri("scan", "final")
    sparse = every_third(volume.truth)
    drawn = np.flatnonzero(sparse.any((0, 1)))
    assert len(drawn) >= 3
    file = write(tmp_path / "sparse.nii.gz", sparse, volume.affine)
    store.save_label("scan", str(file), "final", {})
    assert store.get_label_info("scan", "final")["annotated_slices"] == {"axis": 2, "slices": drawn.tolist()}
    expected = np.full_like(sparse, 255)
    expected[:, :, drawn] = sparse[:, :, drawn]
    for one in (store, CheckedDatastore(str(volume.image.parent), labels=LABELS, slice_rule="all")):
        assert (saved(one) == sparse).all()
        assert (learnt(one) == expected).all()
        assert one.datalist()[0]["label"] == one.learnt_label("scan", "final")
    # An earlier, complete label that is restored is complete again.
    store.restore_label("scan", 1, "ann")
    assert (learnt(store) == volume.truth).all()
    store.restore_label("scan", 2, "ann")
    assert (learnt(store) == expected).all()


def test_slices_that_an_annotator_names_come_first(store: CheckedDatastore, volume: Volume, tmp_path: Path) -> None:
    size = volume.truth.shape
    store.save_label("scan", str(volume.label), "final", {"annotated_slices": {"axis": 1, "slices": [3, 1, 3]}})
    assert store.get_label_info("scan", "final")["annotated_slices"] == {"axis": 1, "slices": [1, 3]}
    known = learnt(store) != 255
    assert known[:, [1, 3]].all()
    assert known.sum() == 2 * size[0] * size[2]
    file = write(tmp_path / "sparse.nii.gz", every_third(volume.truth), volume.affine)
    store.save_label("scan", str(file), "final", {"annotated_slices": "all"})
    assert (learnt(store) == every_third(volume.truth)).all()
    with pytest.raises(HTTPException, match="annotated_slices is a part of the label"):
        store.update_label_info("scan", "final", {"annotated_slices": "all"})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("some", "must be auto, drawn, all, or an object"),
        (5, "must be auto, drawn, all, or an object"),
        ({"axis": 2}, "must be auto, drawn, all, or an object"),
        ({"axis": 3, "slices": [1]}, "the axis of annotated_slices must be 0, 1 or 2"),
        ({"axis": True, "slices": [1]}, "the axis of annotated_slices must be 0, 1 or 2"),
        ({"axis": 0, "slices": []}, "must be a list of numbers"),
        ({"axis": 0, "slices": "12"}, "must be a list of numbers"),
        ({"axis": 0, "slices": [10_000]}, "must be whole numbers from 0 to"),
        ({"axis": 0, "slices": [1.5]}, "must be whole numbers from 0 to"),
    ],
)
def test_slices_that_a_label_lacks_are_refused(
    store: CheckedDatastore, volume: Volume, given: object, message: str
) -> None:
    for tag in ("final", "original"):
        with pytest.raises(HTTPException, match=message) as refused:
            store.save_label("scan", str(volume.label), tag, {"annotated_slices": given})
        assert refused.value.status_code == 422
    assert store.get_labels_by_image_id("scan") == {}


def test_a_label_copied_in_by_hand_is_judged_by_its_slices_too(
    store: CheckedDatastore, volume: Volume, tmp_path: Path
) -> None:
    sparse = every_third(volume.truth)
    write(Path(volume.image.parent, "labels", "final", "scan.nii.gz"), sparse, volume.affine)
    copied = CheckedDatastore(str(volume.image.parent), labels=LABELS)
    copied.get_label_uri("scan", "final")
    assert (saved(copied) == sparse).all()
    assert set(np.flatnonzero((learnt(copied) != 255).all((0, 1)))) == set(np.flatnonzero(sparse.any((0, 1))))
