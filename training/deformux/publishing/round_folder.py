"""Folder of the round under way: its id and its checkpoints."""

from __future__ import annotations

import json
import logging
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deformux.data.checked_json import kept_or_made, read_checked, write_checked
from deformux.networks.model_file import remove_unfinished

__all__ = ["RoundFolder"]

logger = logging.getLogger(__name__)


class RoundFolder:
    """Keeps the id and the checkpoints of one round, from its first step until it is published or not.

    Args:
        folder: made by ``begin``, deleted by ``end``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def under_way(self) -> str | None:
        """Return the id of a round that did not end, or None."""
        return self._read().get("id")

    def begin(self, of: Mapping[str, Any]) -> str:
        """Return the id of the round under way if it has the same labels, start and options, else of a new one."""
        same = json.loads(json.dumps(of))
        before = self._read()
        if before.get("of") == same:
            remove_unfinished(self.folder)
            return str(before["id"])
        if before:
            logger.info("The interrupted training had other labels or options; starting over")
        self.end()
        run_id = uuid.uuid4().hex
        write_checked(self.folder / "run.json", {"id": run_id, "started": int(time.time()), "of": same})
        return run_id

    def kept(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return a JSON object that ``make`` returned when the round first asked for it, also after a restart."""
        return kept_or_made(self.folder / f"{name}.json", make)

    def checkpoint(self, part: int) -> Path:
        """Return the checkpoint file of a part of the round."""
        return self.folder / f"checkpoint-{part}.safetensors"

    def end(self) -> None:
        """Delete the folder: the round is over."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self) -> dict[str, Any]:
        try:
            return read_checked(self.folder / "run.json", lambda values: {"id": str(values["id"]), "of": values["of"]})
        except FileNotFoundError:
            return {}
        except ValueError as error:
            logger.warning("The record of the interrupted training is lost; starting over: %s", error)
            return {}
