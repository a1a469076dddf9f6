"""The tokens that a login gives: signed, for twelve hours, and bound to what the users file says at that moment."""

from __future__ import annotations

import hashlib
import hmac
import time
import uuid
from collections import OrderedDict

import jwt

from .users import User, Users

__all__ = ["SECONDS", "Tokens"]

SECONDS = 12 * 3600
_ALGORITHM = "HS256"
_MOST_ENDED = 10_000
_LONGEST = 4_096


class Tokens:
    """JSON web tokens of the users in a file.

    A token names a user and carries a digest of their role and password hash: when one of these changes, or the user
    is removed, even if one of the same name is added again, the token ends at once. Nothing in it is believed beside
    the name.
    """

    def __init__(self, users: Users) -> None:
        self._users = users
        self._secret: bytes | None = None
        # Of the tokens that a logout ended; after a restart they would be good for the rest of their hours.
        self._ended: OrderedDict[str, float] = OrderedDict()

    def make(self, user: User) -> str:
        """Return a token for somebody whose password was right."""
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
        """Return whose token it is; None for one that is forged, has expired, or was ended."""
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
            self._ended[str(claims["jti"])] = float(claims["exp"])
        now = time.time()
        while self._ended and (len(self._ended) > _MOST_ENDED or next(iter(self._ended.values())) < now):
            self._ended.popitem(last=False)

    def _claims(self, token: str) -> dict[str, str] | None:
        if len(token) > _LONGEST:
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
        text = "\0".join((user.name, user.role, user.password))
        return hmac.digest(self._key(), text.encode(), hashlib.sha256).hex()[:32]

    def _key(self) -> bytes:
        # Not before there is a user: a server without a login leaves no files.
        if self._secret is None:
            self._secret = self._users.secret()
        return self._secret
