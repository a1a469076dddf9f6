"""Cases of several sequences on a real server: one image each, whose other sequences are served by query."""

from __future__ import annotations

import dataclasses
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import requests
from live import APP, LABELS, LiveServer, Volume, project_of, remove_state, serve_command, write, write_volume
from shared_fixtures import run_training

from deformux.networks.model_file import load_model
from deformux.publishing.model_versions import ModelVersions
from deformux_label.demo.server_process import AnnotationClient, PlayerError
from deformux_label.lib.store.datastore import CheckedDatastore

CONF = {"labels": ",".join(LABELS), "modality": "mr", "patch_size": "16,16,16"}
CHANNELS = "_0000=flair,_0001=t1c"


def write_case(folder: Path, name: str, seed: int = 0) -> Volume:
    """Write two sequences of a case, the second on a grid of its own, and the label in a hidden folder."""
    first = write_volume(
        folder / f"{name}_0000.nii.gz", folder / ".truth" / f"{name}.nii.gz", spacing=(4, 4, 4), seed=seed
    )
    shifted = first.affine.copy()
    shifted[:3, 3] += 2
    scan = nib.load(first.image).get_fdata()
    write(folder / f"{name}_0001.nii.gz", (500 - scan[1:, :, 1:]).astype(np.int16), shifted)
    return first


def opened(folder: Path, channels: str = CHANNELS) -> CheckedDatastore:
    return CheckedDatastore(str(folder), labels=LABELS, image_channels=channels)


def test_a_case_is_one_image(unwatched: None, tmp_path: Path) -> None:
    studies = tmp_path / "studies"
    volume = write_case(studies, "a")
    write_case(studies / "ward", "b")
    write(studies / "c_0001.nii.gz", np.arange(4096, dtype=np.int16).reshape(16, 16, 16), np.eye(4))
    write(studies / "d.nii.gz", np.arange(4096, dtype=np.int16).reshape(16, 16, 16), np.eye(4))
    store = opened(studies)
    assert sorted(store.list_images()) == ["a", "c", "d", "ward__b"]
    assert store.get_image_uri("a") == str(studies / "a_0000.nii.gz")
    assert store.get_image_info("a")["sequences"] == {"flair": "a_0000.nii.gz", "t1c": "a_0001.nii.gz"}
    assert store.get_image_info("c")["sequences"] == {"t1c": "c_0001.nii.gz"}
    assert store.status()["not_served"]["count"] == 0
    # The first arrives later, a second one disappears.
    write(studies / "c_0000.nii.gz", np.arange(4096, dtype=np.int16).reshape(16, 16, 16), np.eye(4))
    (studies / "a_0001.nii.gz").unlink()
    store.refresh()
    assert sorted(store.list_images()) == ["a", "c", "d", "ward__b"]
    assert store.get_image_uri("c") == str(studies / "c_0000.nii.gz")
    assert store.get_image_info("a")["sequences"] == {"flair": "a_0000.nii.gz"}
    # And the first disappears: the case keeps its id and its label, and has its first again when it is back.
    store.save_label("a", str(volume.label), "final", {})
    moved = (studies / "a_0000.nii.gz").rename(tmp_path / "a_0000.nii.gz")
    shutil.copy(moved, studies / "a_0001.nii.gz")
    store.refresh()
    assert (store.get_image_uri("a"), store.get_labeled_images()) == (str(studies / "a_0001.nii.gz"), ["a"])
    moved.rename(studies / "a_0000.nii.gz")
    store.refresh()
    assert (store.get_image_uri("a"), store.get_labeled_images()) == (str(studies / "a_0000.nii.gz"), ["a"])
    assert sorted(store.list_images()) == ["a", "c", "d", "ward__b"]
    # A damaged second sequence is a damaged scan.
    (studies / "ward" / "b_0001.nii.gz").write_bytes(b"nothing")
    assert list(store.check_scans()) == ["ward/b_0001.nii.gz"]
    assert store.unusable_scans == {"ward__b"}
    # Tools that know no options follow the last start.
    assert sorted(CheckedDatastore(str(studies), labels=None).list_images()) == ["a", "c", "d", "ward__b"]


