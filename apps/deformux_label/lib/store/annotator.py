"""The annotator of a request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["annotator_of"]

_ANONYMOUS = "anonymous"


def annotator_of(request: Mapping[str, Any]) -> str:
    """Return the sender of a request: the login, which only the server writes under ``user``, else Slicer's client id.

    Without either, return ``anonymous``.
    """
    for name in (request.get("user"), request.get("client_id")):
        if isinstance(name, str) and name.strip():
            return name.strip()
    return _ANONYMOUS
