"""The queue of trainings while it changes between two looks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deformux_label.lib.training_queue import DONE, RUNNING, TrainingQueue


@pytest.mark.parametrize("looks", [1, 2])
@pytest.mark.parametrize("ask", [TrainingQueue.latest, TrainingQueue.unfinished])
def test_a_training_is_known_in_the_moment_in_which_it_begins(
    ask: Callable[[TrainingQueue], Any], looks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that saw the training before instead took its own for done."""
    queue = TrainingQueue(tmp_path)
    former = queue.add({"model": "segmentation"})["id"]
    queue._take_next()
    queue._finish(former, DONE)
    asked_for = queue.add({"model": "segmentation"})["id"]
    read, seen = queue._read, 0

    def read_and_then_it_begins() -> dict[str, Any]:
        nonlocal seen
        state = read()
        seen += 1
        if seen == looks:
            queue._take_next()
        return state

    monkeypatch.setattr(queue, "_read", read_and_then_it_begins)
    assert ask(queue)["id"] == asked_for
    monkeypatch.undo()
    queue._take_next()
    assert ask(queue)["status"] == RUNNING
