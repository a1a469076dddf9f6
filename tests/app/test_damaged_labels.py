"""Damaged files in the studies: intact ones are served, and the operator is warned."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from fastapi import HTTPException
from live import LABELS, Volume, write, write_volume

from deformux_label.lib.store.datastore import CheckedDatastore

pytestmark = pytest.mark.usefixtures("unwatched")


@pytest.fixture
def store(volume: Volume) -> CheckedDatastore:
    store = opened(volume)
    for annotator in ("anna", "ben"):
        store.save_label("scan", str(volume.label), "final", {"client_id": annotator})
    return store


def opened(volume: Volume) -> CheckedDatastore:
    return CheckedDatastore(str(volume.image.parent), labels=LABELS)


def current(store: CheckedDatastore) -> np.ndarray:
    return np.asarray(nib.load(store.get_label_uri("scan", "final")).dataobj)


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("restart", [True, False])
@pytest.mark.parametrize("damage", ["half", "empty", "one bit", "text"])
def test_a_damaged_label_is_restored(
    store: CheckedDatastore, volume: Volume, damage: str, restart: bool, caplog: pytest.LogCaptureFixture
) -> None:
    file = volume.image.parent / "labels" / "final" / "scan.nii.gz"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes({"half": content[: len(content) // 2], "empty": b"", "one bit": content, "text": b"x"}[damage])
    with caplog.at_level(logging.WARNING):
        again = opened(volume) if restart else store
        assert (current(again) == volume.truth).all()
    assert file.read_bytes() == again.revisions.file(again.revisions.newest("scan", "final")).read_bytes()
    (warning,) = again.warnings()
    assert "restored from its revision 2" in warning
    assert "restored from its revision 2" in caplog.text
    assert len(again.revisions.history("scan", "final")) == 2
    (kept,) = again.trash.entries()
    assert kept.kind == "damaged label"
    assert again.get_labeled_images() == ["scan"]
    assert opened(volume).warnings() == [], "reported once"


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("found", ["at use", "after the start"])
def test_a_flipped_bit_without_a_new_date(volume: Volume, tmp_path: Path, suffix: str, found: str) -> None:
    store = opened(volume)
    label = write(tmp_path / f"drawn{suffix}", volume.truth, volume.affine)
    store.save_label("scan", str(label), "final", {"client_id": "anna"})
    file = volume.image.parent / "labels" / "final" / f"scan{suffix}"
    before = file.stat()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    again = opened(volume)
    if found == "after the start":
        again.check_files()
        assert again._checks.wait(60)
        assert file.read_bytes() == label.read_bytes()
    assert (current(again) == volume.truth).all()
    assert file.read_bytes() == label.read_bytes()
    (warning,) = again.warnings()
    assert "restored from its revision 1" in warning
    assert "check the disk" in warning
    assert len(again.revisions.history("scan", "final")) == 1
    (kept,) = again.trash.entries()
    assert kept.kind == "damaged label"


def test_the_newest_intact_revision_is_restored(store: CheckedDatastore, volume: Volume) -> None:
    half(store.revisions.file(store.revisions.newest("scan", "final")))
    half(Path(store.get_label_uri("scan", "final")))
    again = opened(volume)
    assert (current(again) == volume.truth).all()
    assert "revision 1" in again.warnings()[0]
    with pytest.raises(HTTPException, match="damaged"):
        again.restore_label("scan", 2, "carla")


def test_a_label_drawn_over_by_hand_is_a_new_revision(store: CheckedDatastore, volume: Volume) -> None:
    file = Path(store.get_label_uri("scan", "final"))
    drawn = volume.truth.copy()
    drawn[0, 0, 0] = 1
    write(file, drawn, volume.affine)
    again = opened(volume)
    assert (current(again) == drawn).all()
    assert [r.annotator for r in again.revisions.history("scan", "final")] == ["anna", "ben", ""]
    assert "client_id" not in again.get_label_info("scan", "final")
    # Changed back by hand: this is not an interrupted save.
    write(file, volume.truth, volume.affine)
    assert (current(again) == volume.truth).all()
    assert again.warnings() == []


@pytest.mark.parametrize(
    "record",
    [
        "",
        "{",
        "[1, 2]",
        "null",
        {"client_id": 1},
        {"image": "other"},
        {"number": 7},
        {"number": "2"},
        {"time": "yesterday"},
        {"suffix": "/../../x.nii.gz"},
        {"sha256": "zz"},
        {"info": ["x"]},
        {"annotator": None},
        {"labels": "liver"},
        {"info": json.loads("[" * 60 + "]" * 60)},
    ],
)
def test_a_bad_record_of_a_revision_is_left_out(
    store: CheckedDatastore, volume: Volume, record: str | dict[str, Any]
) -> None:
    path = volume.image.parent / ".deformux" / "revisions" / "scan" / "final" / "0002.json"
    is_bad = not isinstance(record, dict) or "client_id" not in record
    path.write_text(record if isinstance(record, str) else json.dumps({**json.loads(path.read_text()), **record}))
    for index in (True, False):
        if not index:
            (volume.image.parent / "datastore_v2.json").unlink()
        again = opened(volume)
        assert (current(again) == volume.truth).all()
        again.revisions.history("scan", "final")
        assert any("0002.json" in warning for warning in again.warnings()) == is_bad
        json.dumps(again.status()).encode()
    again.save_label("scan", str(volume.label), "final", {"client_id": "carla"})
    assert again.get_label_info("scan", "final")["revision"] >= 3, "no number is given twice"


def test_half_a_surrogate_pair_is_refused_or_repaired(store: CheckedDatastore, volume: Volume) -> None:
    """An earlier version stored ``{"client_id": "\\ud800"}``, which made every later start fail."""
    for refused in ({"client_id": "\ud800"}, {"x": ["\udfff"]}, {"\ud800": 1}):
        for attempt in (
            lambda info=refused: store.save_label("scan", str(volume.label), "final", info),
            lambda info=refused: store.update_image_info("scan", info),
            lambda info=refused: store.update_label_info("scan", "final", info),
            lambda info=refused: store.add_image("new", str(volume.image), info),
        ):
            with pytest.raises(HTTPException, match="Unicode"):
                attempt()
    with pytest.raises(HTTPException, match="text"):
        store.restore_label("scan", 1, "\ud800")
    folder = volume.image.parent
    for path in (folder / "datastore_v2.json", *folder.glob(".deformux/revisions/scan/final/*.json")):
        path.write_text(path.read_text().replace('"ben"', '"\\ud800"'))
    again = opened(volume)
    assert again.get_label_info("scan", "final")["client_id"] == "?"
    assert [r.annotator for r in again.revisions.history("scan", "final")] == ["anna", "?"]
    json.dumps([r.summary() for r in again.revisions.history("scan", "final")], ensure_ascii=False).encode()
    again.save_label("scan", str(volume.label), "final", {"client_id": "carla"})
    assert opened(volume).get_label_info("scan", "final")["client_id"] == "carla"


@pytest.mark.parametrize("entry", [None, 7, {}, {"image": 3}, {"image": {"ext": ["x"]}}, {"labels": []}])
def test_a_bad_entry_of_the_index_is_rebuilt(store: CheckedDatastore, volume: Volume, entry: Any) -> None:
    other = write_volume(volume.image.with_name("other.nii.gz"), volume.label.with_name("o.nii.gz"), spacing=(8, 8, 8))
    store.refresh()
    store.update_image_info(other.id, {"note": "kept"})
    index = volume.image.parent / "datastore_v2.json"
    content = json.loads(index.read_text())
    content["objects"]["scan"] = entry
    index.write_text(json.dumps(content))
    again = opened(volume)
    assert again.get_image_info("other")["note"] == "kept"
    assert again.get_label_info("scan", "final")["client_id"] == "ben"
    assert len(list(index.parent.glob("datastore_v2.json.damaged-*"))) == 1
    assert opened(volume).get_image_info("other")["note"] == "kept"
    assert len(list(index.parent.glob("datastore_v2.json.damaged-*"))) == 1, "the index was written again"


def test_paths_of_a_forged_index_stay_inside(store: CheckedDatastore, volume: Volume) -> None:
    decoy = volume.image.parent.parent / "decoy.nii.gz"
    decoy.write_bytes(b"decoy")
    index = volume.image.parent / "datastore_v2.json"
    content = json.loads(index.read_text())
    content["objects"]["scan"]["image"]["info"]["file"] = "../decoy.nii.gz"
    content["objects"]["scan"]["labels"]["final"]["ext"] = "/../../../../decoy.nii.gz"
    content["objects"]["scan"]["labels"]["../../.."] = {"ext": "decoy.nii.gz"}
    index.write_text(json.dumps(content))
    again = opened(volume)
    assert again.get_image_uri("scan") == str(volume.image)
    assert (current(again) == volume.truth).all()
    assert set(again.get_labels_by_image_id("scan")) == {"final"}
    again.remove_image("scan")
    assert decoy.read_bytes() == b"decoy"


@pytest.mark.parametrize("content", ["", "{", '{"labels": []}', '{"labels": [1], "unnamed": ["x"]}', "7"])
def test_a_damaged_record_of_the_project(store: CheckedDatastore, volume: Volume, content: str) -> None:
    (volume.image.parent / ".deformux" / "project.json").write_text(content)
    again = opened(volume)
    assert again.get_labeled_images() == ["scan"]
    assert json.loads((volume.image.parent / ".deformux" / "project.json").read_text())["labels"] == list(LABELS)
