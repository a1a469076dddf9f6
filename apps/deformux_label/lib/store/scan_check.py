"""Checks of the headers of all served scans."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from deformux.data.volume_reader import InvalidVolume, open_volume
from deformux_label.lib.store.label_fields import file_state

__all__ = ["ScanChecks"]

_PAUSE_S = 0.002


class ScanChecks:
    """Header checks that read a header again only when its file has changed."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[str, str | None]] = {}
        self.reasons: Mapping[str, str] = {}
        """What is wrong with a file, by its name, as of the last check."""

    def check(self, files: Mapping[str, Path]) -> Mapping[str, str]:
        """Read the headers of new or changed files, by name, and return what is wrong with any file."""
        seen: dict[str, tuple[str, str | None]] = {}
        for name, path in files.items():
            try:
                state = file_state(path.stat())
            except OSError:
                continue
            known = self._seen.get(name)
            if known is None or known[0] != state:
                known = (state, _reason(path))
                # Yield to request threads.
                time.sleep(_PAUSE_S)
            seen[name] = known
        self._seen = seen
        self.reasons = {name: reason for name, (_, reason) in seen.items() if reason is not None}
        return self.reasons


def _reason(path: Path) -> str | None:
    try:
        with open_volume(path):
            return None
    except InvalidVolume as error:
        return str(error).removeprefix(f"{path.name} ")
