"""Shares of a folder's scans, for processes that work on it side by side, and options of their jobs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

__all__ = ["Shard", "sbatch_options"]

_T = TypeVar("_T")
_MAX_SHARDS = 100_000


@dataclass(frozen=True)
class Shard:
    """Share ``number`` of ``count``; the first is 1."""

    number: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Return the shard of an option such as ``3/8``; raise ValueError if it does not name one."""
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text.strip())
        shard = cls(int(found[1]), int(found[2])) if found else cls(0, 0)
        if not 1 <= shard.number <= shard.count <= _MAX_SHARDS:
            raise ValueError(f"--shard takes i/n with i from 1 to n, such as 3/8; got {text!r}")
        return shard

    def of(self, items: Mapping[str, _T]) -> dict[str, _T]:
        """Return every ``count``-th item; the shards of one list are disjoint and together hold all of it.

        What is done already does not count: the list alone decides, so every process finds the same shares.
        """
        return dict(list(items.items())[self.number - 1 :: self.count])

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


def sbatch_options(pairs: Sequence[str]) -> dict[str, str]:
    """Return ``name=value`` options of sbatch by name; raise ValueError if one is not of that form."""
    chosen = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not re.fullmatch(r"[a-z][a-z-]*", name) or not value or not value.isprintable():
            raise ValueError(f"--slurm takes name=value as sbatch does, without dashes before it; got {pair!r}")
        chosen[name] = value
    return chosen
