"""Folders as hospitals have them: served files and their ids, unserved files and why, and read-only folders."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import requests
from fastapi import HTTPException
from live import CONF, LABELS, LiveServer, Volume, serve_command, wait_for, write_volume
from typer.testing import CliRunner

from deformux_label.cli.main import app
from deformux_label.lib.store.datastore import CheckedDatastore, StudiesError

pytestmark = pytest.mark.usefixtures("unwatched")


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Volume]:
    folder = tmp_path_factory.mktemp("scans")
    return {
        suffix: write_volume(folder / f"scan{suffix}", folder / f"label_{n}.nii.gz", spacing=(8, 8, 8), seed=n)
        for n, suffix in enumerate((".nii.gz", ".nii", ".nrrd"))
    }


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    (tmp_path / "studies").mkdir()
    return tmp_path / "studies"


def put(volume: Volume, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(volume.image, path))


def opened(studies: Path) -> CheckedDatastore:
    return CheckedDatastore(str(studies), labels=LABELS)


def ids(store: CheckedDatastore) -> dict[str, str]:
    """Return id to path in the studies."""
    root = Path(store._datastore_path)
    return {image: str(Path(store.get_image_uri(image)).relative_to(root)) for image in store.list_images()}


def test_capitals_folders_and_two_files_of_one_stem(studies: Path, scans: dict[str, Volume]) -> None:
    for name in ("a.NII.GZ", "b.NII", "ward/x/c.nii.gz", "ward/c.nii.gz", "d.nii.gz", "ward.x/.hidden/e.nii.gz"):
        put(scans[".nii.gz" if name.lower().endswith(".gz") else ".nii"], studies / name)
    put(scans[".nrrd"], studies / "d.nrrd")
    put(scans[".nrrd"], studies / "ward__c.nrrd")
    put(scans[".nii.gz"], studies / "labels" / "final" / "nobody.nii.gz")
    store = opened(studies)
    expected = {
        "a": "a.NII.GZ",
        "b": "b.NII",
        "d": "d.nii.gz",
        "d.nrrd": "d.nrrd",
        "ward__c": "ward/c.nii.gz",
        "ward__c.nrrd": "ward__c.nrrd",
        "ward__x__c": "ward/x/c.nii.gz",
    }
    assert ids(store) == expected
    for image in expected:
        label = scans[".nrrd" if image.endswith(".nrrd") else ".nii" if image == "b" else ".nii.gz"].label
        store.save_label(image, str(label), "final", {})
        assert store.get_image_info(image)["path"] == store.get_image_uri(image)
    assert sorted(store.get_labeled_images()) == sorted(expected)
    again = opened(studies)
    assert ids(again) == expected
    with_archive = again.get_dataset_archive(None)
    listed = subprocess.run(["python", "-m", "zipfile", "-l", with_archive], capture_output=True, text=True, check=True)
    assert all(f"image/{image}." in listed.stdout for image in expected)
    Path(with_archive).unlink()
    # The first of two is removed, even with the index: the second keeps its id and its label.
    (studies / "d.nii.gz").unlink()
    assert ids(opened(studies))["d.nrrd"] == "d.nrrd"
    (studies / "datastore_v2.json").unlink()
    again = opened(studies)
    assert ids(again) == {image: path for image, path in expected.items() if image != "d"}
    assert again.get_label_info("d.nrrd", "final")["revision"] == 1
    put(scans[".nii.gz"], studies / "d.nii.gz")
    assert ids(opened(studies)) == expected


def test_ids_of_existing_projects_stay(studies: Path, scans: dict[str, Volume]) -> None:
    """The index of an earlier version, which does not contain paths."""
    put(scans[".nii.gz"], studies / "d.nii.gz")
    put(scans[".nrrd"], studies / "d.nrrd")
    put(scans[".nrrd"], studies / "x.seg.nrrd")
    entry = {"image": {"ext": ".nrrd", "info": {"ts": 1, "note": "kept"}}, "labels": {}}
    content = {"name": "n", "description": "", "images_dir": ".", "labels_dir": "labels"}
    (studies / "datastore_v2.json").write_text(json.dumps({**content, "objects": {"d": entry, "x.seg": entry}}))
    store = opened(studies)
    assert ids(store) == {"d": "d.nrrd", "d.nii.gz": "d.nii.gz", "x.seg": "x.seg.nrrd"}
    assert store.get_image_info("d")["note"] == "kept"


def test_unserved_files_are_reported(studies: Path, scans: dict[str, Volume], caplog: pytest.LogCaptureFixture) -> None:
    put(scans[".nii.gz"], studies / "good.nii.gz")
    (studies / "linked.nii.gz").symlink_to(scans[".nii.gz"].image)
    (studies / "folder.nii.gz").mkdir()
    put(scans[".nii"], studies / "folder.nii.gz" / "folder.nii")
    (studies / "dead.nii.gz").symlink_to(studies.parent / "nowhere.nii.gz")
    (studies.parent / "elsewhere").mkdir()
    put(scans[".nii.gz"], studies.parent / "elsewhere" / "far.nii.gz")
    (studies / "away").symlink_to(studies.parent / "elsewhere")
    (studies / "loop.nii.gz").symlink_to("loop.nii.gz")
    (studies / "loop").symlink_to("loop")
    (studies / "empty.nii.gz").write_bytes(b"")
    for name in ("slice.dcm", "raw.mhd", "notes.txt", "mask.seg.nrrd"):
        (studies / name).write_text("x")
    put(scans[".nii.gz"], studies / f"{'x' * 220}.nii.gz")
    put(scans[".nii.gz"], studies / "line\nbreak.nii.gz")
    bad = os.fsencode(studies) + b"/caf\xe9.nii.gz"
    shutil.copy(scans[".nii.gz"].image, bad)
    os.mkfifo(studies / "pipe.nii.gz")
    deep = studies / "/".join(["deep"] * 20)
    put(scans[".nii.gz"], deep / "down.nii.gz")
    store = opened(studies)
    assert set(store.list_images()) == {"good", "linked", "folder.nii.gz__folder"}
    assert store.get_image_uri("linked") == str(studies / "linked.nii.gz")
    reasons = {item["file"]: item["reason"] for item in store.status()["not_served"]["first"]}
    expected = {
        "folder.nii.gz": "folder",
        "dead.nii.gz": "link to nothing",
        "loop.nii.gz": "cannot be followed",
        "loop": "cannot be followed",
        "away": "link to a folder",
        "empty.nii.gz": "empty",
        "slice.dcm": "formats",
        "raw.mhd": "formats",
        "mask.seg.nrrd": "labels/final",
        f"{'x' * 220}.nii.gz": "cannot be an id",
        "line\\nbreak.nii.gz": "cannot be an id",
        "caf\\udce9.nii.gz": "cannot be an id",
        "pipe.nii.gz": "not a file",
        "/".join(["deep"] * 17): "deep",
    }
    assert reasons.keys() == expected.keys()
    for name, word in expected.items():
        assert word in reasons[name], name
    assert "dead.nii.gz" in caplog.text
    caplog.clear()
    store.refresh()
    assert "dead.nii.gz" not in caplog.text, "it is logged once"
    listed = CliRunner().invoke(app, ["studies", "--studies", str(studies)])
    assert listed.exit_code == 0, listed.output
    assert "3 volumes are served" in listed.output
    assert all(name in listed.output for name in ("dead.nii.gz", "slice.dcm", "caf\\udce9"))
    assert CliRunner().invoke(app, ["studies"]).exit_code == 2


def test_unusable_scans_are_reported(studies: Path, scans: dict[str, Volume], caplog: pytest.LogCaptureFixture) -> None:
    put(scans[".nii.gz"], studies / "good.nii.gz")
    (studies / "ward").mkdir()
    (studies / "ward" / "text.nii").write_text("not a scan" * 100)
    colour = nib.Nifti1Image(np.zeros((4, 4, 4, 1, 3), np.uint8), np.eye(4))
    nib.save(colour, studies / "colour.nii.gz")
    detached = "NRRD0004\ntype: short\ndimension: 3\nsizes: 4 4 4\ndata file: secret.raw\nencoding: raw\n\n"
    (studies / "detached.nrrd").write_text(detached)
    store = opened(studies)
    store.check_scans()
    reasons = {item["file"]: item["reason"] for item in store.status()["not_served"]["first"]}
    assert reasons.keys() == {"ward/text.nii", "colour.nii.gz", "detached.nrrd"}
    assert "another file" in reasons["detached.nrrd"]
    assert "ward/text.nii" in caplog.text
    listed = CliRunner().invoke(app, ["studies", "--studies", str(studies)])
    assert "1 volumes are served" in listed.output
    assert all(name in listed.output for name in reasons)
    caplog.clear()
    put(scans[".nii.gz"], studies / "colour.nii.gz")
    store.refresh()
    assert set(store.not_served()) == {"ward/text.nii", "detached.nrrd"}
    assert not caplog.text, "it is logged once"


def test_many_unserved_files_are_counted(studies: Path) -> None:
    for number in range(300):
        (studies / f"slice_{number:03d}.dcm").write_bytes(b"x")
    found = opened(studies).status()["not_served"]
    assert (found["count"], len(found["first"])) == (300, 50)


def test_a_server_notices_nested_volumes(
    start_here: Callable[..., LiveServer], studies: Path, scans: dict[str, Volume]
) -> None:
    server = start_here(studies, CONF, serve_command)
    put(scans[".nii.gz"], studies.parent / "moved" / "inner" / "m.NII.GZ")
    os.rename(studies.parent / "moved", studies / "moved")
    put(scans[".nrrd"], studies / "new" / "folder" / "n.nrrd")
    wait_for(lambda: set(server.objects()) == {"moved__inner__m", "new__folder__n"}, "both are served")
    for image, suffix in (("moved__inner__m", ".nii.gz"), ("new__folder__n", ".nrrd")):
        assert server.submit(image, scans[suffix].label).status_code == 200
        answer = requests.get(f"{server.url}/datastore/image", params={"image": image}, timeout=60)
        assert answer.content == scans[suffix].image.read_bytes()
        assert server.infer(image).status_code == 200
    # A scan that is copied slowly is listed as unusable only until it is complete.
    whole = scans[".nii.gz"].image.read_bytes()

    def listed() -> list[str]:
        found = requests.get(f"{server.url}/info/", timeout=30).json()["datastore"]["not_served"]["first"]
        return [item["file"] for item in found]

    with (studies / "slow.nii.gz").open("wb") as slow:
        slow.write(whole[:20])
        slow.flush()
        wait_for(lambda: listed() == ["slow.nii.gz"], "its header is not there yet")
        slow.write(whole[20:])
    wait_for(lambda: listed() == [], "it is whole")
    (studies / "slow.nii.gz").unlink()
    (studies / "dead.nii.gz").symlink_to(studies / "nothing")
    shutil.rmtree(studies / "new")
    wait_for(lambda: set(server.objects()) == {"moved__inner__m"}, "a folder is gone")
    info = requests.get(f"{server.url}/info/", timeout=60).json()
    assert info["datastore"]["completed"] == 1


def test_a_file_in_the_place_of_the_labels_ends_the_start(studies: Path) -> None:
    (studies / "labels").write_text("a list of names")
    with pytest.raises(StudiesError, match="labels/final"):
        opened(studies)
    listed = CliRunner().invoke(app, ["labels", "list", "--studies", str(studies)])
    assert (listed.exit_code, listed.output.count("\n")) == (2, 1)
    assert (studies / "labels").read_text() == "a list of names"


@pytest.fixture
def read_only(studies: Path, scans: dict[str, Volume]) -> Iterator[Path]:
    """Yield a read-only folder; root needs a read-only file system for that."""
    put(scans[".nii.gz"], studies / "scan.nii.gz")
    opened(studies).save_label("scan", str(scans[".nii.gz"].label), "final", {"client_id": "anna"})
    put(scans[".nii"], studies / "fresh" / "new.nii")
    if os.geteuid() != 0:
        for path in (studies, *studies.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        yield studies
        for path in (studies, *studies.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        return
    for command in (["mount", "--bind"], ["mount", "-o", "remount,bind,ro"]):
        done = subprocess.run([*command, str(studies), str(studies)], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"nothing can be mounted read-only here: {done.stderr.strip()}")
    try:
        yield studies
    finally:
        subprocess.run(["umount", "-l", str(studies)], check=True)


def test_read_only_studies(start_here: Callable[..., LiveServer], read_only: Path, scans: dict[str, Volume]) -> None:
    store = opened(read_only)
    assert sorted(store.list_images()) == ["fresh__new", "scan"]
    assert (np.asarray(nib.load(store.get_label_uri("scan", "final")).dataobj) == scans[".nii.gz"].truth).all()
    swapped = CheckedDatastore(str(read_only), labels=LABELS[::-1])
    assert np.asarray(nib.load(swapped.get_label_uri("scan", "final")).dataobj).max() == 2
    for attempt in (
        lambda: store.save_label("scan", str(scans[".nii.gz"].label), "final", {}),
        lambda: store.remove_label("scan", "final"),
        lambda: store.remove_image("scan"),
        lambda: store.add_image("more", str(scans[".nii"].image), {}),
        lambda: store.update_image_info("scan", {"x": 1}),
        lambda: store.restore_label("scan", 1, "anna"),
    ):
        with pytest.raises(HTTPException, match="only inference works"):
            attempt()
    server = start_here(read_only, CONF, serve_command)
    info = requests.get(f"{server.url}/info/", timeout=60).json()
    assert info["datastore"]["read_only"]
    assert [warning for warning in info["warnings"] if "cannot be written to" in warning]
    for image in ("scan", "fresh__new"):
        answer = server.infer(image, uncertainty="on")
        assert answer.status_code == 200
    answer = server.submit("scan", scans[".nii.gz"].label)
    assert (answer.status_code, "only inference works" in answer.json()["detail"]) == (409, True)
    answer = requests.post(f"{server.url}/batch/infer/segmentation", json={}, timeout=60)
    assert (answer.status_code, "no segmentation could be stored" in answer.text) == (409, True), answer.text
    log = server.log.read_text()
    assert log.count("cannot be written to") == 1
    assert "Traceback" not in log
