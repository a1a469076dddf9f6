"""Volumes whose header points to another file are refused everywhere, and nothing of that file is shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import requests
from attacks import refusal, scan, tree
from live import CONF, LiveServer, serve_command, wait_for

# One byte for each voxel of the scan, and numbers that a message would print as label values.
SIZE = (12, 10, 8)
SECRET = bytes(range(101, 121)) * 48
SHOWN = ("101", "102", "103", "efg")


def mha(decoy: Path, *, skip: int = 0) -> bytes:
    lines = ["ObjectType = Image", "NDims = 3", "DimSize = 12 10 8", "ElementType = MET_UCHAR", f"HeaderSize = {skip}"]
    return "\n".join([*lines, f"ElementDataFile = {decoy}", ""]).encode()


def nrrd(decoy: Path) -> bytes:
    lines = [
        "NRRD0004",
        "type: uchar",
        "dimension: 3",
        "sizes: 12 10 8",
        "encoding: raw",
        f"data file: {decoy}",
        "",
        "",
    ]
    return "\n".join(lines).encode()


POINTERS: dict[str, Callable[[Path], bytes]] = {
    "whole.mha": mha,
    "list.mha": lambda decoy: mha(Path(f"LIST\n{decoy}")),
    "part.mha": lambda decoy: mha(decoy, skip=7),
    "inside.mha": lambda decoy: mha(Path("LOCAL"), skip=-1) + bytes(3),
    "detached.nrrd": nrrd,
    "detached.seg.nrrd": nrrd,
    "list.nrrd": lambda decoy: nrrd(Path(f"LIST\n{decoy}")),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("foreign")
    (base / "studies").mkdir()
    (base / "decoy.raw").write_bytes(SECRET)
    scan(base / "studies" / "one.nii.gz", *SIZE)
    return base


@pytest.fixture(scope="module")
def server(start_here: Callable[..., LiveServer], folder: Path) -> LiveServer:
    return start_here(folder / "studies", CONF, serve_command)


@pytest.mark.parametrize("name", POINTERS)
def test_uploads_that_point_elsewhere(server: LiveServer, folder: Path, name: str) -> None:
    before = tree(folder / "studies" / "labels") if (folder / "studies" / "labels").is_dir() else {}
    sent = (name, POINTERS[name](folder / "decoy.raw"))
    params = {"params": (None, json.dumps({"label_info": [{"name": "liver", "idx": 1}]}))}
    answers = [
        requests.put(f"{server.url}/datastore/label?image=one", files={"label": sent, **params}, timeout=60),
        requests.post(f"{server.url}/infer/edit?image=one", files={"label": sent, "params": (None, "{}")}, timeout=60),
    ]
    if not name.endswith(".seg.nrrd"):
        answers += [
            requests.put(f"{server.url}/datastore/image?image=two", files={"file": sent}, timeout=60),
            requests.put(f"{server.url}/session/", files={"files": sent}, timeout=60),
            requests.post(f"{server.url}/infer/segmentation", files={"file": sent}, timeout=60),
        ]
    for answer in answers:
        detail = refusal(answer, 422)
        assert not any(text in detail for text in (*SHOWN, "decoy")), detail
    after = tree(folder / "studies" / "labels") if (folder / "studies" / "labels").is_dir() else {}
    assert after == before
    assert "two" not in server.objects()


@pytest.mark.parametrize("name", [name for name in POINTERS if not name.endswith(".seg.nrrd")])
def test_scans_among_the_studies_that_point_elsewhere(server: LiveServer, folder: Path, name: str) -> None:
    path = folder / "studies" / f"found_{name}"
    path.write_bytes(POINTERS[name](folder / "decoy.raw"))
    image = path.name.rsplit(".", 1)[0]
    try:
        wait_for(lambda: image in server.objects(), f"{image} came into the index")
        detail = refusal(server.infer(image), 422)
        assert not any(text in detail for text in SHOWN), detail
    finally:
        path.unlink()
        wait_for(lambda: image not in server.objects(), f"{image} left the index")


def test_nothing_of_the_decoy_was_logged_or_kept(server: LiveServer, folder: Path) -> None:
    assert (folder / "decoy.raw").read_bytes() == SECRET
    log = server.log.read_text(errors="replace")
    assert not any(text in log for text in ("holds the values 101", "efghij"))
    kept = [path for path in (folder / "studies").rglob("*") if path.is_file() and SECRET[:20] in path.read_bytes()]
    assert kept == []
