"""Rules of the login that need no server: whom an open one answers, and how long who guesses must wait."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest
from logged_in import make_users

from deformux_label.web.attempts import Attempts, TooManyAttempts
from deformux_label.web.listening import host_of, is_loopback
from deformux_label.web.login import Gate, HandedOut, Login
from deformux_label.web.tokens import EndedTokens, Tokens
from deformux_label.web.users import User, Users


@pytest.mark.parametrize(
    ("host", "own"),
    [
        *(("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("::ffff:127.0.0.1", True)),
        *(("0.0.0.0", False), ("::", False), ("", False), ("10.0.0.1", False), ("::ffff:10.0.0.1", False)),
        *(("no.such.host.example", False), ("x" * 300, False), ("127.0.0.1.example", False)),
    ],
)
def test_own_addresses(host: str, own: bool) -> None:
    assert is_loopback(host) is own


@pytest.mark.parametrize(
    ("arguments", "host"),
    [
        (["monailabel", "start_server", "--app", "a"], "0.0.0.0"),
        (["monailabel", "start_server", "--conf", "host", "127.0.0.1"], "0.0.0.0"),
        (["monailabel", "start_server", "-i", "10.0.0.1"], "10.0.0.1"),
        (["monailabel", "start_server", "--host=10.0.0.1", "--port", "1"], "10.0.0.1"),
        (["monailabel", "start_server", "--host", "127.0.0.1", "--host", "0.0.0.0"], "0.0.0.0"),
        (["monailabel", "start_server", "--ho", "10.0.0.1"], "10.0.0.1"),
        (["uvicorn", "deformux_label.server:app"], "127.0.0.1"),
    ],
)
def test_where_a_command_line_listens(arguments: list[str], host: str) -> None:
    assert host_of(arguments) == host


def answered(gate: Gate, **scope: Any) -> int:
    """The status of a request with this scope, where what is behind the login answers 200."""
    sent: list[int] = []

    async def behind(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: Any) -> None:
        sent.append(message.get("status", 0))

    request = {"type": "http", "method": "GET", "path": "/info/", "headers": [], "query_string": b"", **scope}
    asyncio.run(Login(behind, gate)(request, None, send))  # type: ignore[arg-type]
    return sent[0]


@pytest.mark.parametrize(
    ("server", "client", "status"),
    [
        (("127.0.0.1", 8000), ("127.0.0.1", 5), 200),
        (("::1", 8000), ("::1", 5), 200),
        (("/run/label.sock", None), None, 200),
        (("10.0.0.5", 8000), ("10.0.0.9", 5), 403),
        (("10.0.0.5", 8000), ("10.0.0.5", 5), 403),
        # A proxy of this machine that asks for another one.
        (("127.0.0.1", 8000), ("10.0.0.9", 0), 403),
        (("127.0.0.1", 8000), ("localhost.evil.example", 0), 403),
    ],
)
def test_without_users_only_the_own_machine_is_answered(tmp_path: Path, server: Any, client: Any, status: int) -> None:
    users = Users(tmp_path / "users.json")
    assert answered(Gate(users), server=server, client=client) == status
    assert answered(Gate(users, insecure=True), server=server, client=client) == 200


def test_guesses_wait_longer_and_longer() -> None:
    async def guess() -> None:
        attempts = Attempts()
        begin = time.monotonic()
        for _ in range(4):
            await attempts.wait("anna", "10.0.0.1")
        assert time.monotonic() - begin < 0.2
        for expected in (0.5, 1.0):
            begin = time.monotonic()
            await attempts.wait("anna", "10.0.0.1")
            assert 0.9 * expected < time.monotonic() - begin < expected + 0.4
        # Another name from there does not wait, and neither does this one where it was good before.
        begin = time.monotonic()
        await attempts.wait("andy", "10.0.0.1")
        attempts.succeeded("anna", "10.0.0.2")
        await attempts.wait("anna", "10.0.0.2")
        assert time.monotonic() - begin < 0.2

    asyncio.run(guess())


def test_guesses_at_once_are_no_way_around_it() -> None:
    async def guess() -> tuple[int, list[bool]]:
        attempts = Attempts()

        async def one() -> bool | None:
            try:
                await attempts.wait("anna", "10.0.0.1")
            except TooManyAttempts as error:
                return error.news
            return None

        tasks = [asyncio.create_task(one()) for _ in range(500)]
        await asyncio.sleep(0.1)
        refused = [bool(task.result()) for task in tasks if task.done() and task.result() is not None]
        checked = sum(task.done() and task.result() is None for task in tasks)
        for task in tasks:
            task.cancel()
        return checked, refused

    checked, refused = asyncio.run(guess())
    assert checked <= 4
    assert len(refused) > 480
    assert sum(refused) == 1, "a flood is told once"


def test_names_at_many_addresses_are_bounded() -> None:
    async def guess() -> int:
        attempts = Attempts()
        for number in range(25_000):
            await attempts.wait(f"name {number}", f"10.0.{number % 250}.{number // 250}")
        return len(attempts._failed)

    assert asyncio.run(guess()) <= 10_000


def test_what_is_handed_out_is_bounded_and_ends() -> None:
    now = 0.0
    handed_out = HandedOut(clock=lambda: now)
    user = User("anna", "annotator", "")
    for number in range(5_000):
        handed_out.add("10.0.0.1", f"case {number}", user)
    assert len(handed_out._held) == 1_000
    assert handed_out.take("10.0.0.1", "case 0") is None
    assert handed_out.take("10.0.0.1", "case 4999") == "anna"
    now = 301.0
    assert handed_out.take("10.0.0.1", "case 4999") is None
    assert handed_out.take("10.0.0.1", "case 4998") is None


def test_a_logout_outlives_its_server(tmp_path: Path) -> None:
    users = make_users(tmp_path / "users.json")
    first, beside = Tokens(users), Tokens(Users(users.path))
    ended, kept = (first.make(users.named(name)) for name in ("anna", "ada"))
    assert beside.user(ended)
    first.end(ended)
    after = Tokens(Users(users.path))
    for tokens in (first, beside, after):
        assert tokens.user(ended) is None
        assert tokens.user(kept) == users.named("ada")
    assert (tmp_path / "users.json.ended").stat().st_mode & 0o777 == 0o600


def test_logouts_are_forgotten_with_their_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = EndedTokens(tmp_path / "ended")
    ended.add("old", time.time() - 1)
    ended.add("new", time.time() + 100)
    assert list(json.loads((tmp_path / "ended").read_text())) == ["new"]
    (tmp_path / "ended").write_text("{")
    assert "new" in ended
    assert "new" not in EndedTokens(tmp_path / "ended")
    ended.add("newer", time.time() + 100)
    again = EndedTokens(tmp_path / "ended")
    assert "new" in again
    assert "newer" in again
