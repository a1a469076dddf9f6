"""Uploads: one volume each, in a folder that ends with its request; sessions trust nothing that they read."""

from __future__ import annotations

import functools
import io
import json
import shutil
import signal
import socket
import tarfile
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import nibabel as nib
import numpy as np
import pytest
import requests
from attacks import children, refusal, scan, tree
from live import CONF, WAYS, LiveServer, serve_command, stock_command, wait_for


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Studies, a temporary folder for this file's servers, and a canary next to them."""
    base = tmp_path_factory.mktemp("uploads")
    made = {name: base / name for name in ("studies", "temporary", "canary")}
    for folder in made.values():
        folder.mkdir()
    for name in ("one", "two"):
        scan(made["studies"] / f"{name}.nii.gz")
    (made["canary"] / "main.py").write_text("untouched\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(made["temporary"]))
        yield made


@pytest.fixture(scope="module")
def started(start_here: Callable[..., LiveServer], folders: dict[str, Path]) -> Callable[[str], LiveServer]:
    """Start a server on these folders in one of two ways: once each, in whatever order tests ask for them."""
    return functools.cache(lambda way: start_here(folders["studies"], CONF, WAYS[way]))


@pytest.fixture(params=WAYS)
def uploading(started: Callable[[str], LiveServer], request: pytest.FixtureRequest) -> LiveServer:
    """A server on these folders, started in each of the two ways."""
    return started(request.param)


@pytest.fixture(autouse=True)
def _leaves_nothing(folders: dict[str, Path]) -> Iterator[None]:
    """Check after each test that the canary is unchanged, and that no file of a request is left."""
    before = tree(folders["canary"])
    yield
    assert tree(folders["canary"]) == before
    # The folder of a request is removed after its last byte was sent.
    wait_for(lambda: not left(folders), "the folders of the requests went")


def left(folders: dict[str, Path]) -> list[str]:
    """Return everything in the temporary folder except the folders of servers and their locks."""
    return [name for name in children(folders["temporary"]) if "/" in name]


def archive(kind: str, canary: Path) -> bytes:
    """Return an archive with members outside: absolute, above, and through a link."""
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr(str(canary / "main.py"), "overwritten")
            file.writestr(f"../../../../..{canary}/main.py", "overwritten")
        return buffer.getvalue()
    with tarfile.open(fileobj=buffer, mode="w:gz" if kind == "tar.gz" else "w") as file:
        for name in (str(canary / "main.py"), f"../../../../..{canary}/main.py", "link/main.py"):
            if name.startswith("link"):
                link = tarfile.TarInfo("link")
                link.type, link.linkname = tarfile.SYMTYPE, str(canary)
                file.addfile(link)
            member = tarfile.TarInfo(name)
            member.size = len(b"overwritten")
            file.addfile(member, io.BytesIO(b"overwritten"))
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip"])
@pytest.mark.parametrize("query", [{"uncompress": "true"}, {}])
def test_archives_are_never_unpacked(
    uploading: LiveServer, folders: dict[str, Path], kind: str, query: dict[str, str]
) -> None:
    data = archive(kind, folders["canary"])
    for name in (f"scan.{kind}", "scan.nii.gz", f"scan.nii.{kind}"):
        answer = requests.put(f"{uploading.url}/session/", params=query, files={"files": (name, data)}, timeout=30)
        refusal(answer, 400 if query else 422)
    assert (folders["canary"] / "main.py").read_text() == "untouched\n"


def test_a_session_is_one_volume_and_nothing_else(uploading: LiveServer, folders: dict[str, Path]) -> None:
    volume = (folders["studies"] / "one.nii.gz").read_bytes()
    meta = json.dumps({"name": "x", "path": "/", "image": str(folders["canary"] / "main.py"), "expiry": 9999}).encode()
    for files in (
        [("meta.info", meta)],
        [("scan.nii.gz", volume), ("meta.info", meta)],
        [("scan.nii.gz", volume), ("scan.nii.gz", volume)],
        [("main.py", volume)],
        [("scan.nii.gz", b"")],
        [("scan.nii.gz", meta)],
        [("scan.nii.gz/../../main.py", volume)],
        [("", volume)],
    ):
        answer = requests.put(f"{uploading.url}/session/", files=[("files", file) for file in files], timeout=30)
        refusal(answer, 422)
    refusal(requests.put(f"{uploading.url}/session/", files={"other": ("a.nii", volume)}, timeout=30), 422)


def test_only_the_suffix_of_a_file_name_is_used(uploading: LiveServer, folders: dict[str, Path]) -> None:
    volume = (folders["studies"] / "one.nii.gz").read_bytes()
    for name in (str(folders["canary"] / "new.nii.gz"), "../../../new.NII.GZ", "x" * 300 + ".nii.gz", "a\\b.Nii.Gz"):
        answer = requests.put(f"{uploading.url}/session/", files={"files": (name, volume)}, timeout=30)
        assert answer.status_code == 200, answer.text
        session = answer.json()["session_id"]
        assert "/" not in answer.json()["session_info"]["image"]
        back = requests.get(f"{uploading.url}/session/{session}", params={"image": "true"}, timeout=30)
        assert back.content == volume
        assert requests.delete(f"{uploading.url}/session/{session}", timeout=30).ok


def test_a_planted_session_is_not_trusted(uploading: LiveServer, folders: dict[str, Path], tmp_path: Path) -> None:
    """Write access to the folder of sessions must not allow fetching any file."""
    sessions = uploading.log.parent / "sessions"
    secret = folders["canary"] / "main.py"
    planted = []
    for parent in (sessions, *sessions.iterdir()):
        name = str(uuid.uuid4())
        (parent / name).mkdir()
        info = {"name": name, "path": str(parent / name), "image": str(secret), "expiry": 9999, "last_access_ts": 9e9}
        (parent / name / "meta.info").write_text(json.dumps(info))
        planted.append(parent / name)
    try:
        for folder in planted:
            url = f"{uploading.url}/session/{folder.name}"
            for answer in (requests.get(url, params={"image": "true"}, timeout=30), requests.delete(url, timeout=30)):
                refusal(answer, 404)
                assert "untouched" not in answer.text
            answer = uploading.infer("", query={"session_id": folder.name})
            refusal(answer, 404)
            assert folder.is_dir()
    finally:
        for folder in planted:
            shutil.rmtree(folder)
    for name in ("x", "." * 36, "0" * 36, str(uuid.uuid4())):
        refusal(requests.get(f"{uploading.url}/session/{name}", params={"image": "true"}, timeout=30), 404)
    for name in ("..", "x", "../sessions", "." * 36, str(uuid.uuid4())):
        refusal(uploading.infer("", query={"session_id": name}), 404)


def test_the_stock_client_works(uploading: LiveServer, folders: dict[str, Path], slicer_client: ModuleType) -> None:
    def client() -> Any:
        return slicer_client.MONAILabelClient(uploading.url, str(folders["canary"].parent), "radiologist")

    image = folders["studies"] / "one.nii.gz"
    session = client().create_session(str(image))["session_id"]
    assert client().get_session(session)["name"] == session
    result, params = client().infer("segmentation", "MRHead", {"result_extension": ".nrrd"}, session_id=session)
    assert Path(result).is_file()
    assert params["label_names"] == {"liver": 1, "spleen": 2}
    Path(result).unlink()
    client().remove_session(session)
    with pytest.raises(slicer_client.MONAILabelClientException):
        client().get_session(session)
    result, _ = client().infer("segmentation", "", {}, file=str(image))
    Path(result).unlink()


def test_sessions_expire(uploading: LiveServer, folders: dict[str, Path]) -> None:
    files = {"files": ("a.nii.gz", (folders["studies"] / "one.nii.gz").read_bytes())}
    session = requests.put(f"{uploading.url}/session/", params={"expiry": "1"}, files=files, timeout=30).json()
    time.sleep(1.5)
    refusal(requests.get(f"{uploading.url}/session/{session['session_id']}", timeout=30), 404, "expired")
    for expiry in ("-1", "9" * 30, "x"):
        refusal(requests.put(f"{uploading.url}/session/", params={"expiry": expiry}, files=files, timeout=30), 422)


def test_one_client_has_a_bounded_number_of_sessions(uploading: LiveServer, folders: dict[str, Path]) -> None:
    files = {"files": ("a.nii.gz", (folders["studies"] / "one.nii.gz").read_bytes())}
    made = [requests.put(f"{uploading.url}/session/", files=files, timeout=30).json()["session_id"] for _ in range(20)]
    held = [name for name in made if requests.get(f"{uploading.url}/session/{name}", timeout=30).ok]
    assert held == made[4:]
    for name in held:
        assert requests.delete(f"{uploading.url}/session/{name}", timeout=30).ok


def bad_uploads(folders: dict[str, Path]) -> dict[str, bytes]:
    good = (folders["studies"] / "one.nii.gz").read_bytes()
    flat = io.BytesIO()
    nib.Nifti1Image(np.full((8, 8, 8), 7, np.int16), np.eye(4)).to_file_map(
        {"image": nib.FileHolder(fileobj=flat), "header": nib.FileHolder(fileobj=flat)}
    )
    return {"truncated.nii.gz": good[: len(good) // 2], "text.nrrd": b"NRRD0004\n", "flat.nii": flat.getvalue()}


def test_refused_uploads_leave_nothing(uploading: LiveServer, folders: dict[str, Path]) -> None:
    """On each of the seven routes that take a file; ``_leaves_nothing`` looks at the temporary folder."""
    before = tree(folders["studies"])
    for name, data in bad_uploads(folders).items():
        for method, path, field in [
            ("PUT", "session/", "files"),
            ("PUT", "datastore/image?image=refused", "file"),
            ("PUT", "datastore/?image=refused", "file"),
            ("PUT", "datastore/label?image=one", "label"),
            ("POST", "infer/segmentation", "file"),
            ("POST", "infer/edit?image=one", "label"),
            ("POST", "infer/histogram+graphcut?image=one", "label"),
            ("PUT", "model/segmentation", "file"),
        ]:
            answer = requests.request(method, f"{uploading.url}/{path}", files={field: (name, data)}, timeout=60)
            assert 400 <= answer.status_code < 500 or "edit" in path, f"{path}: {answer.status_code} {answer.text}"
        assert tree(folders["studies"]) == before
    # Bad requests with a good file.
    good = {"file": ("a.nii.gz", (folders["studies"] / "one.nii.gz").read_bytes())}
    for path in ("infer/nobody", "infer/segmentation?output=dicom_seg", "infer/segmentation?output=x", "infer/edit"):
        for params in ("[1]", '{"device": "quantum"}', '{"result_extension": ".exe"}'):
            answer = requests.post(f"{uploading.url}/{path}", files={**good, "params": (None, params)}, timeout=60)
            assert 400 <= answer.status_code < 500


def test_accepted_uploads_leave_nothing_but_the_volume(uploading: LiveServer, folders: dict[str, Path]) -> None:
    image = (folders["studies"] / "one.nii.gz").read_bytes()
    for output in ("image", "json", "all"):
        answer = requests.post(
            f"{uploading.url}/infer/segmentation",
            params={"output": output},
            files={"file": ("a.nii.gz", image)},
            timeout=60,
        )
        assert answer.status_code == 200
        wait_for(lambda: not left(folders), "the result of the request went")
    answer = requests.put(
        f"{uploading.url}/datastore/image", params={"image": "added"}, files={"file": ("x.NII.GZ", image)}, timeout=60
    )
    assert answer.json() == {"image": "added"}
    assert requests.get(f"{uploading.url}/datastore/image", params={"image": "added"}, timeout=30).content == image
    assert requests.delete(f"{uploading.url}/datastore/image", params={"id": "added"}, timeout=30).ok


def test_a_client_that_disconnects_during_an_upload_leaves_nothing(
    uploading: LiveServer, folders: dict[str, Path]
) -> None:
    where = urlsplit(uploading.url)
    for method, path, field in [("PUT", "/session/", "files"), ("POST", "/infer/segmentation", "file")]:
        with socket.create_connection((where.hostname, where.port), timeout=30) as connection:
            head = f'--b\r\nContent-Disposition: form-data; name="{field}"; filename="a.nii"\r\n\r\n'.encode()
            connection.sendall(
                f"{method} {path} HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Length: 9000000\r\n"
                "Content-Type: multipart/form-data; boundary=b\r\n\r\n".encode()
                + head
                + b"\0" * 3_000_000
            )
            wait_for(lambda: left(folders), "the upload has begun")
    wait_for(lambda: not left(folders), "what had come went")


@pytest.mark.parametrize(("command", "how"), [(serve_command, signal.SIGKILL), (stock_command, signal.SIGTERM)])
def test_the_folder_ends_with_its_server_or_at_the_next_start(
    start_here: Callable[..., LiveServer],
    folders: dict[str, Path],
    tmp_path: Path,
    command: Callable[..., list[str]],
    how: int,
) -> None:
    """Patients' images must not stay in the temporary folder; those of running servers do."""
    running = set(folders["temporary"].glob("deformux-label-*"))
    # As after a machine was switched off.
    lost = folders["temporary"] / "deformux-label-lost"
    (lost / "request-left").mkdir(parents=True)
    (lost / ".in-use").touch()
    (lost / "request-left" / "upload.nii.gz").write_bytes(b"a patient")
    (lost / "link").symlink_to(folders["canary"])
    # Similar names: a link to the canary, a file, and a folder that was just made.
    decoys = [folders["temporary"] / f"deformux-label-{name}" for name in ("link", "file", "new")]
    decoys[0].symlink_to(folders["canary"])
    decoys[1].write_text("kept")
    decoys[2].mkdir()
    try:
        server = start_here(tmp_path / "studies", CONF, command)
        assert not lost.exists()
        (own,) = set(folders["temporary"].glob("deformux-label-*")) - running - set(decoys)
        (own / "request-left").mkdir()
        (own / "request-left" / "upload.nii.gz").write_bytes(b"a patient")
        server.process.send_signal(how)
        wait_for(lambda: not own.exists(), "the folder went")
        server.process.wait(30)
        assert decoys[0].is_symlink()
        assert decoys[1].read_text() == "kept"
        assert decoys[2].is_dir()
        assert all(folder.is_dir() for folder in running)
    finally:
        decoys[0].unlink()
        decoys[1].unlink()
        decoys[2].rmdir()
