"""Attacks on the login of a running server: forged tokens, guesses, and a users file that is gone."""

from __future__ import annotations

import base64
import json
import os
import shutil
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jwt
import pytest
from live import LiveServer
from logged_in import bearer, call, headers_of, log_in, password
from typer.testing import CliRunner

from deformux_label.cli.main import app
from deformux_label.web.users import Users


@pytest.fixture
def server(login_server: LiveServer) -> LiveServer:
    return login_server


@pytest.fixture
def users(login_users: Users) -> Users:
    return login_users


@pytest.fixture
def tokens(login_tokens: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    return login_tokens


def claims_of(headers: dict[str, str]) -> dict[str, Any]:
    return jwt.decode(headers["Authorization"].split()[1], options={"verify_signature": False})


def test_forged_tokens(server: LiveServer, users: Users, tokens: dict[str, dict[str, str]]) -> None:
    claims = claims_of(tokens["ada"])
    assert claims["exp"] - claims["iat"] == 12 * 3600
    secret = users.secret()
    now = int(time.time())
    header, payload, signature = tokens["ada"]["Authorization"].split()[1].split(".")
    unsigned = base64.urlsafe_b64encode(b'{"alg":"none","typ":"JWT"}').rstrip(b"=").decode()
    other = base64.urlsafe_b64encode(json.dumps({**claims, "sub": "rob"}).encode()).rstrip(b"=").decode()
    forged = {
        "no signature": f"{unsigned}.{payload}.",
        "none with a signature": f"{unsigned}.{payload}.{signature}",
        "another's claims": f"{header}.{other}.{signature}",
        "another key": jwt.encode(claims, "0" * 32, "HS256"),
        "a key of a null byte": jwt.encode(claims, "\0", "HS256"),
        "the key as text": jwt.encode(claims, secret.hex(), "HS256"),
        "another algorithm": jwt.encode(claims, secret, "HS512"),
        "expired": jwt.encode({**claims, "iat": now - 100, "exp": now - 1}, secret, "HS256"),
        "without an end": jwt.encode({key: claims[key] for key in claims if key != "exp"}, secret, "HS256"),
        "the state of another user": jwt.encode({**claims, "sub": "rob"}, secret, "HS256"),
        "nobody": jwt.encode({**claims, "sub": "eve"}, secret, "HS256"),
        "not a text": jwt.encode({**claims, "state": 5}, secret, "HS256"),
        "a password hash": users.all()["ada"].password,
        "long": "x" * 5_000,
        "nothing": "",
        "a null": "null",
    }
    assert call(server, "GET", "/info/", bearer(jwt.encode(claims, secret, "HS256"))).status_code == 200
    for name, token in forged.items():
        for headers in (bearer(token), {"Cookie": f"deformux-label={token}"}):
            assert call(server, "GET", "/info/", headers).status_code == 401, name
            assert call(server, "GET", "/auth/token/valid", headers).status_code == 401, name
    for value in (
        "Basic YWRhOng=",
        "bearer",
        f"Token {header}",
        "Bearer  ",
        f"bearer {header}.{payload}.{signature} x",
    ):
        assert call(server, "GET", "/info/", {"Authorization": value}).status_code == 401, value


def test_tokens_end_at_once(server: LiveServer, users: Users) -> None:
    def users_command(*arguments: str, stdin: str | None = None) -> None:
        result = CliRunner().invoke(app, ["users", *arguments, "--users", str(users.path)], input=stdin)
        assert result.exit_code == 0, result.output

    def add() -> dict[str, str]:
        users_command("add", "eve", "--role", "reader", "--password-stdin", stdin=f"{password('eve')}\n")
        return headers_of(server, "eve")["eve"]

    def good(headers: dict[str, str]) -> bool:
        return call(server, "GET", "/info/", headers).status_code == 200

    first = add()
    assert good(first)
    users_command("remove", "eve")
    assert not good(first)
    assert log_in(server, "eve").status_code == 401
    second = add()
    assert good(second)
    assert not good(first), "another user of the same name and password"
    users_command("passwd", "eve", "--password-stdin", stdin="something else\n")
    assert not good(second)
    third = bearer(log_in(server, "eve", "something else").json()["access_token"])
    assert good(third)
    users_command("role", "eve", "admin")
    assert not good(third)
    users_command("remove", "eve")


def test_guessing_is_slow_and_does_not_delay_others(
    server: LiveServer, tokens: dict[str, dict[str, str]], users: Users
) -> None:
    attacker = {"X-Forwarded-For": "203.0.113.5"}
    guesses = 0
    waits: list[float] = []
    deadline = time.monotonic() + 3

    def guess() -> None:
        nonlocal guesses
        while time.monotonic() < deadline:
            answer = log_in(server, "rob", "a wrong one", **attacker)
            guesses += answer.status_code == 401
            assert answer.status_code in (401, 429), answer.text
            if answer.status_code == 429:
                assert 1 <= int(answer.headers["Retry-After"]) <= 30
                time.sleep(0.1)

    with ThreadPoolExecutor(16) as pool:
        running = [pool.submit(guess) for _ in range(16)]
        while time.monotonic() < deadline:
            begin = time.monotonic()
            assert call(server, "GET", "/info/", tokens["rita"]).status_code == 200
            waits.append(time.monotonic() - begin)
            time.sleep(0.05)
        # Where rob has logged in before, he still can, at once.
        begin = time.monotonic()
        assert log_in(server, "rob").status_code == 200
        assert time.monotonic() - begin < 5
        for future in running:
            future.result()
    # Three are free, then 0.5, 1, 2, 4 s; the address is delayed later.
    assert guesses <= 9
    assert statistics.median(waits) < 0.5
    log = server.log.read_text()
    assert "Failed login of 'rob' from 203.0.113.5" in log
    assert "a wrong one" not in log


def test_guesses_do_not_lock_out_the_users(server: LiveServer, tokens: dict[str, dict[str, str]]) -> None:
    """Neither at an address from which names are guessed, nor elsewhere while their own name is guessed."""
    ward, attacker = {"X-Forwarded-For": "192.0.2.50"}, {"X-Forwarded-For": "192.0.2.66"}
    assert log_in(server, "andy", **ward).status_code == 200
    deadline = time.monotonic() + 3
    seen: list[int] = []

    def flood(number: int) -> None:
        while time.monotonic() < deadline:
            name, where = (f"nobody {number} {time.monotonic()}", ward) if number % 2 else ("ada", attacker)
            seen.append(log_in(server, name, "a wrong one", **where).status_code)
            if seen[-1] == 429:
                time.sleep(0.05)

    with ThreadPoolExecutor(40) as pool:
        running = [pool.submit(flood, number) for number in range(16)]
        time.sleep(1)
        assert [log_in(server, "andy", **ward).status_code for _ in range(5)] == [200] * 5
        elsewhere = [{"X-Forwarded-For": f"192.0.2.{number}"} for number in range(100, 108)]
        begin = time.monotonic()
        answers = list(pool.map(lambda headers: log_in(server, "ada", **headers).status_code, elsewhere))
        assert answers == [200] * 8
        assert time.monotonic() - begin < 15
        # Concurrent logins of a user are not failures.
        assert list(pool.map(lambda _: log_in(server, "rita").status_code, range(12))) == [200] * 12
        for future in running:
            future.result()
    assert set(seen) <= {401, 429}
    assert seen.count(401) < 40


def test_unknown_and_known_names_take_equally_long(server: LiveServer) -> None:
    def seconds(name: str, address: str) -> float:
        begin = time.perf_counter()
        assert log_in(server, name, "a wrong one", **{"X-Forwarded-For": address}).status_code == 401
        return time.perf_counter() - begin

    # Fewer attempts than are free of delays.
    known = [
        seconds(name, f"198.51.100.{n}") for n, name in enumerate(("anna", "andy", "rita", "anna", "andy", "rita"))
    ]
    unknown = [seconds(f"nobody {n}", f"198.51.100.{n}") for n in range(6)]
    assert 0.4 < statistics.median(unknown) / statistics.median(known) < 2.5
    assert min(unknown) > 0.5 * min(known)


@pytest.mark.parametrize("name", ["anna\nINFO: all is well", "\u202eanna", "x" * 4_000, "\x1b[31m"])
def test_names_cannot_forge_lines_of_the_log(server: LiveServer, name: str) -> None:
    assert log_in(server, name, "a wrong one", **{"X-Forwarded-For": "192.0.2.9"}).status_code == 401
    logged = [
        line for line in server.log.read_text().splitlines() if "from 192.0.2.9" in line and "Failed login" in line
    ]
    assert logged
    assert all("Failed login of '" in line and line.isascii() and len(line) < 400 for line in logged)


@pytest.mark.parametrize("content", [None, '{"users": {}}', "{"], ids=["deleted", "emptied", "damaged"])
def test_without_its_users_file_the_server_stays_closed(
    server: LiveServer, users: Users, tokens: dict[str, dict[str, str]], content: str | None, tmp_path: Path
) -> None:
    kept = shutil.copy2(users.path, tmp_path / "kept.json")
    try:
        if content is None:
            users.path.unlink()
        else:
            users.path.write_text(content)
        assert call(server, "GET", "/auth/").json()["enabled"] is True
        for headers in ({}, tokens["ada"]):
            answer = call(server, "GET", "/info/", headers)
            assert answer.status_code in ((401, 503) if content == "{" else (401,))
        assert log_in(server, "ada").status_code in ((503,) if content == "{" else (401,))
    finally:
        os.replace(kept, users.path)
    assert call(server, "GET", "/info/", tokens["ada"]).status_code == 200
