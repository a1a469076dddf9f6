"""Users who may log in: a file of names, roles and bcrypt hashes that only its owner can read."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import bcrypt
from filelock import FileLock

from deformux.data.atomic_files import write_text
from deformux_label.lib.requests.roles import ROLES

__all__ = ["InvalidUsers", "User", "Users", "checked_name", "checked_password", "default_users_file", "verified"]

logger = logging.getLogger(__name__)

# Allowed besides letters and digits of any script; spaces only inside a name, as in "Eva Müller".
_IN_NAMES = "._@+- "
_MAX_NAME_LENGTH = 64
# The name of users without a login in leases and revisions.
_RESERVED = ("anonymous",)
# Invisible letters and marks: Unicode's Default_Ignorable_Code_Point in the categories L, M and N.
_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
# Alphabets with many letters that look the same: a name may use only one of them.
_ALIKE = ("ARMENIAN", "CHEROKEE", "COPTIC", "CYRILLIC", "GREEK", "LATIN", "LISU")
_MIN_PASSWORD_LENGTH = 8
_MAX_PASSWORD_LENGTH = 1_000
_ROUNDS = 12
# Checked for unknown names, so that they take as long as known ones.
_DUMMY_HASH = "$2b$12$yvsUCABAUmeOiPoEbKdVGuGuiptRFWT/rQwLypUV/3GvK5C/EYxj6"
# Hashes with costs from 10 to 16: others are refused by bcrypt, take hours, or are quick to guess. Only two bits of the
# salt's last character count; bcrypt refuses the other characters.
_HASH = re.compile(r"\$2[aby]\$1[0-6]\$[./A-Za-z0-9]{21}[.Oeu][./A-Za-z0-9]{31}")
_OWNER_ONLY = 0o600
_SECRET_BYTES = 32


class InvalidUsers(ValueError):
    """The users file, or a change to it, is invalid; the message is one sentence."""


@dataclass(frozen=True)
class User:
    """A user who may log in.

    Args:
        name: as shown at login and in all records.
        role: one of ``ROLES``.
        password: bcrypt's hash of the prepared password.
        changes: number of changes of role or password; undoing a change does not lower it.
    """

    name: str
    role: str
    password: str
    changes: int = 0


class Users:
    """Users in one JSON file of mode 600, written by rename under a lock, next to the secret that signs their tokens.

    The file is read again whenever it has changed, so that commands take effect in running servers.

    Args:
        path: the file; without it, there are no users.
        on_change: called with the users before and after, whenever a changed file has been read.
    """

    def __init__(
        self, path: Path, *, on_change: Callable[[Mapping[str, User], Mapping[str, User]], None] | None = None
    ) -> None:
        self.path = path
        self._on_change = on_change
        self._seen: tuple[tuple[int, ...] | None, Mapping[str, User]] | None = None

    def all(self) -> Mapping[str, User]:
        """Return the users by name.

        Raises:
            InvalidUsers: the file cannot be read, is damaged, or may be read or changed by others.
        """
        try:
            status = self.path.stat()
            version = (status.st_ino, status.st_mtime_ns, status.st_size, status.st_mode)
            if self._seen is not None and self._seen[0] == version:
                return self._seen[1]
            if status.st_mode & 0o077:
                # Others who can read the hashes can guess the passwords offline.
                raise InvalidUsers(
                    f"the users file {self.path} may be read or changed by others (mode {status.st_mode & 0o777:o}); "
                    f"make it yours alone with chmod 600 {self.path}"
                )
            users = _parsed(self.path.read_bytes(), self.path)
        except FileNotFoundError:
            version, users = None, {}
        except OSError as error:
            raise InvalidUsers(f"the users file {self.path} cannot be read: {error.strerror}") from error
        before = self._seen
        self._seen = (version, users)
        if before is not None and before[1] != users and self._on_change is not None:
            self._on_change(before[1], users)
        return users

    def named(self, name: str) -> User:
        """Return one user; raise InvalidUsers for an unknown name."""
        return self._known(self.all(), name)

    def add(self, name: str, role: str, password: str) -> User:
        """Add a user and return it; raise InvalidUsers for a name that is taken, or an invalid value."""
        user = User(checked_name(name), _checked_role(role), _hashed(password))

        def change(users: dict[str, User]) -> None:
            for present in users:
                if _folded(present) == _folded(user.name):
                    raise InvalidUsers(f"there is a user {present!r} already; remove it first, or take another name")
            users[user.name] = user

        self._change(change)
        return user

    def remove(self, name: str) -> None:
        """Remove a user; their tokens end at once."""
        self._change(lambda users: users.pop(self._known(users, name).name))

    def set_password(self, name: str, password: str) -> None:
        """Change a password; the user's earlier tokens end at once."""
        hashed = _hashed(password)
        self._change(lambda users: self._replace(users, name, lambda user: replace(user, password=hashed)))

    def set_role(self, name: str, role: str) -> None:
        """Change a role; the user's earlier tokens end at once."""
        _checked_role(role)
        self._change(lambda users: self._replace(users, name, lambda user: replace(user, role=role)))

    def secret(self) -> bytes:
        """Return the key that signs tokens; the first call makes it and stores it next to the users file."""
        path = self.path.with_name(f"{self.path.name}.secret")
        try:
            if not path.exists():
                with self._locked():
                    if not path.exists():
                        write_text(path, secrets.token_hex(_SECRET_BYTES) + "\n", mode=_OWNER_ONLY)
            found = path.read_text().strip()
            mode = path.stat().st_mode
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidUsers(f"the file {path} cannot be read or made: {error}") from error
        if mode & 0o077 or not re.fullmatch(rf"[0-9a-f]{{{2 * _SECRET_BYTES}}}", found):
            # With a known or empty key, anyone could make tokens.
            raise InvalidUsers(
                f"the file {path} is damaged or readable by others; delete it, and a new one is made at the next start"
            )
        return bytes.fromhex(found)

    def _known(self, users: Mapping[str, User], name: str) -> User:
        user = users.get(unicodedata.normalize("NFC", name))
        if user is None:
            there = f"the users are {', '.join(map(repr, users))}" if users else "it has no users"
            raise InvalidUsers(f"there is no user {name!a} in {self.path}; {there}")
        return user

    def _replace(self, users: dict[str, User], name: str, changed: Callable[[User], User]) -> None:
        before = self._known(users, name)
        users[before.name] = replace(changed(before), changes=before.changes + 1)

    def _change(self, change: Callable[[dict[str, User]], object]) -> None:
        try:
            with self._locked():
                users = dict(self.all())
                change(users)
                kept = ("role", "password", "changes")
                listed = {user.name: {key: getattr(user, key) for key in kept} for user in users.values()}
                text = json.dumps({"version": 1, "users": listed}, indent=1)
                write_text(self.path, text + "\n", mode=_OWNER_ONLY)
        except OSError as error:
            raise InvalidUsers(f"the users file {self.path} cannot be written: {error.strerror or error}") from error

    def _locked(self) -> FileLock:
        # A new folder is private too.
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        return FileLock(self.path.with_name(f"{self.path.name}.lock"))


