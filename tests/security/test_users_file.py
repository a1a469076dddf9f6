"""The file with the users, and the commands that change it."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import bcrypt
import pytest
from typer.testing import CliRunner

from deformux_label.cli.main import app
from deformux_label.lib.requests.roles import ROLES, may
from deformux_label.web.users import InvalidUsers, Users, verified

PASSWORD = "correct horse"
# Of the property Default_Ignorable_Code_Point in Unicode's DerivedCoreProperties.txt, one of each range.
INVISIBLE = "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b\u180d\u180e\u180f\u200b\u200d\u202e\u2060\u2065\u3164"
INVISIBLE += "\ufe00\ufe0f\ufeff\uffa0\ufff0\U0001bca0\U0001d173\U000e0000\U000e0001\U000e0100\U000e01ef\U000e0fff"


@pytest.fixture
def users(tmp_path: Path) -> Users:
    return Users(tmp_path / "config" / "users.json")


def command(*arguments: str | Path, stdin: str | None = None) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["users", *map(str, arguments)], input=stdin)
    return result.exit_code, result.output


def test_only_the_owner_can_read_the_file_under_any_umask(users: Users) -> None:
    before = os.umask(0)
    try:
        users.add("anna", "annotator", PASSWORD)
        users.secret()
        users.set_role("anna", "reviewer")
    finally:
        os.umask(before)
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in users.path.parent.glob("users.json*")} == {
        "users.json": 0o600,
        "users.json.secret": 0o600,
        "users.json.lock": stat.S_IMODE(users.path.with_name("users.json.lock").stat().st_mode),
    }
    assert stat.S_IMODE(users.path.parent.stat().st_mode) == 0o700
    assert PASSWORD not in users.path.read_text()


def test_each_role_may_do_what_lower_roles_may() -> None:
    assert [[may(role, least) for least in ROLES] for role in ROLES] == [
        [True, False, False, False],
        [True, True, False, False],
        [True, True, True, False],
        [True, True, True, True],
    ]


@pytest.mark.parametrize(
    ("password", "other"),
    [
        ("x" * 72 + "right", "x" * 72 + "wrong"),  # bcrypt itself ends at 72 bytes
        ("before\0after1", "before\0after2"),
        ("pässwörd", "password"),
    ],
)
def test_every_character_of_a_password_counts(users: Users, password: str, other: str) -> None:
    user = users.add("anna", "annotator", password)
    assert verified(user, password)
    assert not verified(user, other)
    # As a keyboard sends it that composes umlauts from two characters.
    decomposed = password.replace("ä", "a\u0308").replace("ö", "o\u0308")
    assert verified(user, decomposed)
    assert not verified(None, password)
    # Independent check: it is a hash of bcrypt, of bytes that bcrypt reads to the end.
    assert user.password.startswith("$2b$12$")
    assert not bcrypt.checkpw(password.encode()[:72], user.password.encode())


@pytest.mark.parametrize("password", ["", "       ", "        ", "seven77", "x" * 1_001, "\ud800" * 8])
def test_bad_passwords(users: Users, password: str) -> None:
    with pytest.raises(InvalidUsers, match="password"):
        users.add("anna", "annotator", password)
    assert not users.path.exists()


@pytest.mark.parametrize(
    "name", ["", " anna", "anna ", "an\na", "an/na", "x" * 65, "\ud800", "Anonymous", ".anna", "a:b"]
)
def test_bad_names(users: Users, name: str) -> None:
    with pytest.raises(InvalidUsers, match="user name") as refused:
        users.add(name, "annotator", PASSWORD)
    str(refused.value).encode()


@pytest.mark.parametrize(
    "name", ["anna", "Eva Müller", "Анна", "Ελένη", "O4 肝臓", "a.b@klinik.example", "आनंद", "肝臓", "x" * 64]
)
def test_good_names(users: Users, name: str) -> None:
    assert users.add(name, "reader", PASSWORD).name == name
    assert list(Users(users.path).all()) == [name]


def test_names_differ_in_more_than_case(users: Users) -> None:
    users.add("anna", "annotator", PASSWORD)
    with pytest.raises(InvalidUsers, match="'anna' already"):
        users.add("Anna", "admin", PASSWORD)


def test_concurrent_changes_are_all_kept(users: Users) -> None:
    names = [f"user{number}" for number in range(8)]
    threads = [threading.Thread(target=Users(users.path).add, args=(name, "reader", PASSWORD)) for name in names[:4]]
    code = f"""