def test_without_the_option_every_file_keeps_its_id(unwatched: None, tmp_path: Path) -> None:
    studies = tmp_path / "studies"
    volume = write_case(studies, "a")
    other = write_case(studies, "b", seed=1)
    store = opened(studies, "")
    assert sorted(store.list_images()) == ["a_0000", "a_0001", "b_0000", "b_0001"]
    assert "sequences" not in store.get_image_info("a_0000")
    store.save_label("a_0000", str(volume.label), "final", {})
    second = nib.load(studies / "b_0001.nii.gz")
    label = write(tmp_path / "b_0001.nii.gz", np.ones(second.shape, dtype=np.uint8), second.affine)
    store.save_label("b_0001", str(label), "final", {})
    # Switched on later: what is labelled keeps its id and its label, and no case is listed twice.
    store = opened(studies)
    assert sorted(store.get_labeled_images()) == ["a_0000", "b_0001"]
    assert sorted(store.list_images()) == ["a_0000", "b_0000", "b_0001"]
    assert store.get_image_uri("b_0001") == str(studies / "b_0001.nii.gz")
    # And off again.
    assert sorted(opened(studies, "").get_labeled_images()) == ["a_0000", "b_0001"]
    assert len(opened(studies, "").list_images()) == 4
    assert other.label.is_file()


def test_all_sequences_are_uploaded_deleted_and_brought_back(unwatched: None, tmp_path: Path) -> None:
    source, studies = tmp_path / "source", tmp_path / "studies"
    volume = write_case(source, "a")
    store = opened(studies)
    for name in ("a_0001", "a_0000", "a_0000"):
        assert store.add_image(name, str(source / f"{name}.nii.gz"), {}) == "a"
        store.refresh()
    assert store.list_images() == ["a"]
    assert store.get_image_uri("a") == str(studies / "a_0000.nii.gz")
    store.save_label("a", str(volume.label), "final", {})
    with zipfile.ZipFile(store.get_dataset_archive(None)) as archive:
        names = sorted(archive.namelist())
    assert names == ["image/a_0000.nii.gz", "image/a_0001.nii.gz", "label/a.nii.gz", "metadata.json"]
    store.remove_image("a")
    store.refresh()
    assert store.list_images() == []
    assert not list(studies.glob("a_*"))
    (entry,) = store.trash.entries()
    assert store.bring_back(entry.name, "anna") == "a"
    store.refresh()
    assert store.list_images() == store.get_labeled_images() == ["a"]
    assert {path.name for path in studies.glob("a_*")} == {"a_0000.nii.gz", "a_0001.nii.gz"}


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Volume]]:
    folder = tmp_path_factory.mktemp("sequences") / "studies"
    return folder, {name: write_case(folder, name, seed) for seed, name in enumerate("abc")}


@pytest.fixture(scope="module")
def server(start_here: Callable[..., LiveServer], studies: tuple[Path, dict[str, Volume]]) -> LiveServer:
    conf = {**CONF, "image_channels": CHANNELS}
    remove_state(studies[0], conf)
    return start_here(studies[0], conf, serve_command)


def pair_of(folder: Path, name: str) -> list[Path]:
    return [folder / f"{name}_000{number}.nii.gz" for number in (0, 1)]


def received(server: LiveServer, **query: object) -> requests.Response:
    return requests.get(f"{server.url}/datastore/image", params=query, timeout=60)


def mask_of(reply: requests.Response, tmp_path: Path) -> nib.Nifti1Image:
    assert reply.status_code == 200, reply.text
    (tmp_path / "mask.nii.gz").write_bytes(reply.content)
    return nib.load(tmp_path / "mask.nii.gz")