def default_users_file() -> Path:
    """Return ``deformux-label/users.json`` in the user's folder for configuration."""
    try:
        config = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    except RuntimeError as error:
        raise InvalidUsers("there is no home folder to look for the users file in; name one with --users") from error
    return Path(config) / "deformux-label" / "users.json"


def verified(user: User | None, password: str) -> bool:
    """Return whether a password is correct; keeps a core busy for a quarter of a second, even for None."""
    good = bcrypt.checkpw(_prepared(password), (user.password if user else _DUMMY_HASH).encode())
    return good and user is not None


def checked_name(name: str) -> str:
    """Return the normalized name of a new user; raise InvalidUsers for a bad one."""
    normal = unicodedata.normalize("NFC", name)
    good = all(character in _IN_NAMES or _is_shown(character) for character in normal)
    if not (good and 1 <= len(normal) <= _MAX_NAME_LENGTH and normal[0] not in _IN_NAMES and normal[-1] != " ") or (
        _folded(normal) in _RESERVED
    ):
        raise InvalidUsers(
            f"a user name is 1 to {_MAX_NAME_LENGTH} visible letters, digits and . _ @ + - with spaces only inside, "
            f"and not {_RESERVED[0]!r}; got {ascii(name)[:80]}"
        )
    if len(alike := {alphabet for character in normal if (alphabet := _alphabet(character)) in _ALIKE}) > 1:
        raise InvalidUsers(
            f"a user name may use letters of only one of {', '.join(sorted(alike))}, which look alike; got "
            f"{ascii(name)[:80]}"
        )
    return normal


def _is_shown(character: str) -> bool:
    """Return whether a character is a visible letter, mark or digit."""
    return unicodedata.category(character)[0] in "LMN" and not _INVISIBLE.fullmatch(character)


def _folded(name: str) -> str:
    """Return a form that is equal for names that differ only in case, width or style of letters."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())


def _alphabet(character: str) -> str:
    """Return the first word of a letter's name, such as LATIN; empty for other characters."""
    return unicodedata.name(character, "").split(" ")[0] if character.isalpha() else ""


def checked_password(password: str) -> str:
    """Return a new password; raise InvalidUsers for one that is too short, too long or not text."""
    try:
        size = len(password.encode())
    except UnicodeEncodeError as error:
        raise InvalidUsers("the password is not valid Unicode; type it again") from error
    if len(password) < _MIN_PASSWORD_LENGTH or not password.strip() or size > _MAX_PASSWORD_LENGTH:
        raise InvalidUsers(
            f"a password has at least {_MIN_PASSWORD_LENGTH} characters and at most {_MAX_PASSWORD_LENGTH} bytes; got "
            f"{len(password)} characters"
        )
    return password


def _hashed(password: str) -> str:
    return bcrypt.hashpw(_prepared(checked_password(password)), bcrypt.gensalt(_ROUNDS)).decode()


def _prepared(password: str) -> bytes:
    """Return a password as bytes for bcrypt, which ignores or refuses more than 72 of them.

    HMAC instead of a bare hash, so that hashes stolen elsewhere cannot be tried here; Base64, because bcrypt stops at a
    null byte; one Unicode form, because keyboards differ in how they send an umlaut.
    """
    text = unicodedata.normalize("NFC", password).encode("utf-8", "surrogatepass")
    return base64.b64encode(hmac.digest(b"deformux-label", text, hashlib.sha256))


def _checked_role(role: str) -> str:
    if role not in ROLES:
        raise InvalidUsers(f"role must be one of {', '.join(ROLES)}; got {ascii(role)[:80]}")
    return role


def _parsed(content: bytes, path: Path) -> dict[str, User]:
    try:
        listed = json.loads(content)["users"]
        users = {
            # Older files have no count of changes.
            name: User(name, item["role"], item["password"], item.get("changes", 0))
            for name, item in listed.items()
        }
        for user in users.values():
            checked_name(user.name)
            _checked_role(user.role)
            if not _HASH.fullmatch(user.password):
                raise ValueError(f"user {user.name!r} has no password hash")
            if type(user.changes) is not int:
                raise ValueError(f"the changes of user {user.name!r} are not a number")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InvalidUsers(
            f"the users file {path} is damaged ({type(error).__name__}: {reason}); repair it, or delete it and add the "
            "users again"
        ) from error
    return users
