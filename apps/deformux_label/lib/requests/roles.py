"""Roles of users, and their order."""

from __future__ import annotations

__all__ = ["ROLES", "may"]

ROLES = ("reader", "annotator", "reviewer", "admin")
"""From lowest to highest; each role may do all that the earlier ones may."""


def may(role: str, least: str) -> bool:
    """Return whether a role may do what requires the role ``least``."""
    return ROLES.index(role) >= ROLES.index(least)
