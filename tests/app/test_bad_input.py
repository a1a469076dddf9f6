"""Every bad request gets a 4xx with one sentence, the server keeps running, and no data is lost."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from live import CONF, LiveServer, Volume, wait_for, write


def refused(answer: requests.Response, *words: str, status: int | None = None) -> str:
    """Return the detail of a 4xx; check that it is one sentence with these words."""
    assert 400 <= answer.status_code < 500, f"{answer.status_code}: {answer.text[:500]}"
    assert status is None or answer.status_code == status
    detail = answer.json()["detail"]
    assert isinstance(detail, str)
    assert detail
    assert "\n" not in detail
    assert "Traceback" not in detail
    for word in words:
        assert word in detail
    return detail


@pytest.fixture(autouse=True)
def _goes_on(server: LiveServer) -> Any:
    """Check after each bad request that the same process answers."""
    yield
    assert server.process.poll() is None
    assert requests.get(f"{server.url}/info/", timeout=30).status_code == 200


def random_scan(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 100, shape).astype(np.float32)


def truncated(path: Path) -> None:
    write(path, random_scan(20, 20, 20), np.eye(4))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def truncated_inside_gzip(path: Path) -> None:
    write(path, random_scan(20, 20, 20), np.eye(4))
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:5000]))


BAD_IMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "text": (lambda path: path.write_text("this is not an image"), "cannot be read"),
    "empty file": (lambda path: path.write_bytes(b""), "cannot be read"),
    "truncated": (truncated, "cannot be read"),
    "truncated inside gzip": (truncated_inside_gzip, "cannot be read"),
    "4D": (lambda path: write(path, random_scan(12, 12, 12, 3), np.eye(4)), "holds 3 time points"),
    "NaN": (lambda path: write(path, np.full((12, 12, 12), np.nan, np.float32), np.eye(4)), "NaN"),
    "constant": (lambda path: write(path, np.full((12, 12, 12), 7, np.int16), np.eye(4)), "same intensity"),
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_bad_images(server: LiveServer, tmp_path: Path, kind: str) -> None:
    make, expected = BAD_IMAGES[kind]
    path = tmp_path / "bad_scan.nii.gz"
    make(path)
    before = server.objects()
    # in the request itself
    with path.open("rb") as file:
        answer = requests.post(f"{server.url}/infer/segmentation", files={"file": (path.name, file)}, timeout=60)
    refused(answer, expected)
    # into the datastore
    with path.open("rb") as file:
        answer = requests.put(
            f"{server.url}/datastore/image", params={"image": "bad_scan"}, files={"file": (path.name, file)}, timeout=60
        )
    refused(answer, "bad_scan", expected)
    assert server.objects() == before


@pytest.mark.parametrize("kind", [kind for kind in BAD_IMAGES if kind != "empty file"])
def test_bad_images_in_the_studies_folder(server: LiveServer, studies: Path, kind: str) -> None:
    """Files that are copied into the folder are not checked until they are requested."""
    make, expected = BAD_IMAGES[kind]
    path = studies / f"found_{kind.replace(' ', '_')}.nii.gz"
    make(path)
    name = path.name.removesuffix(".nii.gz")
    try:
        # The folder is watched, which takes a moment.
        wait_for(lambda: server.infer(name).status_code != 404, f"{name} came into the index")
        answer = server.infer(name)
        refused(answer, name, expected, status=422)
    finally:
        path.unlink()
    wait_for(lambda: name not in server.objects(), f"the removed {name} left the index")


def test_an_empty_file_in_the_studies_folder_is_reported_and_not_served(server: LiveServer, studies: Path) -> None:
    """It may still be copied, so it is served once it has content."""
    path = studies / "found_empty.nii.gz"

    def not_served() -> str:
        return json.dumps(requests.get(f"{server.url}/info/", timeout=30).json()["datastore"].get("not_served"))

    try:
        path.write_bytes(b"")
        wait_for(lambda: path.name in not_served(), "the empty file was noticed")
        refused(server.infer("found_empty"), "found_empty", status=404)
        write(path, random_scan(20, 20, 20), np.eye(4))
        wait_for(lambda: server.infer("found_empty").status_code == 200, "what was copied is served")
    finally:
        path.unlink()
    wait_for(lambda: "found_empty" not in server.objects(), "the removed file left the index")


def test_unknown_names(server: LiveServer, volumes: dict[str, Volume]) -> None:
    url, label = server.url, volumes["axial"].label
    refused(server.infer("axial", model="liver_v2"), "liver_v2", "segmentation", status=404)
    refused(server.infer("nobody"), "nobody", status=404)
    refused(requests.post(f"{url}/infer/segmentation", timeout=30), "no image", status=400)
    refused(server.submit("nobody", label), "nobody", status=404)
    refused(requests.post(f"{url}/train/liver_v2", json={}, timeout=30), "liver_v2", "segmentation", status=404)
    refused(requests.post(f"{url}/batch/infer/liver_v2", json={}, timeout=30), "liver_v2", status=404)
    refused(requests.post(f"{url}/activelearning/best", json={}, timeout=30), "best", "random", status=404)
    for path in ("image", "image/info"):
        refused(requests.get(f"{url}/datastore/{path}", params={"image": "nobody"}, timeout=30), status=404)
    for path in ("label", "label/info"):
        query = {"label": "axial", "tag": "nothing"}
        refused(requests.get(f"{url}/datastore/{path}", params=query, timeout=30), status=404)
    for path, query in (("image", {"id": "nobody"}), ("label", {"id": "axial", "tag": "final"})):
        refused(requests.delete(f"{url}/datastore/{path}", params=query, timeout=30), status=404)


def outside(server: LiveServer, studies: Path, tmp_path: Path) -> list[str]:
    scan = write(tmp_path / "private.nii.gz", random_scan(20, 20, 20), np.eye(4))
    (studies / "link").symlink_to(tmp_path)
    return [
        str(scan),
        f"{studies}/../../{tmp_path.name}/private.nii.gz",
        f"{studies}/link/private.nii.gz",
        "../private.nii.gz",
        "/etc/passwd",
        f"/proc/{server.process.pid}/environ",
        "/no/such/file.nii.gz",
        f"file://{scan}",
        "a/\0b",
        "x/" * 3000,
        "..",
    ]


def test_paths_outside_the_studies_folder(server: LiveServer, studies: Path, tmp_path: Path) -> None:
    try:
        for path in outside(server, studies, tmp_path):
            for answer in (server.infer(path), server.infer("axial", image=path)):
                # Null bytes are refused in any query.
                in_query = "\0" in path and "image=axial" not in answer.request.url
                refused(answer, status=404 if path == ".." else 400 if in_query else 403)
                assert "private" not in answer.text
            status = 400 if "\0" in path else 404
            refused(requests.get(f"{server.url}/datastore/image", params={"image": path}, timeout=30), status=status)
            refused(requests.delete(f"{server.url}/datastore/image", params={"id": path}, timeout=30), status=status)
        assert (tmp_path / "private.nii.gz").is_file()
    finally:
        (studies / "link").unlink()


def test_names_that_would_leave_the_folder(server: LiveServer, volumes: dict[str, Volume], studies: Path) -> None:
    before = sorted(str(path) for path in studies.parent.rglob("*"))
    index = server.objects()
    for name in ("../escaped", "/tmp/escaped", "a/b", "..", ".hidden", "x\x00y"):
        with volumes["axial"].image.open("rb") as file:
            answer = requests.put(
                f"{server.url}/datastore/image", params={"image": name}, files={"file": ("a.nii.gz", file)}, timeout=30
            )
        refused(answer, status=400)
    for tag in ("../../escaped", "/tmp/escaped", "a/b", "."):
        refused(server.submit("axial", volumes["axial"].label, tag=tag), status=400)
    for extension in ("/../../escaped.nrrd", ".exe", ".nii.gz/../x"):
        refused(server.infer("axial", result_extension=extension), "result_extension", ".nii.gz", status=400)
    assert server.objects() == index
    assert sorted(str(path) for path in studies.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "value", "valid"),
    [("result_dtype", "complex99", "uint8"), ("device", "quantum", "cpu"), ("logging", "LOUD", "INFO")],
)
def test_bad_options(server: LiveServer, name: str, value: str, valid: str) -> None:
    refused(server.infer("axial", **{name: value}), name, valid, status=400)


@pytest.mark.parametrize("params", ["{", "[1]", '"text"', "5", '{"a": }'])
def test_parameters_that_are_not_a_json_object(server: LiveServer, volumes: dict[str, Volume], params: str) -> None:
    before = server.objects()
    form = {"params": (None, params)}
    refused(
        requests.post(f"{server.url}/infer/segmentation", params={"image": "axial"}, files=form, timeout=30), "JSON"
    )
    label = {"label": ("l.nii.gz", volumes["axial"].label.read_bytes())}
    answer = requests.put(
        f"{server.url}/datastore/label", params={"image": "axial"}, data={"params": params}, files=label, timeout=30
    )
    refused(answer, "JSON", status=400)
    answer = requests.put(
        f"{server.url}/datastore/image/info", params={"image": "axial"}, data={"info": params}, timeout=30
    )
    refused(answer, "JSON", status=400)
    assert server.objects() == before


def test_info_that_json_cannot_hold(server: LiveServer) -> None:
    """Stored, it would break every later listing of the datastore."""
    query = {"image": "axial"}
    answer = requests.put(f"{server.url}/datastore/image/info", params=query, data={"info": '{"x": NaN}'}, timeout=30)
    refused(answer, "NaN", status=400)
    assert server.objects()


def shifted(affine: np.ndarray, mm: float) -> np.ndarray:
    affine = affine.copy()
    affine[0, 3] += mm
    return affine


def stretched(affine: np.ndarray) -> np.ndarray:
    affine = affine.copy()
    affine[:3, 0] *= 1.01
    return affine


def bad_labels(volume: Volume) -> dict[str, tuple[np.ndarray, np.ndarray, str]]:
    truth, affine = volume.truth, volume.affine
    half = truth.astype(np.float32)
    half[truth == 1] = 1.5
    nan = truth.astype(np.float32)
    nan[0, 0, 0] = np.nan
    return {
        "cropped": (truth[:-1], affine, "grid"),
        "transposed": (truth.swapaxes(0, 2), affine, "grid"),
        "moved by 0.1 mm": (truth, shifted(affine, 0.1), "grid"),
        "moved by 2 µm": (truth, shifted(affine, 2e-3), "grid"),
        "stretched": (truth, stretched(affine), "grid"),
        "flipped": (truth, affine @ np.diag([-1.0, 1, 1, 1]), "grid"),
        "value 3": (np.where(truth == 2, 3, truth).astype(np.uint8), affine, "1 liver, 2 spleen"),
        "negative": (-truth.astype(np.int16), affine, "1 liver, 2 spleen"),
        "not whole": (half, affine, "1 liver, 2 spleen"),
        "NaN": (nan, affine, "1 liver, 2 spleen"),
        "4D": (np.stack([truth, truth], -1), affine, "3D"),
    }


def test_bad_labels_leave_the_earlier_one(server: LiveServer, volumes: dict[str, Volume], tmp_path: Path) -> None:
    volume = volumes["permuted"]
    query = {"label": volume.id, "tag": "final"}
    assert server.submit(volume.id, volume.label).status_code == 200
    before = server.objects()
    try:
        for kind, (array, affine, word) in bad_labels(volume).items():
            for suffix in (".nii.gz", ".nrrd") if kind != "4D" else (".nii.gz",):
                answer = server.submit(volume.id, write(tmp_path / f"label{suffix}", array, affine))
                detail = refused(answer, volume.id, word, status=422)
                assert "label.n" not in detail, "the name of a temporary file means nothing to the sender"
        (tmp_path / "label.nii.gz").write_bytes(volume.label.read_bytes()[:-200])
        refused(server.submit(volume.id, tmp_path / "label.nii.gz"), volume.id, "cannot be read", status=422)
        (tmp_path / "label.png").write_bytes(b"\x89PNG")
        refused(server.submit(volume.id, tmp_path / "label.png"), ".nii.gz", status=422)
        unknown = [{"name": "liver"}, {"name": "gallbladder"}]
        refused(server.submit(volume.id, volume.label, label_info=unknown), "gallbladder", "spleen", status=422)
        assert server.objects() == before
        stored = requests.get(f"{server.url}/datastore/label", params=query, timeout=30)
        assert stored.content == volume.label.read_bytes()
    finally:
        requests.delete(f"{server.url}/datastore/label", params={"id": volume.id, "tag": "final"}, timeout=30)


def test_a_label_within_the_tolerance_is_accepted(
    server: LiveServer, volumes: dict[str, Volume], tmp_path: Path
) -> None:
    volume = volumes["permuted"]
    label = write(tmp_path / "label.nrrd", volume.truth, shifted(volume.affine, 5e-4))
    assert server.submit(volume.id, label, tag="draft").status_code == 200
    requests.delete(f"{server.url}/datastore/label", params={"id": volume.id, "tag": "draft"}, timeout=30)


def test_an_upload_does_not_replace_a_labelled_image(server: LiveServer, volumes: dict[str, Volume]) -> None:
    volume = volumes["plain_nii"]
    assert server.submit(volume.id, volume.label).status_code == 200
    before = server.objects()
    for source, status in ((volume, 200), (volumes["axial"], 409)):
        with source.image.open("rb") as file:
            answer = requests.put(
                f"{server.url}/datastore/image",
                params={"image": volume.id},
                files={"file": (source.image.name, file)},
                timeout=30,
            )
        assert answer.status_code == status
    assert server.objects() == before
    requests.delete(f"{server.url}/datastore/label", params={"id": volume.id, "tag": "final"}, timeout=30)


def test_training_without_labels(fresh: tuple[LiveServer, Path], volumes: dict[str, Volume]) -> None:
    server, _ = fresh
    # Other files' tests may have left volumes without labels here.
    before = server.objects()
    with volumes["case_0"].image.open("rb") as file:
        query, files = {"image": "case_0"}, {"file": ("case_0.nii.gz", file)}
        assert requests.put(f"{server.url}/datastore/image", params=query, files=files, timeout=30).ok
    for path in ("train/segmentation", "train/"):
        refused(requests.post(f"{server.url}/{path}", json={}, timeout=30), "at least 1", "none", status=409)
    assert requests.get(f"{server.url}/train/", timeout=30).status_code == 404, "no training must have been started"
    # Other tests need this project unchanged.
    assert requests.delete(f"{server.url}/datastore/", params={"id": "case_0"}, timeout=30).ok
    assert server.objects() == before


@pytest.mark.parametrize(
    "options",
    [
        {"steps": "many"},
        {"steps": 0},
        {"steps": 1.5},
        {"learning_rate": -1},
        {"start_from": "yesterday"},
        {"device": "quantum"},
    ],
)
def test_bad_training_options(server: LiveServer, trainings: list, options: dict[str, Any]) -> None:
    before = requests.get(f"{server.url}/train/", timeout=30).json()["id"]
    answer = requests.post(f"{server.url}/train/segmentation", json=options, timeout=30)
    refused(answer, next(iter(options)), status=400)
    assert requests.get(f"{server.url}/train/", timeout=30).json()["id"] == before


def test_model_files_cannot_be_overwritten_over_http(server: LiveServer, trainings: list) -> None:
    files = {"file": ("segmentation.safetensors", b"nonsense")}
    refused(requests.put(f"{server.url}/model/segmentation", files=files, timeout=30), status=405)
    refused(requests.delete(f"{server.url}/model/segmentation", timeout=30), status=405)
    assert server.infer("axial").status_code == 200


def test_nothing_of_this_was_a_server_error(server: LiveServer) -> None:
    """Last in this file: the whole log so far."""
    log = server.log.read_text()
    assert CONF["labels"] in log
    assert "Exception in ASGI application" not in log
