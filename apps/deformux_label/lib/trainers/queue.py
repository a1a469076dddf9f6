"""The persistent queue of trainings, which run one at a time in separate processes."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import HTTPException
from filelock import FileLock, Timeout

from deformux_label.lib.background.task_process import PARENT_PIPE, PAUSE_S, alive, kill, last_lines, reason, run_method
from deformux_label.lib.requests.identifiers import is_image_id, refuse_invalid_text
from deformux_label.lib.store.state import StateDatabase, put_aside
from deformux_label.lib.store.tasks import (
    DONE,
    FAILED,
    FINISHED,
    QUEUED,
    RUNNING,
    STOPPED,
    Tasks,
    end,
    fault,
    new_task,
    now,
    unfinished,
)

__all__ = ["DONE", "FINISHED", "PARENT_PIPE", "RUNNING", "AlreadyTraining", "TrainingQueue", "with_queue"]

logger = logging.getLogger(__name__)

_KEPT = 50
_MAX_WAITING = 20
# Characters of a request's JSON; all options together take a few hundred.
_MAX_REQUEST_LENGTH = 10_000
# Limits the restarts of a training that crashes its server.
_MAX_STARTS = 5


class AlreadyTraining(RuntimeError):
    """A requested training has not finished, or too many are queued."""


class TrainingQueue:
    """Training tasks in the project's database, with their output in ``<folder>/tasks/<id>.log``.

    Any process may add, list or stop tasks; one of a project's servers runs them. If the
    server ends during a task, the next server starts it again with the same id and request, and the trainer resumes
    it.

    Args:
        folder: the project's state folder. A ``queue.json`` of earlier versions is imported once.
        stop_patience_s: seconds between SIGTERM and SIGKILL.
        on_end: called with each ended task, on the queue's own thread.
    """

    def __init__(
        self,
        folder: Path,
        *,
        stop_patience_s: float = 20.0,
        on_end: Callable[[Mapping[str, Any]], None] = lambda _: None,
    ) -> None:
        self.folder = folder
        self.state = StateDatabase(folder, on_open=self._opened)
        self._tasks = Tasks(self.state, "training")
        self._stop_patience_s = stop_patience_s
        self._on_end = on_end
        self._wake = threading.Event()

    def start(self) -> None:
        """Start running tasks in a background thread."""
        threading.Thread(target=self._run, name="training-queue", daemon=True).start()

    def add(self, request: Mapping[str, Any], *, automatic: bool = False, enqueue: bool = False) -> dict[str, Any]:
        """Queue a training and return its task.

        Raises:
            AlreadyTraining: a training requested by hand has not finished, and ``enqueue`` is False; or the queue is
                full. After an automatic training this one is queued.
            HTTPException: 400 for a request that is too long to store.
        """
        _check_request(request)
        task = new_task(request, automatic=automatic)

        def append(tasks: list[dict[str, Any]]) -> None:
            if not automatic and not enqueue:
                _refuse_second(tasks)
            if sum(known["status"] == QUEUED for known in tasks) >= _MAX_WAITING:
                raise AlreadyTraining(f"{_MAX_WAITING} trainings are already queued; try again when some have ended")
            tasks.append(task)

        self._change(append)
        self._wake.set()
        return self._public(task)

    def submitted(self, image: str, sha256: str, every: int) -> bool:
        """Record an image's current label, and return whether a training is due.

        It is due when the labels of ``every`` images (0 for never) have changed since the last training started, and
        none is queued. An image counts once, however often it is submitted, and not with its trained label.
        """

        def count(db: sqlite3.Connection) -> int:
            db.execute(
                "INSERT INTO labels (image, current) VALUES (?, ?) "
                "ON CONFLICT (image) DO UPDATE SET current = excluded.current",
                (image, sha256),
            )
            return _new_labels(db)

        changed = self.state.change(count) if is_image_id(image) else 0
        return 0 < every <= changed and not any(task["status"] == QUEUED for task in self._read()["tasks"])

    def tasks(self) -> list[dict[str, Any]]:
        """Return all stored tasks, oldest first."""
        return [self._public(task) for task in self._read()["tasks"]]

    def unfinished(self) -> dict[str, Any] | None:
        """Return the running task, else the next one, else None."""
        task = unfinished(self._read()["tasks"])
        return None if task is None else self._public(task)

    def latest(self) -> dict[str, Any] | None:
        """Return the task that clients show: the unfinished one, else the one that ended last."""
        # Read the database once: between two reads the runner might take the task, and it would be in neither.
        tasks = self._read()["tasks"]
        ended = [task for task in tasks if task["status"] in FINISHED]
        task = unfinished(tasks) or max(ended, key=lambda t: t["ended"], default=None)
        return None if task is None else self._public(task)

    def summary(self) -> dict[str, Any]:
        """Return the queue's state for ``train_stats``; empty before the first training."""
        tasks = self._read()["tasks"]
        if not tasks:
            return {}
        waiting = [task["id"] for task in tasks if task["status"] == QUEUED]
        running = [task["id"] for task in tasks if task["status"] == RUNNING]
        new_labels = self.state.read(_new_labels)
        return {"running": next(iter(running), None), "waiting": waiting, "new_labels": new_labels}

    def stop(self) -> dict[str, Any] | None:
        """Stop the running task and drop the queued ones; wait for the end; return the first of them, or None."""

        def mark(tasks: list[dict[str, Any]]) -> list[str]:
            left = [task for task in tasks if task["status"] not in FINISHED]
            for task in left:
                task["stop"] = True
                if task["status"] == QUEUED:
                    end(task, STOPPED)
            return [task["id"] for task in left]

        stopped = self._change(mark)
        if not stopped:
            return None
        self._wake.set()
        # Twice as long as the runner needs: the queue may run in a different server, which may have ended.
        until = time.monotonic() + 2 * self._stop_patience_s
        while (task := self._find(stopped[0])) and task["status"] not in FINISHED and time.monotonic() < until:
            time.sleep(PAUSE_S / 4)
        return self._public(task) if task is not None else None

    def wait(self, task_id: str) -> dict[str, Any]:
        """Wait until a task has ended, and return it."""
        while (task := self._find(task_id)) is not None and task["status"] not in FINISHED:
            time.sleep(PAUSE_S)
        return self._public(task) if task is not None else {}

    def warnings(self) -> list[str]:
        """Return one sentence for each problem that an operator should know about."""
        return self.state.warnings()

    def _run(self) -> None:
        # Several servers may serve one folder; when one ends, even by SIGKILL, a different one gets the lock.
        only_one = FileLock(self.folder / "runner.lock", thread_local=False)
        self.folder.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                only_one.acquire(timeout=1)
                break
            except Timeout:
                continue
        self._persist(self._recover)
        while True:
            task = self._persist(self._take_next)
            if task is None:
                self._wake.wait(PAUSE_S)
                self._wake.clear()
                continue
            try:
                self._run_task(task)
            except Exception:
                logger.exception("The training %s could not be run", task["id"])
                failed = "the training could not be started; the server's log says why"
                self._persist(partial(self._finish, task["id"], FAILED, failed))

    @staticmethod
    def _persist(do: Callable[[], Any]) -> Any:
        """Retry until it succeeds: a temporarily full disk must not end the thread that runs trainings."""
        while True:
            try:
                return do()
            except (OSError, sqlite3.Error) as error:
                logger.error("Cannot write the queue of trainings (%s); retrying", error)
                time.sleep(50 * PAUSE_S)

    def _recover(self) -> None:
        def recover(tasks: list[dict[str, Any]]) -> None:
            for task in tasks:
                if task["status"] == RUNNING:
                    again = not task.get("stop") and task["starts"] < _MAX_STARTS
                    logger.warning("The training %s was interrupted; %s", task["id"], "resuming" if again else "ended")
                    if again:
                        # It is older than the queued ones, so it runs first.
                        task["status"] = QUEUED
                    else:
                        end(task, STOPPED if task.get("stop") else FAILED, "the training was interrupted")

        self._change(recover)

    def _take_next(self) -> dict[str, Any] | None:
        if not any(task["status"] == QUEUED for task in self._tasks.read()):
            return None

        def take(tasks: list[dict[str, Any]]) -> dict[str, Any] | None:
            for task in tasks:
                if task["status"] == QUEUED:
                    task |= {"status": RUNNING, "starts": task["starts"] + 1, "start_ts": now()}
                    return dict(task)
            return None

        def take_with_its_labels(db: sqlite3.Connection) -> dict[str, Any] | None:
            task = self._tasks.change_within(db, take)
            if task is not None:
                db.execute("UPDATE labels SET trained = current WHERE trained IS NOT current")
                db.execute("DELETE FROM numbers WHERE name = 'earlier_labels'")
            return task

        return self.state.change(take_with_its_labels)

    def _run_task(self, task: Mapping[str, Any]) -> None:
        self._wait_for_former_process(task)
        logger.info("Starting the training %s: %s", task["id"], task["request"])
        code, stopped = run_method(
            "train",
            {**task["request"], "task_id": task["id"]},
            self._log(task["id"]),
            started=lambda process: self._set(task["id"], process=process),
            stop_wanted=lambda: bool((self._find(task["id"]) or {}).get("stop")),
            patience_s=self._stop_patience_s,
        )
        status = DONE if code == 0 else STOPPED if stopped else FAILED
        error = None
        if status == FAILED:
            hint = "the next one continues from its last checkpoint"
            error = reason("training", code, last_lines(self._log(task["id"])), hint)
        self._persist(partial(self._finish, task["id"], status, error))

    def _wait_for_former_process(self, task: Mapping[str, Any]) -> None:
        """Wait for the process of an earlier start to end, as it does after its server; kill it if it hangs."""
        until = time.monotonic() + 2 * self._stop_patience_s
        while (process := alive(task.get("process"))) is not None:
            if time.monotonic() > until:
                kill(process)
            time.sleep(PAUSE_S)

    def _set(self, task_id: str, **values: Any) -> None:
        def update(tasks: list[dict[str, Any]]) -> None:
            for task in tasks:
                if task["id"] == task_id:
                    task |= values

        self._change(update)

    def _finish(self, task_id: str, status: str, error: str | None = None) -> None:
        def finish(tasks: list[dict[str, Any]]) -> dict[str, Any] | None:
            task = next((task for task in tasks if task["id"] == task_id), None)
            if task is not None:
                end(task, status, error)
            return task

        task = self._change(finish)
        logger.info("The training %s has ended: %s%s", task_id, status, f", {error}" if error else "")
        try:
            self._on_end(self._public(task) if task is not None else {})
        except Exception:
            logger.exception("The callback after a training failed")

    def _find(self, task_id: str) -> dict[str, Any] | None:
        return next((task for task in self._read()["tasks"] if task["id"] == task_id), None)

    def _read(self) -> dict[str, Any]:
        return {"tasks": self._tasks.read()}

    def _change(self, do: Callable[[list[dict[str, Any]]], Any]) -> Any:
        """Change the tasks, and delete the oldest finished ones."""
        dropped: list[dict[str, Any]] = []

        def change(tasks: list[dict[str, Any]]) -> Any:
            result = do(tasks)
            dropped[:] = [task for task in tasks if task["status"] in FINISHED][:-_KEPT]
            for task in dropped:
                tasks.remove(task)
            return result

        result = self._tasks.change(change)
        for task in dropped:
            self._log(task["id"]).unlink(missing_ok=True)
        return result

    def _public(self, task: Mapping[str, Any]) -> dict[str, Any]:
        """Return a task in MONAI Label's format; the Slicer extension fails if ``details`` is empty."""
        listed = ("id", "status", "request", "start_ts", "end_ts", "automatic", "error")
        details = last_lines(self._log(task["id"])) or [task.get("error") or task["status"]]
        return {key: task[key] for key in listed if task.get(key) is not None} | {"details": details}

    def _log(self, task_id: str) -> Path:
        return self.folder / "tasks" / f"{task_id}.log"

    def _opened(self, db: sqlite3.Connection) -> Callable[[], None] | None:
        """Import the file of earlier versions, keep it under a different name, and set invalid records aside."""
        after = self._import_file(db, self.folder / "queue.json")
        self._tasks.change_within(db, lambda _: None)
        return after

    def _import_file(self, db: sqlite3.Connection, path: Path) -> Callable[[], None] | None:
        try:
            state = json.loads(path.read_text())
            listed, new_labels = list(state["tasks"]), int(state.get("new_labels", 0))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError, AttributeError, OSError, RecursionError) as error:
            why = str(error)
            return lambda: self.state.warn(
                f"the queue of trainings of an earlier version cannot be read ({why}): queued trainings are lost, "
                f"so request them again; it is kept as {put_aside(path)}"
            )
        for task in listed:
            if wrong := fault(task):
                self.state.set_aside(db, "tasks (training)", task, wrong)
                continue
            values = (self._tasks.kind, task["id"], json.dumps(task))
            db.execute("INSERT OR IGNORE INTO tasks (kind, id, record) VALUES (?, ?, ?)", values)
        # It does not name the images; the next training resets this number.
        db.execute("INSERT OR REPLACE INTO numbers VALUES ('earlier_labels', ?)", (max(0, min(new_labels, 10**6)),))
        return lambda: os.replace(path, path.with_name(f"{path.name}.taken-over"))


