"""The server over https, with a certificate of the test's own."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import requests
from attacks import closed, connected, process_of
from live import CONF, LiveServer, Volume, publish_untrained, remove_state, serve_command, write_volume
from logged_in import client_like_the_plugins, log_in, make_users, password
from requests.adapters import HTTPAdapter
from typer.testing import CliRunner

from deformux_label.cli.main import app


def make_certificate(folder: Path, name: str, *more: str) -> tuple[Path, Path]:
    certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-days", "2", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command, *(more or ("-nodes",))], check=True, capture_output=True)
    return certificate, key


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tls")


@pytest.fixture(scope="module")
def pair(folder: Path) -> tuple[Path, Path]:
    return make_certificate(folder, "server")


@pytest.fixture(scope="module")
def case(folder: Path) -> Volume:
    return write_volume(folder / "studies" / "case_1.nii.gz", folder / "truth" / "case_1.nii.gz", spacing=(4, 4, 4))


@pytest.fixture(scope="module")
def server(folder: Path, case: Volume, pair: tuple[Path, Path]) -> Iterator[LiveServer]:
    users = make_users(folder / "users.json")
    conf = {**CONF, "users": str(users.path)}
    publish_untrained(case.image.parent, conf)
    options = {**conf, "ssl_cert": str(pair[0]), "ssl_key": str(pair[1])}
    server = LiveServer(serve_command(case.image.parent, options), folder, scheme="https", host="0.0.0.0")
    yield server
    server.stop()
    remove_state(case.image.parent, conf)


def test_the_stock_client_over_https(
    server: LiveServer,
    case: Volume,
    pair: tuple[Path, Path],
    slicer_client: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The extension does not check certificates, but for create_session, which goes by requests' own rules.
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(pair[0]))
    token = client_like_the_plugins(slicer_client, server, tmp_path, None).auth_token("anna", password("anna"))

    def client() -> object:
        return client_like_the_plugins(slicer_client, server, tmp_path, token)

    assert "warnings" not in client().info(), "an encrypted server with users has nothing to warn of"
    sample = client().next_sample("first", {})
    assert sample["id"] == case.id
    file, _ = client().infer("segmentation", case.id, {"result_extension": ".nrrd"})
    assert Path(file).stat().st_size > 0
    info = {"label_info": [{"name": name, "idx": number} for number, name in enumerate(("liver", "spleen"), 1)]}
    assert client().save_label(case.id, str(case.label), "final", info)["image"] == case.id
    session = client().create_session(str(case.image))["session_id"]
    client().remove_session(session)
    assert "https://0.0.0.0" in server.log.read_text()
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{server.url.replace('https', 'http')}/auth/", timeout=30)


def test_the_cookie_is_only_sent_over_https(server: LiveServer, pair: tuple[Path, Path]) -> None:
    form = {"username": "anna", "password": password("anna")}
    answer = requests.post(
        f"{server.url}/auth/login", data=form, timeout=30, verify=str(pair[0]), allow_redirects=False
    )
    assert answer.status_code == 303
    assert "; Secure" in answer.headers["Set-Cookie"]
    assert log_in(server, "anna").status_code == 200


def test_connections_without_a_handshake_are_bounded(server: LiveServer, pair: tuple[Path, Path]) -> None:
    process = process_of(server)
    before = process.num_fds()
    silent = [connected(server, b"") for _ in range(600)]
    try:
        # Connections beyond the limit of an address are refused at once; another address is answered.
        assert closed(silent, 3) >= 340
        assert process.num_fds() < before + 270
        here = {"timeout": 10, "verify": str(pair[0])}
        with requests.Session() as session:
            session.mount("https://", From("127.0.0.2"))
            assert session.get(f"{server.url}/auth/", **here).json()["enabled"]
        # Accepted connections are dropped when they stay silent.
        assert closed(silent, 30) == len(silent)
    finally:
        for connection in silent:
            connection.close()
    assert requests.get(f"{server.url}/auth/", **here).ok
    assert server.log.read_text().count("are refused") < 5


class From(HTTPAdapter):
    """Calls from an address of this machine."""

    def __init__(self, address: str) -> None:
        self._address = address
        super().__init__()

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, source_address=(self._address, 0), **options)


def test_invalid_certificate_files_end_the_start(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    certificate, key = map(str, pair)
    other = str(make_certificate(tmp_path, "other")[1])
    locked = make_certificate(tmp_path, "locked", "-passout", "pass:secret")
    (tmp_path / "text").write_text("no certificate")
    text = str(tmp_path / "text")
    for given, words in (
        ([certificate, ""], "both --ssl-cert and --ssl-key"),
        (["", key], "both --ssl-cert and --ssl-key"),
        ([str(tmp_path / "none"), key], "cannot be read"),
        ([certificate, str(tmp_path)], "cannot be read"),
        ([certificate, other], "mismatch"),
        ([text, key], "PEM"),
        ([certificate, text], "PEM"),
        ([str(locked[0]), str(locked[1])], "passphrase"),
    ):
        arguments = [part for option, value in zip(("--ssl-cert", "--ssl-key"), given, strict=True) if value
                     for part in (option, value)]  # fmt: skip
        result = CliRunner().invoke(app, [*serve_command(tmp_path, CONF)[1:], *arguments])
        assert result.exit_code == 2, result.output
        assert result.output.startswith("deformux-label: ")
        assert result.output.count("\n") == 1
        assert words in result.output, (given, result.output)
