"""Damaged model files, before a start or under a running server: the last good model answers, with a warning."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests
from live import APP, LiveServer, Volume, publish_untrained, serve_command, stock_command

from deformux_label.lib.configs.project import Project

# With weights that know the labels, which must never answer in place of a version without a word.
CONF = {"pretrained": "hippocampus", "spacing": "2,2,2", "patch_size": "32,32,32"}
IMAGE = "axial"


def project_of(volumes: dict[str, Volume], folder: Path) -> tuple[Path, Path]:
    """Return studies with one scan and two published versions, and the folder of the versions."""
    studies = folder / "studies"
    studies.mkdir()
    shutil.copy(volumes[IMAGE].image, studies)
    assert [publish_untrained(studies, CONF), publish_untrained(studies, CONF)] == ["v0001", "v0002"]
    return studies, Project.from_conf(CONF).state_folder(APP, str(studies)) / "versions"


def truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flipped(data: bytes) -> bytes:
    return data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]


def emptied(_: bytes) -> bytes:
    return b""


def missing(_: bytes) -> None:
    return None


Damage = Callable[[bytes], bytes | None]


@pytest.fixture(scope="module")
def running(
    start_here: Callable[..., LiveServer], volumes: dict[str, Volume], tmp_path_factory: pytest.TempPathFactory
) -> tuple[LiveServer, Path]:
    studies, versions = project_of(volumes, tmp_path_factory.mktemp("damaged"))
    return start_here(studies, CONF, serve_command), versions


def asked(server: LiveServer, model: str = "segmentation") -> dict[str, Any]:
    answer = server.infer(IMAGE, model=model, query={"output": "json"})
    assert answer.status_code == 200, answer.text
    return answer.json()


def warnings_of(server: LiveServer) -> list[str]:
    return requests.get(f"{server.url}/info/", timeout=60).json().get("warnings", [])


@pytest.mark.parametrize(
    ("files", "damage", "version", "words"),
    [
        (["v0002.safetensors"], truncated, "v0001", "v0002.safetensors"),
        (["v0002.safetensors"], flipped, "v0001", "v0002.safetensors is damaged: its checksum"),
        (["v0002.safetensors"], missing, "v0001", "the weights of v0002, v0002.safetensors, are missing"),
        (["v0002.json"], truncated, "v0001", "v0002.json is not a model card"),
        (["v0002.json"], missing, "v0001", "needs its card v0002.json"),
        (["v0001.json"], emptied, "v0002", "v0001.json is not a model card"),
        (["publications.json"], truncated, "v0002", "publications.json is damaged"),
        (["publications.json"], missing, "v0002", "publications.json is missing; its copy"),
        (["publications.json", "publications.copy.json"], missing, "v0002", "it is no longer known which"),
        (["publications.json", "publications.copy.json"], emptied, "v0002", "it is no longer known which"),
        (["v0001.safetensors", "v0002.safetensors"], flipped, "pretrained-hippocampus", "the pretrained model"),
    ],
)
def test_damage_under_a_running_server(
    running: tuple[LiveServer, Path], files: list[str], damage: Damage, version: str, words: str
) -> None:
    server, folder = running
    before = {name: (folder / name).read_bytes() for name in files}
    assert asked(server)["model_version"] == "v0002"
    assert not any("version" in text for text in warnings_of(server))
    try:
        for name, data in before.items():
            changed = damage(data)
            if changed is None:
                (folder / name).unlink()
            else:
                (folder / name).write_bytes(changed)
        for model in ("segmentation", "edit"):
            params = asked(server, model)
            assert params["model_version"] == version
            if version != "v0002" or "not known" in words:
                assert words in params["warning"]
        warnings = warnings_of(server)
        assert any(words in text for text in warnings), warnings
        assert not any(str(folder) in text for text in warnings), "any client may see it"
        assert words in server.log.read_text()
        listed = requests.get(f"{server.url}/deformux/versions", timeout=60)
        assert listed.status_code == 200, listed.text
        reply = listed.json()
        damaged = {name.split(".")[0] for name in files if name.startswith("v")}
        assert set(reply["damaged"]) == damaged
        assert {"v0001", "v0002"} - damaged <= {info["name"] for info in reply["versions"]}
        for name in ("v0001", "v0002"):
            status = requests.get(f"{server.url}/deformux/versions/{name}", timeout=60).status_code
            assert status in ((200, 404, 409) if name in damaged else (200,))
            if name in damaged:
                status = requests.post(f"{server.url}/deformux/versions/{name}/publish", timeout=60).status_code
                assert status in (404, 409)
    finally:
        for name, data in before.items():
            (folder / name).write_bytes(data)
    # Restored from a backup, it is served again without a restart.
    assert asked(server)["model_version"] == "v0002"
    assert not any("version" in text for text in warnings_of(server))


def test_a_start_with_damaged_files(
    start_here: Callable[..., LiveServer], volumes: dict[str, Volume], tmp_path: Path
) -> None:
    studies, versions = project_of(volumes, tmp_path)
    weights, record = versions / "v0002.safetensors", versions / "publications.json"
    weights.write_bytes(flipped(weights.read_bytes()))
    record.write_bytes(truncated(record.read_bytes()))
    state = versions.parent
    garbage = ("assignment.json", "validation_scores.json", "label_facts.json", "training/run.json")
    for name in (*garbage, "selection/v0001.json", "selection/v0001.safetensors", "versions/v0003.json"):
        (state / name).parent.mkdir(exist_ok=True)
        (state / name).write_bytes(b"\xff\x00{")
    server = start_here(studies, CONF, stock_command)
    params = asked(server)
    assert params["model_version"] == "v0001"
    assert "version v0002 is published but cannot be served" in params["warning"]
    warnings = " ".join(warnings_of(server))
    assert "publications.json is damaged" in warnings
    assert "v0001, published before it, is served instead" in warnings
    for strategy in ("random", "adaptive"):
        answer = requests.post(f"{server.url}/activelearning/{strategy}", json={}, timeout=60)
        assert answer.status_code == 200, answer.text
    # The next change writes the record again, and the damaged one is kept.
    answer = requests.post(f"{server.url}/deformux/versions/v0001/publish", timeout=60)
    assert answer.json()["published"] == "v0001"
    assert (versions / "publications.damaged.json").exists()
    assert not any("publications.json" in text for text in warnings_of(server))
