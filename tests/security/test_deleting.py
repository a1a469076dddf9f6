"""Deleting never touches the target of a link, and can be undone; an upload never replaces a file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests
from live import CONF, LiveServer, Volume, serve_command, wait_for, write_volume
from typer.testing import CliRunner

from deformux_label.cli.main import app
from deformux_label.lib.store.datastore import CheckedDatastore

pytestmark = pytest.mark.usefixtures("unwatched")


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Volume]:
    """Make the scans of a hospital's archive, next to the studies."""
    folder = tmp_path_factory.mktemp("archive")
    return {
        name: write_volume(
            folder / f"{name}{suffix}", folder / "labels" / f"{name}.nii.gz", spacing=(8, 8, 8), seed=seed
        )
        for seed, (name, suffix) in enumerate({"linked": ".nii.gz", "c1": ".nii.gz", "other": ".nrrd"}.items())
    }


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory, archive: dict[str, Volume]) -> Path:
    folder = tmp_path_factory.mktemp("deleting") / "studies"
    (folder / "ward").mkdir(parents=True)
    (folder / "linked.nii.gz").symlink_to(archive["linked"].image)
    (folder / "ward" / "relative.nii.gz").symlink_to(os.path.relpath(archive["linked"].image, folder / "ward"))
    return folder


@pytest.fixture(scope="module")
def running(start_here: Callable[..., LiveServer], studies: Path) -> LiveServer:
    return start_here(studies, CONF, serve_command)


def upload(server: LiveServer, volume: Volume, name: str) -> Any:
    with volume.image.open("rb") as file:
        return requests.put(
            f"{server.url}/datastore/image",
            params={"image": name},
            files={"file": (volume.image.name, file)},
            timeout=60,
        )


def delete(server: LiveServer, what: str, **query: str) -> Any:
    return requests.delete(f"{server.url}/datastore/{what}", params=query, timeout=60)


def tree(folder: Path) -> dict[str, bytes | str]:
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def test_a_link_is_removed_and_its_target_stays(running: LiveServer, studies: Path, archive: dict[str, Volume]) -> None:
    before = tree(archive["linked"].image.parent)
    for image, file in (("linked", "linked.nii.gz"), ("ward__relative", "ward/relative.nii.gz")):
        target = os.readlink(studies / file)
        assert running.submit(image, archive["linked"].label, client_id="anna").status_code == 200
        assert delete(running, "image", id=image).status_code == 200
        assert not os.path.lexists(studies / file)
        assert image not in running.objects()
        assert not list(studies.glob(f"labels/*/{image}*"))
        (kept,) = (studies / ".deformux" / "trash").glob(f"*-{image}/image/*")
        assert (kept.is_symlink(), os.readlink(kept)) == (True, target)
        back = CliRunner().invoke(app, ["studies", "restore", "--studies", str(studies), kept.parent.parent.name])
        assert back.exit_code == 0, back.output
        assert os.readlink(studies / file) == target
        # The server notices files of other processes.
        wait_for(lambda image=image: "final" in running.objects().get(image, {}).get("labels", {}), "the label is back")
    assert tree(archive["linked"].image.parent) == before


def test_a_deleted_label_is_moved_as_well(running: LiveServer, studies: Path, archive: dict[str, Volume]) -> None:
    stored = studies / "labels" / "final" / "linked.nii.gz"
    decoy = studies.parent / "decoy.nii.gz"
    decoy.write_bytes(archive["linked"].label.read_bytes())
    stored.unlink(missing_ok=True)
    stored.symlink_to(decoy)
    before = decoy.read_bytes()
    assert running.submit("linked", archive["linked"].label).status_code == 200
    assert decoy.read_bytes() == before
    assert delete(running, "label", id="linked", tag="final").status_code == 200
    assert not os.path.lexists(stored)
    listed = CliRunner().invoke(app, ["studies", "trash", "--studies", str(studies)])
    (name,) = {line.split()[0] for line in listed.output.splitlines() if " label " in line and "-linked" in line}
    assert CliRunner().invoke(app, ["studies", "restore", "--studies", str(studies), name]).exit_code == 0
    assert stored.is_file()
    for wrong in ("nothing", "..", "../../labels"):
        refused = CliRunner().invoke(app, ["studies", "restore", "--studies", str(studies), wrong])
        assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)