def test_a_case_is_served_taught_and_edited(
    server: LiveServer, studies: tuple[Path, dict[str, Volume]], tmp_path: Path
) -> None:
    folder, cases = studies
    assert sorted(server.objects()) == ["a", "b", "c"]
    sample = requests.post(f"{server.url}/activelearning/first", json={}, timeout=60).json()
    assert sample["id"] in cases
    assert sample["path"].endswith(f"{sample['id']}_0000.nii.gz")
    # Slicer's request gets the first, others come by number or name.
    queries = {
        "a_0000": ({}, {"sequence": "0"}, {"sequence": "flair"}),
        "a_0001": ({"sequence": 1}, {"sequence": "t1c"}),
    }
    for file, query in ((file, query) for file, several in queries.items() for query in several):
        assert received(server, image="a", **query).content == (folder / f"{file}.nii.gz").read_bytes()
    for image, sequence, detail in (
        ("a", "2", "image 'a' has no sequence '2'; it has 0 (flair), 1 (t1c)"),
        ("nobody", "0", "there is no image with the id 'nobody'"),
        ("a", "x" * 300, "is not a sequence"),
        ("../a", "0", "cannot be an image id"),
    ):
        reply = received(server, image=image, sequence=sequence)
        assert reply.status_code == 404
        assert detail in reply.json()["detail"]
    # An untrained server answers with an empty mask.
    empty = mask_of(server.infer("a", query={"output": "image"}), tmp_path)
    assert not np.any(empty.dataobj)
    for name, case in cases.items():
        assert server.submit(name, case.label).status_code == 200
    training = run_training(server, steps=2)
    assert training.task["status"] == "DONE", training.final
    whole = mask_of(server.infer("a", query={"output": "image"}), tmp_path)
    np.testing.assert_allclose(whole.affine, cases["a"].affine, atol=1e-4)
    assert whole.shape == cases["a"].truth.shape
    point = [int(n) for n in np.argwhere(cases["a"].truth == 1)[0]]
    edited = server.infer("a", model="edit", query={"output": "image"}, liver=[point], spleen=[], background=[])
    assert np.asarray(mask_of(edited, tmp_path).dataobj)[tuple(point)] == 1


def test_one_volume_for_a_model_of_several(
    server: LiveServer, studies: tuple[Path, dict[str, Volume]], tmp_path: Path
) -> None:
    """Whether it is uploaded to a session, or its other sequences are gone."""
    folder, cases = studies
    versions = ModelVersions(
        project_of({**CONF, "image_channels": CHANNELS}).state_folder(APP, str(folder)) / "versions"
    )
    network, card = load_model(versions.path("v0001"))
    assert (card.in_channels, card.preprocessing.sequences) == (2, ("flair", "t1c"))
    # The server trains with dropout, because Slicer can upload one volume.
    assert card.preprocessing.missing_sequences
    with cases["b"].image.open("rb") as file:
        sent = requests.put(f"{server.url}/session/", files={"files": ("scan.nii.gz", file)}, timeout=60).json()
    session = {"session_id": sent["session_id"], "output": "image"}
    assert mask_of(server.infer("", query=session), tmp_path).shape == cases["b"].truth.shape
    note = server.infer("", query={**session, "output": "json"}).json()["warning"]
    assert "t1c is missing among the sequences of this scan." in note
    strict = dataclasses.replace(card, preprocessing=card.preprocessing.with_dropout(0))
    versions.publish(versions.write(network, strict))
    refused = server.infer("", query=session)
    assert refused.status_code == 400, refused.text
    assert "volume.nii.gz comes without its sequence t1c; the model needs all of flair, t1c" in refused.json()["detail"]
    assert server.infer("b", query={"output": "image"}).status_code == 200
    # A session may have all sequences, whose names say which is which.
    files = [
        ("files", (f"s_000{number}.nii.gz", path.read_bytes())) for number, path in enumerate(pair_of(folder, "b"))
    ]
    whole = requests.put(f"{server.url}/session/", files=files[::-1], timeout=60).json()["session_id"]
    by_id = server.infer("b", query={"output": "image"}).content
    uploaded = mask_of(server.infer("", query={"session_id": whole, "output": "image"}), tmp_path)
    (tmp_path / "by_id.nii.gz").write_bytes(by_id)
    np.testing.assert_array_equal(uploaded.dataobj, nib.load(tmp_path / "by_id.nii.gz").dataobj)
    # As the demo scores a case that is not among the studies.
    client = AnnotationClient(server, tmp_path / "received")
    scored = client.infer("segmentation", "held_out", files=pair_of(folder, "b"))
    np.testing.assert_array_equal(nib.load(scored).dataobj, nib.load(tmp_path / "by_id.nii.gz").dataobj)
    with pytest.raises(PlayerError, match=r"sending b_0001\.nii\.gz failed: a session takes one volume"):
        client.infer("segmentation", "held_out", files=[pair_of(folder, "b")[1], pair_of(folder, "a")[0]])
    (folder / "b_0001.nii.gz").unlink()
    for model, more in (("segmentation", {}), ("edit", {"liver": [[3, 3, 3]], "spleen": [], "background": []})):
        refused = server.infer("b", model=model, query={"output": "image"}, **more)
        assert refused.status_code == 400, refused.text
        assert "b_0000.nii.gz comes without its sequence t1c (b_0001.nii.gz)" in refused.json()["detail"]
    assert sorted(server.objects()) == ["a", "b", "c"]