def _new_labels(db: sqlite3.Connection) -> int:
    """Return the number of images whose label has changed since the last training started."""
    changed = db.execute("SELECT count(*) FROM labels WHERE trained IS NOT current").fetchone()[0]
    earlier = db.execute("SELECT coalesce(sum(value), 0) FROM numbers WHERE name = 'earlier_labels'").fetchone()[0]
    return int(changed) + int(earlier)


def _check_request(request: Mapping[str, Any]) -> None:
    refuse_invalid_text(request)
    length = len(json.dumps(request))
    if length > _MAX_REQUEST_LENGTH:
        raise HTTPException(
            400, f"the options of a training must be at most {_MAX_REQUEST_LENGTH} characters of JSON; got {length}"
        )


def _refuse_second(tasks: Sequence[dict[str, Any]]) -> None:
    for task in tasks:
        if task["status"] not in FINISHED and not task.get("automatic"):
            raise AlreadyTraining(
                f"a training is {'running' if task['status'] == RUNNING else 'waiting'} already (task "
                f"{task['id']}); stop it first, or send enqueue=true to train again after it"
            )


def with_queue(stats: Mapping[str, Any], queue: TrainingQueue) -> dict[str, Any]:
    """Return ``train_stats`` of the latest task, with the queue's state.

    The trainer's own stats describe the last training that wrote some. They do not describe a task that is still queued
    or that failed earlier.
    """
    task = queue.latest()
    if task is None:
        return dict(stats)
    own = {**stats, "queue": queue.summary()}
    of_this_task = stats.get("task_id") == task["id"]
    if task["status"] == DONE or (of_this_task and (task["status"] == RUNNING or stats.get("status") != "running")):
        return own
    words = {QUEUED: "queued", RUNNING: "starting", FAILED: "failed", STOPPED: "stopped"}
    started: dict[str, Any] = {"status": words[task["status"]], "epoch": 0, "total_epochs": 1, "total_time": 0}
    error = {"error": task.get("error") or "the training was stopped"} if task["status"] in FINISHED else {}
    return {**started, **error, "best_metric": 0.0, "queue": own["queue"]}
