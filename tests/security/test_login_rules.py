"""Rules of the login without a server: access without users, and delays of guesses."""

from __future__ import annotations

import asyncio
import json
import selectors
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest
from logged_in import make_users

from deformux_label.web.attempts import Attempts, TooManyAttempts
from deformux_label.web.known_addresses import KnownAddresses, network_of
from deformux_label.web.listening import host_of, is_loopback
from deformux_label.web.login import Gate, ImageGrants, Login
from deformux_label.web.tokens import EndedTokens, Tokens
from deformux_label.web.users import Users


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
    """Return the status of a request with this scope; the app behind the login answers 200."""
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
        # A proxy on this machine that forwards for a different one.
        (("127.0.0.1", 8000), ("10.0.0.9", 0), 403),
        (("127.0.0.1", 8000), ("localhost.evil.example", 0), 403),
    ],
)
def test_without_users_only_the_own_machine_is_answered(tmp_path: Path, server: Any, client: Any, status: int) -> None:
    users = Users(tmp_path / "users.json")
    assert answered(Gate(users), server=server, client=client) == status
    assert answered(Gate(users, insecure=True), server=server, client=client) == 200


T = TypeVar("T")


class Jump(selectors.DefaultSelector):
    """A selector that adds what it would wait to a clock instead."""

    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        assert timeout is not None, "everything waits for ever"
        self.now += timeout
        return super().select(0)