import sys
from pathlib import Path
from deformux_label.web.users import Users
for name in {names[4:]!r}:
    Users(Path(sys.argv[1])).add(name, "reader", {PASSWORD!r})
"""
    users.path.parent.mkdir()
    with subprocess.Popen([sys.executable, "-c", code, str(users.path)]) as other:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert other.returncode == 0
    assert sorted(users.all()) == names


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"users": []}',
        '{"users": {"anna": {"role": "annotator"}}}',
        '{"users": {"anna": {"role": "root", "password": "HASH"}}}',
        '{"users": {"anna": {"role": "admin", "password": ""}}}',
        '{"users": {"an/na": {"role": "admin", "password": "HASH"}}}',
        '{"users": {"anna": null}}',
        "\ud800",
        "[" * 100_000,
        '{"users": {"anna": {"role": "admin", "password": "COST99"}}}',
        '{"users": {"anna": {"role": "admin", "password": "COST31"}}}',
        '{"users": {"anna": {"role": "admin", "password": "COST04"}}}',
        '{"users": {"anna": {"role": "admin", "password": "SALT"}}}',
    ],
)
def test_a_damaged_file_locks_everybody_out(users: Users, content: str) -> None:
    users.add("other", "admin", PASSWORD)
    known = json.loads(users.path.read_text())["users"]["other"]["password"]
    content = content.replace("HASH", known).replace("SALT", f"{known[:28]}z{known[29:]}")
    for cost in ("99", "31", "04"):
        content = content.replace(f"COST{cost}", known.replace("$12$", f"${cost}$"))
    users.path.write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(InvalidUsers, match="is damaged") as refused:
        users.all()
    assert "\n" not in str(refused.value)
    code, output = command("list", "--users", users.path)
    assert code == 2
    assert output.startswith("deformux-label: the users file")
    with pytest.raises(InvalidUsers, match="is damaged"):
        users.add("third", "admin", PASSWORD)
    assert users.path.read_bytes() == content.encode("utf-8", "surrogatepass")


def test_every_hash_that_is_accepted_can_be_checked(users: Users) -> None:
    users.add("anna", "annotator", PASSWORD)
    text = users.path.read_text()
    known = users.all()["anna"].password
    for last in "./ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789":
        users.path.write_text(text.replace(known, f"$2b$12${'A' * 21}{last}{'A' * 31}"))
        try:
            # With the least cost; the salt does not depend on it.
            bcrypt.hashpw(b"x", f"$2b$04${'A' * 21}{last}".encode())
        except ValueError:
            with pytest.raises(InvalidUsers, match="is damaged"):
                Users(users.path).all()
        else:
            assert list(Users(users.path).all()) == ["anna"]


@pytest.mark.parametrize("mode", [0o660, 0o644, 0o640, 0o604, 0o602])
def test_a_file_that_others_may_read_or_change_is_refused(users: Users, mode: int) -> None:
    users.add("anna", "annotator", PASSWORD)
    users.path.chmod(mode)
    with pytest.raises(InvalidUsers, match="chmod 600"):
        users.all()
    code, output = command("list", "--users", users.path)
    assert (code, output.count("\n")) == (2, 1)
    assert f"mode {mode:o}" in output
    users.path.chmod(0o600)
    assert list(users.all()) == ["anna"]


@pytest.mark.parametrize("character", INVISIBLE)
def test_names_have_no_invisible_characters(users: Users, character: str) -> None:
    for name in (f"an{character}na", f"anna{character}", character):
        with pytest.raises(InvalidUsers, match="visible letters"):
            users.add(name, "annotator", PASSWORD)


@pytest.mark.parametrize("name", ["\u0430nna", "ann\u03b1", "\u0391nna", "a\u0578na"])
def test_names_do_not_mix_alphabets_that_look_alike(users: Users, name: str) -> None:
    with pytest.raises(InvalidUsers, match="look alike"):
        users.add(name, "annotator", PASSWORD)


@pytest.mark.parametrize("name", ["Anna", "\uff41nna", "\U0001d41anna", "ANNA", "\uff21\uff2e\uff2e\uff21"])
def test_names_that_normalize_to_the_same_are_one(users: Users, name: str) -> None:
    users.add("anna", "annotator", PASSWORD)
    with pytest.raises(InvalidUsers, match=r"'anna' already|look alike"):
        users.add(name, "admin", PASSWORD)


@pytest.mark.parametrize("content", ["", "00", "g" * 64])
def test_a_damaged_secret_signs_nothing(users: Users, content: str) -> None:
    users.add("anna", "annotator", PASSWORD)
    users.secret()
    secret = users.path.with_name("users.json.secret")
    secret.write_text(content)
    with pytest.raises(InvalidUsers, match="delete it"):
        Users(users.path).secret()
    secret.unlink()
    assert len(Users(users.path).secret()) == 32


def test_the_commands(tmp_path: Path) -> None:
    file = tmp_path / "users.json"
    assert command("list", "--users", file)[1].split() == ["name", "role"]
    added = command("add", "anna", "--role", "annotator", "--users", file, "--password-stdin", stdin=f"{PASSWORD}\n")
    assert added == (0, "anna may log in as annotator.\n")
    assert verified(Users(file).all()["anna"], PASSWORD)
    assert command("role", "anna", "admin", "--users", file)[0] == 0
    assert command("passwd", "anna", "--users", file, "--password-stdin", stdin="another one\n")[0] == 0
    assert verified(Users(file).all()["anna"], "another one")
    assert command("list", "--users", file)[1].split() == ["name", "role", "anna", "admin"]
    code, output = command("remove", "anna", "--users", file)
    assert code == 0
    assert "No user is left" in output
    assert Users(file).all() == {}


@pytest.mark.parametrize(
    ("arguments", "stdin", "words"),
    [
        (("add", "anna", "--role", "root", "--password-stdin"), f"{PASSWORD}\n", "reader, annotator, reviewer, admin"),
        (("add", "anna", "--role", "admin", "--password-stdin"), "short\n", "at least 8 characters"),
        (("add", "anna", "--role", "admin"), "", "--password-stdin"),
        (("add", "bob", "--role", "admin", "--password-stdin"), f"{PASSWORD}\n", "'bob' already"),
        (("add", "a/b", "--role", "admin", "--password-stdin"), f"{PASSWORD}\n", "user name"),
        (("remove", "carl"), None, "the users are 'bob'"),
        (("passwd", "carl", "--password-stdin"), f"{PASSWORD}\n", "the users are 'bob'"),
        (("role", "bob", "boss"), None, "reader, annotator, reviewer, admin"),
    ],
)
def test_a_bad_command_ends_with_one_sentence(
    tmp_path: Path, arguments: tuple[str, ...], stdin: str | None, words: str
) -> None:
    users = Users(tmp_path / "users.json")
    users.add("bob", "reader", PASSWORD)
    before = users.path.read_bytes()
    code, output = command(*arguments, "--users", users.path, stdin=stdin)
    assert code == 2
    assert output.startswith("deformux-label: ")
    assert output.count("\n") == 1
    assert words in output
    assert users.path.read_bytes() == before
