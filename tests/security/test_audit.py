"""The audit log of a running server."""

from __future__ import annotations

import getpass
import json
import os
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
from live import (
    APP,
    CONF,
    LiveServer,
    Volume,
    project_of,
    publish_untrained,
    remove_state,
    serve_command,
    stock_command,
    write_volume,
)
from logged_in import bearer, log_in, password
from typer.testing import CliRunner

from deformux_label.cli.main import app
from deformux_label.web.audit import AUDITED
from deformux_label.web.route_roles import OFFERED
from deformux_label.web.users import Users

# They change nothing that outlives the request, or the app itself records the change.
_NOT_RECORDED = {"/infer/segmentation", "/infer/{model}"}
_NOT_RECORDED |= {"/auth/token", "/auth/login", "/auth/logout"}


def test_every_change_is_recorded() -> None:
    offered = {(method, route.path) for route in OFFERED for method in route.methods}
    assert set(AUDITED) <= offered
    changes = {(method, path) for method, path in offered if method not in ("GET", "HEAD")}
    assert {path for _, path in changes - set(AUDITED)} == _NOT_RECORDED


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Volume]:
    """One scan for each test that submits a label."""
    root = tmp_path_factory.mktemp("audited")
    names = (f"case_{number}.nii.gz" for number in range(1, 4))
    return [write_volume(root / "studies" / name, root / "truth" / name, spacing=(4, 4, 4)) for name in names]


@pytest.fixture(scope="module")
def case(cases: list[Volume]) -> Volume:
    return cases[0]