def run_timeless(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run it on a loop whose time passes only while everything waits, so that no speed changes what is measured."""
    jump = Jump()
    loop = asyncio.SelectorEventLoop(jump)
    loop.time = lambda: jump.now  # type: ignore[method-assign]
    try:
        return loop.run_until_complete(coroutine)
    finally:
        loop.close()


def timeless_attempts() -> Attempts:
    return Attempts(clock=asyncio.get_running_loop().time)


async def guess(attempts: Attempts, name: str = "anna", address: str = "10.0.0.1", *, right: bool = False) -> float:
    """Return the seconds until a password was checked."""
    now = asyncio.get_running_loop().time
    begin = now()
    async with attempts.attempt(name, address) as attempt:
        if right:
            attempt.succeeded()
    return now() - begin


def test_guesses_wait_longer_and_longer() -> None:
    async def run() -> None:
        attempts = timeless_attempts()
        assert sum([await guess(attempts) for _ in range(4)]) == 0
        for expected in (0.5, 1.0):
            assert await guess(attempts) == pytest.approx(expected)
        # Another name from there does not wait, and neither does this one elsewhere.
        assert await guess(attempts, "andy") == 0
        assert await guess(attempts, address="10.0.0.2") == 0

    run_timeless(run())


async def refusals(guesses: list[Any], seconds: float = 0.1) -> tuple[int, list[bool]]:
    """Return the number of attempts checked in this time, and for each refused one whether to log it."""
    tasks = [asyncio.create_task(one) for one in guesses]
    await asyncio.sleep(seconds)
    done = [task for task in tasks if task.done()]
    refused = [error.should_log for error in (task.exception() for task in done) if isinstance(error, TooManyAttempts)]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return len(done) - len(refused), refused


@pytest.mark.parametrize("same_name", [True, False])
def test_concurrent_guesses_do_not_avoid_the_delays(same_name: bool) -> None:
    async def run() -> tuple[int, list[bool]]:
        attempts = timeless_attempts()
        names = ["anna" if same_name else f"name {number}" for number in range(500)]
        return await refusals([guess(attempts, name) for name in names])

    checked, refused = run_timeless(run())
    assert checked <= (4 if same_name else 11)
    assert len(refused) >= 460
    assert sum(refused) == 1, "a flood is logged once"


def test_concurrent_right_passwords_are_not_failures() -> None:
    async def run() -> None:
        attempts = timeless_attempts()
        checked, refused = await refusals([guess(attempts, right=True) for _ in range(12)])
        assert (checked, refused) == (12, [])
        # A whole ward, on the morning of the first day.
        checked, refused = await refusals([guess(attempts, f"name {n}", right=True) for n in range(30)])
        assert (checked, refused) == (30, [])

    run_timeless(run())


def test_a_flood_of_names_does_not_lock_out_users_at_known_addresses() -> None:
    async def run() -> None:
        attempts = timeless_attempts()
        attempts.known_addresses.add("anna", "10.0.0.1")
        flood = [asyncio.create_task(guess(attempts, f"name {number}")) for number in range(2_000)]
        flood += [asyncio.create_task(guess(attempts, f"n{n}", f"10.9.{n // 250}.{n % 250}")) for n in range(2_000)]
        await asyncio.sleep(0)
        assert [await guess(attempts, right=True) for _ in range(10)] == [0.0] * 10
        for task in flood:
            task.cancel()
        await asyncio.gather(*flood, return_exceptions=True)

    run_timeless(run())


def test_guesses_of_a_name_elsewhere_delay_it_without_a_lockout() -> None:
    async def run() -> None:
        attempts = timeless_attempts()
        guesses = [guess(attempts, "ada", f"10.7.0.{number}") for number in range(60)]
        checked, _ = await refusals(guesses)
        assert checked >= 10
        waits = await asyncio.gather(*(guess(attempts, "ada", f"10.0.0.{n}", right=True) for n in range(8)))
        assert waits == pytest.approx([2.0] * 8)

    run_timeless(run())


def test_names_at_many_addresses_are_bounded() -> None:
    async def run() -> int:
        attempts = timeless_attempts()
        for number in range(25_000):
            await guess(attempts, f"name {number}", f"10.0.{number % 250}.{number // 250}")
        return len(attempts._failed)

    assert run_timeless(run()) <= 10_000


def test_a_machine_counts_as_one_network() -> None:
    assert network_of("10.0.0.1") == network_of("::ffff:10.0.0.1") == "10.0.0.1"
    assert network_of("2001:db8::1") == network_of("2001:db8::ffff:2%eth0") != network_of("2001:db8:0:1::1")
    assert network_of("") == ""


def test_places_of_users_outlive_the_server(tmp_path: Path) -> None:
    path = tmp_path / "users.json.home"
    first, second = KnownAddresses(path), KnownAddresses(path)
    first.add("anna", "10.0.0.1")
    second.add("rob", "10.0.0.2")
    again = KnownAddresses(path)
    assert ("anna", "10.0.0.1") in again
    assert ("rob", "10.0.0.2") in again
    assert ("rob", "10.0.0.1") not in again
    assert path.stat().st_mode & 0o777 == 0o600
    for number in range(50):
        again.add("anna", f"10.1.0.{number}")
    assert len(json.loads(path.read_text())) == 21
    assert ("rob", "10.0.0.2") in KnownAddresses(path)
    for damaged in ("{", "[1]", "null", "[" * 100_000):
        path.write_text(damaged)
        assert ("rob", "10.0.0.2") not in KnownAddresses(path)


def test_image_grants_are_bounded_and_expire() -> None:
    now = 0.0
    grants = ImageGrants(clock=lambda: now)
    for number in range(5_000):
        grants.add("10.0.0.1", f"case {number}", "token of anna")
    assert len(grants._held) == 1_000
    assert grants.take("10.0.0.1", "case 0") is None
    assert grants.take("10.0.0.1", "case 4999") == "token of anna"
    now = 301.0
    assert grants.take("10.0.0.1", "case 4999") is None
    assert grants.take("10.0.0.1", "case 4998") is None


def test_a_logout_outlives_its_server(tmp_path: Path) -> None:
    users = make_users(tmp_path / "users.json")
    first, second = Tokens(users), Tokens(Users(users.path))
    ended, kept = (first.make(users.named(name)) for name in ("anna", "ada"))
    assert second.user(ended)
    first.end(ended)
    after = Tokens(Users(users.path))
    for tokens in (first, second, after):
        assert tokens.user(ended) is None
        assert tokens.user(kept) == users.named("ada")
    assert (tmp_path / "users.json.ended").stat().st_mode & 0o777 == 0o600


def test_undoing_a_change_of_role_revives_no_token(tmp_path: Path) -> None:
    users = make_users(tmp_path / "users.json")
    # The format before changes were counted.
    old = json.loads(users.path.read_text())
    for user in old["users"].values():
        user.pop("changes", None)
    users.path.write_text(json.dumps(old))
    tokens = Tokens(Users(users.path))
    token = tokens.make(users.named("ada"))
    assert tokens.user(token) is not None
    users.set_role("ada", "reader")
    users.set_role("ada", "admin")
    for later in (tokens, Tokens(Users(users.path))):
        assert later.user(token) is None
    assert tokens.user(tokens.make(users.named("ada"))) is not None


def test_logouts_are_forgotten_when_their_tokens_expire(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
