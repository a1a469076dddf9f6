"""Login tokens: signed, valid for twelve hours, and bound to the state of their user."""

from __future__ import annotations

import hashlib
import hmac
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

import jwt

from deformux_label.web.shared_json import SharedJson
from deformux_label.web.users import User, Users

__all__ = ["SECONDS", "EndedTokens", "Tokens"]

SECONDS = 12 * 3600
_ALGORITHM = "HS256"
_MAX_ENDED = 10_000
_MAX_TOKEN_LENGTH = 4_096


class Tokens:
    """JSON web tokens of the users in a file.

    A token names a user and carries a digest of their role, password hash and number of changes. When one of these
    changes, or the user is removed, the token ends at once and for good, even if the change is undone or the name is
    added again. Of its claims about the user, only the name is trusted.
    """

    def __init__(self, users: Users) -> None:
        self._users = users
        self._secret: bytes | None = None
        self._ended = EndedTokens(users.path.with_name(f"{users.path.name}.ended"))

    def make(self, user: User) -> str:
        """Return a token for a user who gave the correct password."""
        now = int(time.time())
        claims = {
            "sub": user.name,
            "iat": now,
            "exp": now + SECONDS,
            "jti": uuid.uuid4().hex,
            "state": self._state(user),
        }
        return jwt.encode(claims, self._key(), _ALGORITHM)

    def user(self, token: str) -> User | None:
        """Return the user of a token; None if it is forged, expired or ended."""
        claims = self._claims(token)
        if claims is None or claims["jti"] in self._ended:
            return None
        user = self._users.all().get(claims["sub"])
        if user is None or not hmac.compare_digest(str(claims["state"]).encode(), self._state(user).encode()):
            return None
        return user

    def end(self, token: str) -> None:
        """End one token, as a logout does."""
        claims = self._claims(token)
        if claims is not None:
            self._ended.add(claims["jti"], float(claims["exp"]))

    def _claims(self, token: str) -> dict[str, str] | None:
        if len(token) > _MAX_TOKEN_LENGTH:
            return None
        try:
            return jwt.decode(
                token,
                self._key(),
                algorithms=[_ALGORITHM],
                options={"require": ["sub", "iat", "exp", "jti", "state"]},
            )
        except (jwt.InvalidTokenError, ValueError):
            return None

    def _state(self, user: User) -> str:
        text = "\0".join((user.name, user.role, user.password, str(user.changes)))
        return hmac.digest(self._key(), text.encode(), hashlib.sha256).hex()[:32]

    def _key(self) -> bytes:
        # Not before a user exists: a server without a login writes no files.
        if self._secret is None:
            self._secret = self._users.secret()
        return self._secret


class EndedTokens:
    """Ids of tokens that a logout ended, in a file that restarts and other servers read too.

    Each id is kept until its token would have expired.
    """

    def __init__(self, path: Path) -> None:
        self._file = SharedJson(
            path,
            unreadable="Cannot read %s, so tokens that were logged out are accepted: %s",
            unwritten="Cannot write %s, so logouts hold only until this server ends: %s",
        )
        self._held: dict[str, float] = {}
        self._seen: tuple[int, int, int] | None = None
        self._lock = threading.Lock()

    def __contains__(self, token: str) -> bool:
        with self._lock:
            self._refresh()
            return token in self._held

    def add(self, token: str, until: float) -> None:
        """End a token that would be valid until ``until``, in seconds since 1970."""

        def merged() -> dict[str, float]:
            self._refresh()
            now = time.time()
            left = sorted((end, name) for name, end in self._held.items() if end > now)[-_MAX_ENDED:]
            self._held = {name: end for end, name in left}
            return self._held

        with self._lock:
            self._held[token] = until
            self._file.rewrite(merged)

    def _refresh(self) -> None:
        """Add the content of the file if it has changed."""

        def held(listed: Mapping[str, float]) -> dict[str, float]:
            return {str(name): float(end) for name, end in listed.items()}

        try:
            status = self._file.path.stat()
            version = (status.st_ino, status.st_mtime_ns, status.st_size)
        except FileNotFoundError:
            return
        except OSError:
            version = None  # ``read`` logs why
        if version is None or version != self._seen:
            self._seen = version
            self._held |= self._file.read(held) or {}