def test_a_name_belongs_to_the_first_volume(running: LiveServer, studies: Path, archive: dict[str, Volume]) -> None:
    """The Slicer extension uploads automatically under the name of a node: two annotators may both have a ``c1``."""
    assert upload(running, archive["c1"], "c1").json() == {"image": "c1"}
    assert upload(running, archive["c1"], "c1").json() == {"image": "c1"}, "the same bytes are the same volume"
    before = tree(studies)
    for volume in (archive["linked"], archive["other"]):
        answer = upload(running, volume, "c1")
        assert (answer.status_code, "'c1-2'" in answer.json()["detail"]) == (409, True), answer.text
    assert tree(studies) == before
    assert upload(running, archive["linked"], "c1-2").status_code == 200
    assert "'c1-3'" in upload(running, archive["other"], "c1").json()["detail"]
    # Files that are not served are not overwritten either.
    (studies / "gone.nii.gz").symlink_to(studies.parent / "nowhere.nii.gz")
    assert upload(running, archive["c1"], "gone").status_code == 409
    assert not (studies.parent / "nowhere.nii.gz").exists()
    assert (studies / "gone.nii.gz").is_symlink()


def test_deleted_volumes_are_not_segmented(running: LiveServer, studies: Path, archive: dict[str, Volume]) -> None:
    assert upload(running, archive["c1"], "leaves").status_code == 200
    assert delete(running, "image", id="leaves").status_code == 200
    (kept,) = (studies / ".deformux" / "trash").glob("*-leaves/image/*")
    answer = requests.post(f"{running.url}/infer/segmentation", params={"image": str(kept)}, timeout=60)
    assert answer.status_code == 403, answer.text


def test_labels_never_move_to_another_volume(running: LiveServer, studies: Path, archive: dict[str, Volume]) -> None:
    upload(running, archive["c1"], "patient")
    assert running.submit("patient", archive["c1"].label).status_code == 200
    assert delete(running, "image", id="patient").status_code == 200
    answer = upload(running, archive["other"], "patient")
    assert (answer.status_code, "'patient-2'" in answer.json()["detail"]) == (409, True), answer.text
    # By hand, under the same stem.
    (studies / "patient.nrrd").write_bytes(archive["other"].image.read_bytes())
    store = CheckedDatastore(str(studies), labels=None)
    assert store.get_image_uri("patient.nrrd") == str(studies / "patient.nrrd")
    assert store.get_labels_by_image_id("patient.nrrd") == {}
    assert upload(running, archive["c1"], "patient").status_code == 200, "the volume that the labels are of"


def test_nothing_is_written_through_links_to_folders(tmp_path: Path, archive: dict[str, Volume]) -> None:
    (tmp_path / "outside").mkdir()
    studies = tmp_path / "studies"
    (studies / "labels").mkdir(parents=True)
    (studies / "a.nii.gz").symlink_to(archive["c1"].image)
    store = CheckedDatastore(str(studies), labels=("liver", "spleen"))
    (studies / "labels" / "draft").symlink_to(tmp_path / "outside")
    with pytest.raises(Exception, match="link out of the studies"):
        store.save_label("a", str(archive["c1"].label), "draft", {})
    for tag in ("../../outside", str(tmp_path / "outside"), "x/y", "", "a\0"):
        for attempt in (
            lambda tag=tag: store.restore_label("a", 1, "anna", tag),
            lambda tag=tag: store.revisions.history("a", tag),
            lambda tag=tag: store.remove_label("a", tag),
            lambda tag=tag: store.save_label("a", str(archive["c1"].label), tag, {}),
        ):
            with pytest.raises(Exception, match="cannot be a label tag"):
                attempt()
    for image in ("../../outside", "..", str(tmp_path / "outside"), "a\0", "x" * 300, "\ud800"):
        with pytest.raises(Exception, match="cannot be an image id"):
            store.revisions.get(image, "final", 1)
        with pytest.raises(Exception, match="cannot be an image id"):
            store.restore_label(image, 1, "anna")
    assert list((tmp_path / "outside").iterdir()) == []
