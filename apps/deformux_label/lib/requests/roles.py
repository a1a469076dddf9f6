"""The roles of users, and what each of them may do."""

from __future__ import annotations

__all__ = ["ROLES", "may"]

ROLES = ("reader", "annotator", "reviewer", "admin")
"""From the least to the most: each may do what those before it may."""


def may(role: str, least: str) -> bool:
    """Return whether a role may do what needs the role ``least``."""
    return ROLES.index(role) >= ROLES.index(least)
