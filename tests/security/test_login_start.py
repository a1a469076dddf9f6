"""Starts that are refused: on the network without a user, with a damaged users file, with the stock login."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from live import CONF, preloaded_stock_command, refused_start, serve_command
from typer.testing import CliRunner

from deformux_label.cli.main import app


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("MONAI_LABEL_AUTH_ENABLE", raising=False)
    return


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "no.such.host"])
def test_no_start_on_the_network_without_a_user(tmp_path: Path, host: str) -> None:
    result = CliRunner().invoke(app, [*serve_command(tmp_path, CONF)[1:], "--host", host])
    assert result.exit_code == 2
    assert result.output.count("\n") == 1
    for word in ("deformux-label users add", "--insecure", "127.0.0.1", str(tmp_path / "config")):
        assert word in result.output


@pytest.mark.usefixtures("clean")
def test_no_start_with_a_damaged_users_file_or_the_stock_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "users.json").write_text("{")
    (tmp_path / "users.json").chmod(0o600)
    result = CliRunner().invoke(app, [*serve_command(tmp_path, CONF)[1:], "--users", str(tmp_path / "users.json")])
    assert result.exit_code == 2
    assert "is damaged" in result.output
    assert result.output.count("\n") == 1
    monkeypatch.setenv("MONAI_LABEL_AUTH_ENABLE", "true")
    result = CliRunner().invoke(app, serve_command(tmp_path, CONF)[1:])
    assert result.exit_code == 2
    assert "deformux-label users add" in result.output


@pytest.mark.parametrize("stock_login", [False, True])
def test_monai_labels_own_command_does_not_start_either(tmp_path: Path, stock_login: bool) -> None:
    """Its default is to listen on all addresses."""
    command = [*preloaded_stock_command(tmp_path / "studies", CONF), "--port", "1"]
    if stock_login:
        command += ["--host", "127.0.0.1"]
    last = refused_start(command, tmp_path, MONAI_LABEL_AUTH_ENABLE=str(stock_login))
    assert "deformux-label users add" in last
