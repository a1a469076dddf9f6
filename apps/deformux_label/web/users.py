"""Who may log in: a file of names, roles and bcrypt hashes that only its owner can read."""

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

# Beside letters and digits of any script; blanks only inside, so that "Eva Müller" is a name.
_IN_NAMES = "._@+- "
_LONGEST_NAME = 64
# Who works without a login is called so, in leases and revisions.
_RESERVED = ("anonymous",)
# Letters and marks that are drawn as nothing: Unicode's Default_Ignorable_Code_Point, as far as it is L, M or N.
_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
# Alphabets of which many letters look the same: a name has letters of one of them.
_ALIKE = ("ARMENIAN", "CHEROKEE", "COPTIC", "CYRILLIC", "GREEK", "LATIN", "LISU")
_LEAST_PASSWORD = 8
_LONGEST_PASSWORD = 1_000
_ROUNDS = 12
# Checked instead of the hash of a user that does not exist: both answers take equally long.
_NOBODY = "$2b$12$yvsUCABAUmeOiPoEbKdVGuGuiptRFWT/rQwLypUV/3GvK5C/EYxj6"
# What bcrypt can check in seconds: other costs are refused by it, take hours, or are guessed fast. Of the salt's last
# character only two bits count, and bcrypt refuses the others.
_HASH = re.compile(r"\$2[aby]\$1[0-6]\$[./A-Za-z0-9]{21}[.Oeu][./A-Za-z0-9]{31}")
_OWNER_ONLY = 0o600
_SECRET_BYTES = 32


class InvalidUsers(ValueError):
    """The file with the users, or a change of it, is not possible; the message is one sentence."""


@dataclass(frozen=True)
class User:
    """Somebody who may log in.

    Args:
        name: as the login and every record of their work show it.
        role: one of ``ROLES``.
        password: bcrypt's hash of the prepared password.
        changes: how often role or password were changed, so that a role that is changed back is not the earlier state.
    """

    name: str
    role: str
    password: str
    changes: int = 0


class Users:
    """Users in one JSON file of mode 600, written by rename under a lock, and the secret of their tokens beside it.

    The file is read again whenever it has changed, so that a command takes effect in servers that run.

    Args:
        path: the file; where it does not exist, there is no user.
        on_change: called with the users before and after, once the file was read again and differs.
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
                # Hashes that others can read are passwords that others can guess, as fast as their machines are.
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
        """Return one user; raises InvalidUsers where there is none of this name."""
        return self._known(self.all(), name)

    def add(self, name: str, role: str, password: str) -> User:
        """Add a user and return it; raises InvalidUsers for a name that is taken or any bad value."""
        user = User(checked_name(name), _checked_role(role), _hashed(password))

        def change(users: dict[str, User]) -> None:
            for present in users:
                if _folded(present) == _folded(user.name):
                    raise InvalidUsers(f"there is a user {present!r} already; remove it first, or take another name")
            users[user.name] = user

        self._change(change)
        return user

    def remove(self, name: str) -> None:
        """Remove a user, whose tokens end at once."""
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
        """Return the key that signs the tokens, which is made at the first call and kept beside the users."""
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
            # With a key that others know or that is empty, anybody could make tokens.
            raise InvalidUsers(
                f"the file {path} is damaged or readable by others; delete it, and a new one is made at the next start"
            )
        return bytes.fromhex(found)

    def _known(self, users: Mapping[str, User], name: str) -> User:
        user = users.get(unicodedata.normalize("NFC", name))
        if user is None:
            there = f"there are {', '.join(map(repr, users))}" if users else "there is none"
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
        # A folder that is made here is nobody else's business either.
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
    """Return whether a password is a user's; takes as long for nobody. Takes a quarter of a second of a processor."""
    good = bcrypt.checkpw(_prepared(password), (user.password if user else _NOBODY).encode())
    return good and user is not None


def checked_name(name: str) -> str:
    """Return the name of a new user, in one Unicode form; raises InvalidUsers."""
    normal = unicodedata.normalize("NFC", name)
    good = all(character in _IN_NAMES or _is_shown(character) for character in normal)
    if not (good and 1 <= len(normal) <= _LONGEST_NAME and normal[0] not in _IN_NAMES and normal[-1] != " ") or (
        _folded(normal) in _RESERVED
    ):
        raise InvalidUsers(
            f"a user name is 1 to {_LONGEST_NAME} visible letters, digits and . _ @ + - with blanks only inside, and "
            f"not {_RESERVED[0]!r}; got {ascii(name)[:80]}"
        )
    if len(alike := {alphabet for character in normal if (alphabet := _alphabet(character)) in _ALIKE}) > 1:
        raise InvalidUsers(
            f"a user name has letters of one of {', '.join(sorted(alike))} only, which look alike; got "
            f"{ascii(name)[:80]}"
        )
    return normal


def _is_shown(character: str) -> bool:
    """Whether a character is a letter, mark or digit that one sees."""
    return unicodedata.category(character)[0] in "LMN" and not _INVISIBLE.fullmatch(character)


def _folded(name: str) -> str:
    """What two names have in common that differ in capitals or in the width or style of letters only."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())


def _alphabet(character: str) -> str:
    """The first word of a letter's name, such as LATIN; empty for what is no letter."""
    return unicodedata.name(character, "").split(" ")[0] if character.isalpha() else ""


def checked_password(password: str) -> str:
    """Return a new password; raises InvalidUsers for one that is too short, too long or no text."""
    try:
        size = len(password.encode())
    except UnicodeEncodeError as error:
        raise InvalidUsers("the password is not valid Unicode; type it again") from error
    if len(password) < _LEAST_PASSWORD or not password.strip() or size > _LONGEST_PASSWORD:
        raise InvalidUsers(
            f"a password has at least {_LEAST_PASSWORD} characters and at most {_LONGEST_PASSWORD} bytes; got "
            f"{len(password)} characters"
        )
    return password


def _hashed(password: str) -> str:
    return bcrypt.hashpw(_prepared(checked_password(password)), bcrypt.gensalt(_ROUNDS)).decode()


def _prepared(password: str) -> bytes:
    """What bcrypt gets: it ignores or refuses what lies beyond 72 bytes, and a passphrase may be longer.

    HMAC and not a bare hash, so that hashes that were stolen elsewhere cannot be tried here. Base64, for bcrypt ends at
    a null byte. One Unicode form, for keyboards differ in how they send an umlaut.
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
            # A file from before changes were counted has none.
            name: User(name, item["role"], item["password"], item.get("changes", 0))
            for name, item in listed.items()
        }
        for user in users.values():
            checked_name(user.name)
            _checked_role(user.role)
            if not _HASH.fullmatch(user.password):
                raise ValueError(f"user {user.name!r} has no hash of a password")
            if type(user.changes) is not int:
                raise ValueError(f"the changes of user {user.name!r} are no number")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InvalidUsers(
            f"the users file {path} is damaged ({type(error).__name__}: {reason}); mend it, or delete it and add the "
            "users again"
        ) from error
    return users
