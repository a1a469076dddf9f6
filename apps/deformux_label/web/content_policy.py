"""Hashes by which a content security policy allows inline scripts and styles."""

from __future__ import annotations

import base64
import hashlib

__all__ = ["source_hash"]


def source_hash(text: str) -> str:
    """Return the policy source that allows exactly one inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