@pytest.fixture(scope="module")
def server(case: Volume, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """Start MONAI Label's own command, open to everyone by an explicit option."""
    folder = tmp_path_factory.mktemp("server")
    conf = {**CONF, "users": str(folder / "users.json"), "insecure": "true"}
    publish_untrained(case.image.parent, conf)
    server = LiveServer(stock_command(case.image.parent, conf), folder, host="0.0.0.0")
    yield server
    server.stop()
    remove_state(case.image.parent, conf)


@dataclass(frozen=True)
class Closing:
    """A server to which a test adds users; it stays closed afterwards."""

    server: LiveServer
    users: Users
    log: Path


@pytest.fixture
def closing(volume: Volume, tmp_path: Path) -> Iterator[Closing]:
    studies, users = volume.image.parent, Users(tmp_path / "users.json")
    conf = {**CONF, "users": str(users.path)}
    server = LiveServer(serve_command(studies, conf), tmp_path)
    yield Closing(server, users, project_of(CONF).state_folder(APP, str(studies)) / "audit.jsonl")
    server.stop()
    remove_state(studies, conf)


@pytest.fixture(scope="module")
def log(case: Volume) -> Path:
    return project_of(CONF).state_folder(APP, str(case.image.parent)) / "audit.jsonl"


def lines(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def last(log: Path) -> dict[str, Any]:
    """Return the newest line, without its time."""
    return {key: value for key, value in lines(log)[-1].items() if key != "time"}


def test_the_start_is_recorded_and_warned_of(server: LiveServer, log: Path, case: Volume) -> None:
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    start = lines(log)[0]
    assert start.pop("time")
    assert start.pop("process") > 0
    assert start == {"what": "start server", "studies": str(case.image.parent.resolve()), "users": {}}
    info = requests.get(f"{server.url}/info/", timeout=30).json()
    assert "--insecure" in info["warnings"][0]
    # With a config, Slicer's extension would refuse the server.
    assert not info.get("config")
    assert "--insecure" in server.log.read_text()


def test_actions_are_recorded(server: LiveServer, log: Path, case: Volume) -> None:
    here = {"status": 200, "address": "127.0.0.1"}

    def did(method: str, path: str, expected: dict[str, Any], **more: Any) -> Any:
        before = len(lines(log))
        answer = requests.request(method, f"{server.url}{path}", timeout=60, **more)
        assert len(lines(log)) == before + 1, answer.text
        # At once: the line is written before the answer arrives.
        assert last(log) == {**here, **expected}
        return answer

    label = {"image": case.id, "tag": "final"}
    did("POST", "/activelearning/first", {"what": "lease image", "image": case.id}, json={"client_id": "eve"})
    did("DELETE", f"/deformux/leases?image={case.id}", {"what": "release image", "image": case.id, "annotator": "eve"})
    submitted = {"what": "submit label", "image": case.id, "revision": 1, "annotator": "eve"}
    data = {"params": json.dumps({"client_id": "eve"})}
    files = {"label": ("label.nii.gz", case.label.read_bytes())}
    did("PUT", f"/datastore/label?image={case.id}", submitted, data=data, files=files)
    query = f"image={case.id}&revision=1&client_id=rob"
    restored = {"what": "restore label", "image": case.id, "revision": 2, "restored_from": 1, "annotator": "rob"}
    did("POST", f"/deformux/labels/restore?{query}", restored)
    did("GET", f"/datastore/label?label={case.id}&tag=final", {"what": "download label", **label})
    did("DELETE", f"/datastore/label?id={case.id}&tag=final", {"what": "delete label", **label, "revision": 3})
    did("GET", f"/datastore/image?image={case.id}", {"what": "download image", "image": case.id})
    upload = {"file": ("second.nii.gz", case.image.read_bytes())}
    did("PUT", "/datastore/image?image=second", {"what": "upload image", "image": "second"}, files=upload)
    did("DELETE", "/datastore/image?id=second", {"what": "delete image", "image": "second"})
    did("DELETE", "/datastore/image?id=second", {"what": "delete image", "image": "second", "status": 404})
    did("POST", "/train/segmentation", {"what": "start training", "status": 409}, json={})
    did("DELETE", "/train/", {"what": "stop training"})
    for verb, what in (("publish", "publish version"), ("pin", "pin version")):
        did("POST", f"/deformux/versions/v0001/{verb}", {"what": what, "version": "v0001"})
    did("POST", "/deformux/versions/unpin", {"what": "unpin version", "version": "v0001"})
    params = {"params": (None, json.dumps({"save_label": True}))}
    stored = {"what": "store segmentation", "image": case.id, "tag": "original", "version": "v0001"}
    did("POST", f"/infer/segmentation?image={case.id}", stored, files=params)
    params = {"params": (None, json.dumps({"uncertainty": "on"}))}
    unsure = {"what": "store uncertainty map", "image": case.id, "tag": "uncertainty", "version": "v0001"}
    did("POST", f"/infer/segmentation?image={case.id}", unsure, files=params)
    upload = {"files": ("patient.nii.gz", case.image.read_bytes())}
    created = requests.put(f"{server.url}/session/", files=upload, timeout=60).json()["session_id"]
    assert last(log) == {**here, "what": "upload session image", "session": created}
    did("GET", f"/session/{created}?image=true", {"what": "download session image", "session": created})
    did("DELETE", f"/session/{created}", {"what": "delete session image", "session": created})
    did("GET", "/logs/", {"what": "read server log"})
    before = len(lines(log))
    requests.get(f"{server.url}/info/", timeout=30)
    requests.post(f"{server.url}/infer/segmentation?image={case.id}", files={"params": (None, "{}")}, timeout=60)
    assert len(lines(log)) == before, "nothing was changed"


@pytest.mark.parametrize(
    ("method", "query"),
    [
        ("DELETE", "/datastore/image?id=a&id=b"),
        ("DELETE", "/datastore/image?id=a&%69d=b"),
        ("POST", "/deformux/labels/restore?image=a&image=b&revision=5&revision=1"),
        ("GET", "/datastore/label?label=..&tag=original&tag=final&revision=77"),
        ("GET", "/datastore/image?image=&image=case_1"),
        ("POST", "/auth/logout?a=1&a="),
    ],
)
def test_a_repeated_parameter_is_refused(server: LiveServer, log: Path, method: str, query: str) -> None:
    before = len(lines(log))
    answer = requests.request(method, f"{server.url}{query}", timeout=30, allow_redirects=False)
    assert answer.status_code == 400
    assert "more than once" in answer.json()["detail"]
    assert len(lines(log)) == before


@pytest.mark.parametrize(
    ("method", "query", "expected"),
    [
        ("DELETE", "/datastore/label?id=a&tag=final&image=c", {"image": "a", "tag": "final"}),
        ("DELETE", "/datastore/image?id=a&image=c&label=d&tag=final&revision=7", {"image": "a"}),
        ("GET", "/datastore/label?label=a&tag=final&image=c&id=d", {"image": "a", "tag": "final"}),
        ("GET", "/datastore/image?image=a&label=c&tag=final", {"image": "a"}),
        ("PUT", "/datastore/label/info?label=a&tag=final&image=c", {"image": "a", "tag": "final"}),
        ("DELETE", "/deformux/leases?image=a&id=c", {"image": "a"}),
        ("POST", "/deformux/labels/restore?image=a&revision=5&label=c", {"image": "a", "revision": "5"}),
        ("DELETE", "/train/?image=c", {}),
    ],
)
def test_only_parameters_that_the_endpoint_reads_are_recorded(
    server: LiveServer, log: Path, method: str, query: str, expected: dict[str, str]
) -> None:
    before = len(lines(log))
    requests.request(method, f"{server.url}{query}", timeout=60)
    assert len(lines(log)) == before + 1
    line = last(log)
    assert {key: line[key] for key in ("image", "tag", "revision") if key in line} == expected


def test_the_log_knows_each_routes_own_parameters(server: LiveServer) -> None:
    paths = requests.get(f"{server.url}/openapi.json", timeout=30).json()["paths"]
    seen = 0
    for (method, path), act in AUDITED.items():
        operation = paths.get(path, {}).get(method.lower())
        if operation is None:
            continue
        declared = {item["name"] for item in operation.get("parameters", ()) if item["in"] == "query"}
        read = {name for name in (act.image, *act.more) if name is not None}
        assert read == declared & {"image", "id", "label", "tag", "revision"}, (method, path)
        seen += bool(read)
    assert seen >= 10


@pytest.mark.parametrize("name", ["x" * 5_000, "%ed%a0%80", "a%0a%7b%22what%22:1%7d", "%1b[2J", "../../secret", "%00"])
def test_no_value_breaks_a_line(server: LiveServer, log: Path, name: str) -> None:
    before = lines(log)
    requests.delete(f"{server.url}/datastore/image?id={name}", timeout=30)
    after = lines(log)
    # Refusals of the perimeter are not recorded.
    assert before == after[: len(before)]
    assert [line["what"] for line in after[len(before) :]] in ([], ["delete image"])
    assert log.read_bytes().isascii()
    assert len(log.read_text().splitlines()[-1]) < 1_000
    json.dumps(after[-1], ensure_ascii=False).encode()
    shown = CliRunner().invoke(app, ["audit", "--state", str(log.parent)])
    assert shown.exit_code == 0
    assert "\x1b[2J" not in shown.output


@pytest.mark.usefixtures("unwatched")
def test_restoring_by_commands_is_recorded(server: LiveServer, log: Path, cases: list[Volume]) -> None:
    case, studies = cases[1], cases[1].image.parent
    who = {"user": getpass.getuser(), "address": "command line"}

    def did(arguments: list[str], expected: dict[str, Any]) -> None:
        before = len(lines(log))
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        assert len(lines(log)) == before + 1
        assert last(log) == {**who, **expected}

    assert server.submit(case.id, case.label).ok
    with case.image.open("rb") as file:
        upload = {"file": ("third.nii.gz", file)}
        assert requests.put(f"{server.url}/datastore/image?image=third", files=upload, timeout=60).ok
    assert requests.delete(f"{server.url}/datastore/image?id=third", timeout=60).ok
    restored = {"what": "restore label", "image": case.id, "tag": "final", "restored_from": 1, "revision": 2}
    did(
        ["labels", "restore", "--studies", str(studies), case.id, "1"],
        {**restored, "annotator": getpass.getuser()},
    )
    trash = sorted(entry.name for entry in (studies / ".deformux" / "trash").iterdir() if "third" in entry.name)
    back = {"what": "restore from trash", "image": "third", "trash": trash[0]}
    did(["studies", "restore", "--studies", str(studies), trash[0]], back)
    before = lines(log)
    for refused in (["labels", "restore", case.id, "99"], ["studies", "restore", "none"]):
        assert CliRunner().invoke(app, [*refused, "--studies", str(studies)]).exit_code == 2
    assert lines(log) == before
    assert not (studies / ".deformux" / "audit.jsonl").exists()
    # Another test relies on a training without labels being refused.
    assert requests.delete(f"{server.url}/datastore/label?id={case.id}&tag=final", timeout=60).ok


def test_the_command_finds_the_log_by_the_studies(
    server: LiveServer, log: Path, cases: list[Volume], tmp_path: Path
) -> None:
    case = cases[2]
    assert server.submit(case.id, case.label).ok
    assert requests.delete(f"{server.url}/datastore/label?id={case.id}&tag=final", timeout=60).ok
    found = CliRunner().invoke(app, ["audit", "--studies", str(case.image.parent), "--json"])
    assert [json.loads(line) for line in found.output.splitlines()] == lines(log)
    table = CliRunner().invoke(app, ["audit", "--state", str(log.parent)]).output
    assert len(table.splitlines()) == len(lines(log)) + 1
    assert "submit label" in table
    for arguments in ([], ["--studies", str(tmp_path)], ["--state", str(tmp_path)], ["--state", "a", "--studies", "b"]):
        refused = CliRunner().invoke(app, ["audit", *arguments])
        assert refused.exit_code == 2
        assert refused.output.count("\n") == 1


def test_a_first_user_closes_a_running_server(closing: Closing) -> None:
    server, users, log = closing.server, closing.users, closing.log

    def auth() -> bool:
        return requests.get(f"{server.url}/auth/", timeout=30).json()["enabled"]

    def info(**headers: str) -> int:
        return requests.get(f"{server.url}/info/", headers=headers, timeout=30).status_code

    def users_command(*arguments: str, stdin: str | None = None) -> None:
        result = CliRunner().invoke(app, ["users", *arguments, "--users", str(users.path)], input=stdin)
        assert result.exit_code == 0, result.output

    assert not auth()
    assert info(Authorization="bearer x") == 200
    # The answer of MONAI Label without a login.
    assert log_in(server, "anna").json() == {"access_token": None, "token_type": None}
    users_command("add", "anna", "--role", "annotator", "--password-stdin", stdin=f"{password('anna')}\n")
    assert info() == 401
    assert auth()
    assert log_in(server, "anna", "a wrong one").status_code == 401
    token = log_in(server, "anna").json()["access_token"]
    headers = bearer(token)
    assert requests.delete(f"{server.url}/datastore/image?id=scan", headers=headers, timeout=30).status_code == 403
    users_command("role", "anna", "reviewer")
    assert info(**headers) == 401
    users_command("remove", "anna")
    assert info(**headers) == 401
    seen = [{key: value for key, value in line.items() if key != "time"} for line in lines(log)]
    who = {"user": "anna", "address": "127.0.0.1"}
    assert seen[-6:] == [
        {"what": "users changed", "added": {"anna": "annotator"}},
        {"what": "log in", "status": 401, **who},
        {"what": "log in", "status": 200, **who, "role": "annotator"},
        {"what": "delete image", "status": 403, **who, "role": "annotator", "image": "scan"},
        {"what": "users changed", "roles": {"anna": "reviewer"}},
        {"what": "users changed", "removed": ["anna"]},
    ]
    assert password("anna") not in log.read_text()
    assert token not in log.read_text()
    commands = CliRunner().invoke(app, ["audit", "--users", str(users.path), "--json"]).output.splitlines()
    assert [json.loads(line)["what"] for line in commands] == ["add user", "change role", "remove user"]


def test_a_stranger_adds_nothing(closing: Closing) -> None:
    server, users, log = closing.server, closing.users, closing.log

    def post(path: str, status: int, **more: Any) -> None:
        answer = requests.post(f"{server.url}{path}", timeout=30, allow_redirects=False, **more)
        assert answer.status_code == status, answer.text

    users.add("mia", "reader", password("mia"))
    mia = log_in(server, "mia").json()["access_token"]
    before = lines(log)
    assert before[-1]["what"] == "log in"
    emoji = {"image": "\U0001f600" * 200, "tag": "\U0001f600" * 200}
    for headers in ({}, bearer("forged"), {"Cookie": "deformux-label=forged"}):
        post("/auth/logout", 303, params=emoji, headers=headers)
    post("/auth/token?image=c1", 422)
    post("/auth/token?image=c1", 422, data={"username": "mia"})
    post("/auth/token?image=c1", 422, json={"username": "mia", "password": "x" * 8})
    post("/auth/token?image=c1", 422, data={"username": "x" * 5_000, "password": "x" * 8})
    post("/auth/login?image=c1", 422, data={"password": "x" * 8})
    post("/auth/login?image=c1", 400, data=b"x", headers={"Content-Type": "multipart/form-data; boundary="})
    page = {"Accept": "text/html"}
    for headers in (page, bearer("forged"), {**page, **bearer("forged")}):
        answer = requests.get(
            f"{server.url}/datastore/image", params=emoji, headers=headers, timeout=30, allow_redirects=False
        )
        assert answer.status_code in (303, 401)
    kept = users.path.read_bytes()
    try:
        for damaged in (b"{", b"[" * 100_000, kept.replace(b"$12$", b"$99$")):
            users.path.write_bytes(damaged)
            refused = requests.delete(f"{server.url}/datastore/image?id=a", headers=bearer(mia), timeout=30)
            assert refused.status_code == 503
            assert log_in(server, "mia").status_code == 503
    finally:
        users.path.write_bytes(kept)
    assert lines(log) == before
    # A caller with a token is recorded once, without the query.
    for _ in range(3):
        post("/auth/logout?image=c1&tag=final&revision=1", 303, headers=bearer(mia))
    assert len(lines(log)) == len(before) + 1
    here = {"status": 303, "address": "127.0.0.1"}
    assert last(log) == {**here, "what": "log out", "user": "mia", "role": "reader"}


def test_the_end_is_recorded(tmp_path: Path) -> None:
    studies = tmp_path / "studies"
    studies.mkdir()
    conf = {**CONF, "users": str(tmp_path / "users.json")}
    log = project_of(CONF).state_folder(APP, str(studies)) / "audit.jsonl"
    server = LiveServer(stock_command(studies, conf), tmp_path)
    try:
        _check_the_end(server, log)
    finally:
        server.stop()
        remove_state(studies, conf)


def _check_the_end(server: LiveServer, log: Path) -> None:
    os.kill(server.process.pid, signal.SIGTERM)
    # The command is a shell script that waits for the server.
    children = subprocess.run(["pgrep", "-g", str(server.process.pid)], capture_output=True, text=True, check=False)
    for child in children.stdout.split():
        os.kill(int(child), signal.SIGTERM)
    end = time.monotonic() + 60
    while last(log)["what"] != "stop server" and time.monotonic() < end:
        time.sleep(0.1)
    assert last(log)["signal"] == "SIGTERM"
