"""Background tasks, one row each in the project's database."""

from __future__ import annotations

import json
import sqlite3
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, TypeVar

from fastapi import HTTPException

from deformux_label.lib.requests.identifiers import is_text, refuse_invalid_text
from deformux_label.lib.store.state import StateDatabase

__all__ = [
    "DONE",
    "FAILED",
    "FINISHED",
    "QUEUED",
    "RUNNING",
    "STOPPED",
    "Tasks",
    "end",
    "fault",
    "new_task",
    "now",
    "unfinished",
]

# MONAI Label's names, which its clients compare.
QUEUED, RUNNING, DONE, FAILED, STOPPED = "SUBMITTED", "RUNNING", "DONE", "ERROR", "STOPPED"
FINISHED = (DONE, FAILED, STOPPED)

_Result = TypeVar("_Result")


class Tasks:
    """The tasks of a ``kind``, oldest first, as dictionaries."""

    def __init__(self, state: StateDatabase, kind: str) -> None:
        self.state = state
        self.kind = kind

    def read(self) -> list[dict[str, Any]]:
        """Return all tasks; an invalid record is left out."""
        rows = self.state.read(lambda db: self._rows(db).fetchall())
        tasks = [_parsed(record) for _, record in rows]
        return [task for task in tasks if isinstance(task, dict)]

    def find(self, task_id: str) -> dict[str, Any] | None:
        """Return the task with an id, or None."""
        return next((task for task in self.read() if task["id"] == task_id), None)

    def change(self, do: Callable[[list[dict[str, Any]]], _Result]) -> _Result:
        """Call ``do``, which changes the tasks in place; return its result once the changes are on disk."""
        return self.state.change(lambda db: self.change_within(db, do))

    def change_within(self, db: sqlite3.Connection, do: Callable[[list[dict[str, Any]]], _Result]) -> _Result:
        """Do the same within an open transaction."""
        before: dict[str, str] = {}
        tasks = []
        for position, record in self._rows(db).fetchall():
            task = _parsed(record)
            if isinstance(task, str):
                self.state.set_aside(db, f"tasks ({self.kind})", record, task)
                db.execute("DELETE FROM tasks WHERE position = ?", (position,))
            else:
                before[task["id"]] = record
                tasks.append(task)
        result = do(tasks)
        after = {task["id"]: json.dumps(task) for task in tasks}
        for task_id in before.keys() - after.keys():
            db.execute("DELETE FROM tasks WHERE id = ?", (task_id,))
        for task_id, record in after.items():
            if task_id not in before:
                db.execute("INSERT INTO tasks (kind, id, record) VALUES (?, ?, ?)", (self.kind, task_id, record))
            elif before[task_id] != record:
                db.execute("UPDATE tasks SET record = ? WHERE id = ?", (record, task_id))
        return result

    def _rows(self, db: sqlite3.Connection) -> sqlite3.Cursor:
        return db.execute("SELECT position, record FROM tasks WHERE kind = ? ORDER BY position", (self.kind,))


def new_task(request: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Return a queued task."""
    return {"id": str(uuid.uuid4()), "status": QUEUED, "request": dict(request), "start_ts": now(), "starts": 0, **more}


def end(task: dict[str, Any], status: str, error: str | None = None) -> None:
    """Record that a task has ended."""
    task |= {"status": status, "end_ts": now(), "ended": time.time(), "error": error}


def now() -> str:
    """Return the current time as MONAI Label writes it."""
    return datetime.now().strftime("%Y-%m-%d %H:%M:%S")


def unfinished(tasks: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the running task, else the first queued one, else None."""
    by_status = {task["status"]: task for task in reversed(tasks)}
    return by_status.get(RUNNING) or by_status.get(QUEUED)


def _parsed(record: object) -> dict[str, Any] | str:
    """Return the task of a record, or what is wrong with it."""
    try:
        task: Any = json.loads(record) if isinstance(record, str) else record
    except (ValueError, RecursionError) as error:
        return f"it is not JSON ({error})"
    return fault(task) or task


def fault(task: Any) -> str:
    """Return what is wrong with a stored task; empty if it is valid."""
    if not isinstance(task, dict):
        return "it is not an object"
    if not is_text(task.get("id"), 100) or "/" in task["id"]:
        return "its id is not text"
    if task.get("status") not in (QUEUED, RUNNING, *FINISHED):
        return f"its status is not one of {', '.join((QUEUED, RUNNING, *FINISHED))}"
    if not isinstance(task.get("request"), dict) or not isinstance(task.get("automatic", False), bool):
        return "its request is not an object"
    if not isinstance(task.get("starts"), int) or not is_text(task.get("start_ts"), 100):
        return "its starts are missing"
    if task["status"] in FINISHED and not isinstance(task.get("ended"), int | float):
        return "its end is missing"
    if not _is_process(task.get("process")) or not all(
        task.get(name) is None or isinstance(task[name], str) for name in ("error", "end_ts")
    ):
        return "its process or its error is invalid"
    try:
        refuse_invalid_text(task, name="it")
        json.dumps(task, allow_nan=False)
    except HTTPException as error:
        return str(error.detail)
    except ValueError as error:
        return str(error)
    return ""


def _is_process(identity: Any) -> bool:
    if identity is None:
        return True
    return isinstance(identity, list) and len(identity) == 2 and all(isinstance(part, int | float) for part in identity)
