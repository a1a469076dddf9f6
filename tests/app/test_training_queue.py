"""The queue of trainings: changes between two reads, what is stored, and when a training is due."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi import HTTPException

from deformux_label.lib.trainers.queue import DONE, RUNNING, AlreadyTraining, TrainingQueue
from deformux_label.lib.trainers.status import TrainingStatus


@pytest.mark.parametrize("looks", [1, 2])
@pytest.mark.parametrize("ask", [TrainingQueue.latest, TrainingQueue.unfinished])
def test_a_training_is_known_at_the_moment_it_begins(
    ask: Callable[[TrainingQueue], Any], looks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that saw the previous training instead took its own for finished."""
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


def task(status: str = "SUBMITTED", **values: Any) -> dict[str, Any]:
    ended = {"ended": 1.0, "end_ts": "then"} if status not in ("SUBMITTED", "RUNNING") else {}
    request = {"model": "segmentation"}
    known = {"id": f"id-{status}", "status": status, "request": request, "start_ts": "then", "automatic": False}
    return {**known, "starts": 0, **ended, **values}


def test_the_queue_of_an_earlier_version_is_imported_once(tmp_path: Path) -> None:
    good = [task("DONE"), task("RUNNING", starts=1, process=[1, 2.5]), task(), task(id="auto", automatic=True)]
    bad = [
        task(id="\ud800"),
        task(id="../../x"),
        task("SLEEPING"),
        task("DONE", id="endless", ended=None),
        task(id="w", request={"model": "\udfff"}),
        task(id="p", process="all"),
        {"id": "bare"},
        None,
    ]
    file = tmp_path / "queue.json"
    file.write_text(json.dumps({"tasks": [*good, *bad], "new_labels": 2}))
    queue = TrainingQueue(tmp_path, stop_patience_s=0.1)
    assert [known["id"] for known in queue.tasks()] == ["id-DONE", "id-RUNNING", "id-SUBMITTED", "auto"]
    assert queue.summary() == {"running": "id-RUNNING", "waiting": ["id-SUBMITTED", "auto"], "new_labels": 2}
    assert len(queue.warnings()) == len(bad)
    json.dumps([queue.tasks(), queue.warnings()], ensure_ascii=False).encode()
    assert not file.exists()
    assert (tmp_path / "queue.json.taken-over").exists()
    queue._recover()
    assert queue._take_next()["id"] == "id-RUNNING", "an interrupted task comes before queued ones"  # type: ignore[index]
    queue.stop()
    again = TrainingQueue(tmp_path)
    assert {known["id"]: known["status"] for known in again.tasks()}["auto"] == "STOPPED"
    assert again.warnings() == []


def test_an_unreadable_queue_of_an_earlier_version_is_reported(tmp_path: Path) -> None:
    (tmp_path / "queue.json").write_text('{"tasks": [{"id"')
    queue = TrainingQueue(tmp_path)
    assert queue.tasks() == []
    (warning,) = queue.warnings()
    assert "queued trainings are lost" in warning
    assert len(list(tmp_path.glob("queue.json.damaged-*"))) == 1


def test_bad_records_in_the_database_are_set_aside(tmp_path: Path) -> None:
    queue = TrainingQueue(tmp_path)
    good = queue.add({"model": "segmentation"})["id"]
    db = sqlite3.connect(tmp_path / "state.sqlite")
    for number, record in enumerate(("{", "[]", json.dumps(task(request={"a": "\ud800"})), "[" * 100_000, b"\xff", 7)):
        db.execute("INSERT INTO tasks (kind, id, record) VALUES ('training', ?, ?)", (f"bad {number}", record))
    db.commit()
    db.close()
    assert [known["id"] for known in queue.tasks()] == [good]
    again = TrainingQueue(tmp_path)
    assert [known["id"] for known in again.tasks()] == [good]
    assert len(again.warnings()) == 6
    assert TrainingQueue(tmp_path).warnings() == []


def test_stored_and_returned_values_are_bounded(tmp_path: Path) -> None:
    queue = TrainingQueue(tmp_path)
    for request in ({"note": "x" * 20_000}, {"note": "\ud800"}, {"\udfff": 1}):
        with pytest.raises(HTTPException) as refused:
            queue.add(request)
        assert refused.value.status_code == 400
    deep: Any = {}
    for _ in range(5000):
        deep = {"a": deep}
    with pytest.raises(HTTPException, match="nested"):
        queue.add(deep)
    for _ in range(20):
        queue.add({"model": "segmentation", "note": "x" * 9_000}, enqueue=True)
    with pytest.raises(AlreadyTraining, match="20 trainings are already queued"):
        queue.add({"model": "segmentation"}, enqueue=True)
    log = tmp_path / "tasks" / f"{queue.tasks()[0]['id']}.log"
    log.parent.mkdir()
    log.write_text("y" * 1_000_000 + "\nlast line\n")
    assert queue.tasks()[0]["details"][-1] == "last line"
    assert len(json.dumps(queue.tasks())) < 500_000
    for _ in range(4):
        queue.stop()
        for _ in range(20):
            queue.add({"model": "segmentation"}, enqueue=True)
    assert len(queue.tasks()) == 70
    assert not log.exists(), "the log goes with its task"


def test_labels_count_once_each_and_only_if_they_changed(tmp_path: Path) -> None:
    queue = TrainingQueue(tmp_path)
    assert [queue.submitted("a", sha, 2) for sha in ("1", "1", "1", "2", "3")] == [False] * 5
    assert TrainingQueue(tmp_path).submitted("b", "1", 2), "the count survives a restart"
    assert not queue.submitted("b", "2", 0)
    queue.add({"model": "segmentation"}, automatic=True)
    assert not queue.submitted("c", "1", 2), "one is queued already"
    assert queue._take_next() is not None
    assert queue.summary()["new_labels"] == 0
    # These labels were trained on: nothing is new.
    assert [queue.submitted(image, sha, 1) for image, sha in (("a", "3"), ("b", "2"), ("c", "1"))] == [False] * 3
    assert not queue.submitted("a", "4", 2)
    assert not queue.submitted("a", "3", 1), "back to what was trained on"
    assert not queue.submitted("\ud800", "1", 1)
    assert queue.submitted("a", "5", 1)


def test_damaged_statistics_never_break_a_reply(tmp_path: Path) -> None:
    status = TrainingStatus(tmp_path / "training.json")
    status.start(total_epochs=3)
    good = json.loads(status.path.read_text())
    assert status.read()["status"] == "running"
    for content in (
        "{",
        "[]",
        "null",
        "3",
        "{}",
        "[" * 100_000,
        '{"status": "running"}',
        json.dumps({**good, "status": 3}),
        json.dumps({**good, "process": None}),
        json.dumps({**good, "process": [None, "x"]}),
        json.dumps({**good, "total_epochs": 0}),
        json.dumps({**good, "best_metric": float("nan")}),
        json.dumps({**good, "best_metric": "high"}),
        json.dumps({**good, "error": "\ud800"}),
        json.dumps({**good, "error": "x" * 2_000_000}),
        json.dumps(good)[:-10],
    ):
        status.path.write_text(content)
        assert status.read() == {}, content[:50]
    status.path.write_bytes(b"\xff\xfe\x00")
    assert status.read() == {}
    status.path.unlink()
    status.path.mkdir()
    assert status.read() == {}
