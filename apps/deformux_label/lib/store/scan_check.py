"""Which of the scans that are served have a header that nothing can use."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from deformux.data.volume_reader import InvalidVolume, open_volume
from deformux_label.lib.store.label_fields import file_state

__all__ = ["ScanChecks"]

_PAUSE_S = 0.002


class ScanChecks:
    """Reads headers, each once for every state of its file."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[str, str | None]] = {}
        self.reasons: Mapping[str, str] = {}
        """Name of the file to what is wrong with it, as of the last look."""

    def look(self, files: Mapping[str, Path]) -> Mapping[str, str]:
        """Look at the files by name that are new or changed, and return what is wrong with any of them."""
        seen: dict[str, tuple[str, str | None]] = {}
        for name, path in files.items():
            try:
                state = file_state(path.stat())
            except OSError:
                continue
            known = self._seen.get(name)
            if known is None or known[0] != state:
                known = (state, _reason(path))
                # Requests are answered in between.
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
