"""Trainings that were asked for, in a file: one runs at a time, in a process of its own, and none is forgotten."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from deformux.files import write_text

__all__ = ["FINISHED", "PARENT_PIPE", "AlreadyTraining", "TrainingQueue", "with_queue"]

logger = logging.getLogger(__name__)

# In MONAI Label's words, which its clients compare with: queued, running, done, failed, stopped.
QUEUED, RUNNING, DONE, FAILED, STOPPED = "SUBMITTED", "RUNNING", "DONE", "ERROR", "STOPPED"
FINISHED = (DONE, FAILED, STOPPED)
# Set for a training whose standard input ends when its server does.
PARENT_PIPE = "DEFORMUX_LABEL_PARENT_PIPE"
_KEPT = 50
_TAIL = 20
_PAUSE_S = 0.2
# A training that ends its server's start each time must not do so for ever.
_MOST_STARTS = 5


class AlreadyTraining(RuntimeError):
    """A training that somebody asked for has not finished; the message says which."""


class TrainingQueue:
    """Tasks in ``<folder>/queue.json``, their output in ``<folder>/tasks/<id>.log``.

    Any process may add, list or stop; of the servers of a project one runs the tasks. A task that its server's end
    interrupted is started again by the next server, with the same id and request; the trainer resumes it.

    Args:
        folder: the project's state.
        stop_patience_s: between SIGTERM and SIGKILL.
        on_end: called with each task that has ended, on the queue's own thread.
    """

    def __init__(
        self,
        folder: Path,
        *,
        stop_patience_s: float = 20.0,
        on_end: Callable[[Mapping[str, Any]], None] = lambda _: None,
    ) -> None:
        self.folder = folder
        self._path = folder / "queue.json"
        self._stop_patience_s = stop_patience_s
        self._on_end = on_end
        self._lock = FileLock(folder / "queue.lock")
        self._news = threading.Event()

    def start(self) -> None:
        """Run the tasks, from now on, in this process's background."""
        threading.Thread(target=self._run, name="training-queue", daemon=True).start()

    def add(self, request: Mapping[str, Any], *, automatic: bool = False, enqueue: bool = False) -> dict[str, Any]:
        """Queue a training and return its task.

        Raises:
            AlreadyTraining: one that was asked for by hand has not finished, and ``enqueue`` was not given. One that
                the server queued by itself is no obstacle: this one runs after it.
        """
        with self._changing() as state:
            if not automatic and not enqueue:
                for task in state["tasks"]:
                    if task["status"] not in FINISHED and not task["automatic"]:
                        raise AlreadyTraining(
                            f"a training is {'running' if task['status'] == RUNNING else 'waiting'} already (task "
                            f"{task['id']}); stop it first, or ask with enqueue=true to train again after it"
                        )
            task = _new_task(request, automatic)
            state["tasks"].append(task)
        self._news.set()
        return self._public(task)

    def submitted(self, every: int) -> bool:
        """Count a new label; whether a training is due: ``every`` (0 for never) of them came after the last start."""
        with self._changing() as state:
            state["new_labels"] += 1
            waiting = any(task["status"] == QUEUED for task in state["tasks"])
            return 0 < every <= state["new_labels"] and not waiting

    def tasks(self) -> list[dict[str, Any]]:
        """All that are remembered, oldest first."""
        return [self._public(task) for task in self._read()["tasks"]]

    def unfinished(self) -> dict[str, Any] | None:
        """The running task, else the next one, else None."""
        task = _unfinished(self._read()["tasks"])
        return None if task is None else self._public(task)

    def latest(self) -> dict[str, Any] | None:
        """What a client that follows its training wants: the unfinished task, else the one that ended last."""
        # From one look at the file: between two, the runner may take the task, which then is in neither.
        tasks = self._read()["tasks"]
        ended = [task for task in tasks if task["status"] in FINISHED]
        task = _unfinished(tasks) or max(ended, key=lambda t: t["ended"], default=None)
        return None if task is None else self._public(task)

    def summary(self) -> dict[str, Any]:
        """The queue's state for ``train_stats``; empty before the first training."""
        state = self._read()
        if not state["tasks"]:
            return {}
        waiting = [task["id"] for task in state["tasks"] if task["status"] == QUEUED]
        running = [task["id"] for task in state["tasks"] if task["status"] == RUNNING]
        return {"running": next(iter(running), None), "waiting": waiting, "new_labels": state["new_labels"]}

    def stop(self) -> dict[str, Any] | None:
        """Stop what runs and drop what waits; returns when it has ended: the stopped task, or None where none was."""
        with self._changing() as state:
            unfinished = [task for task in state["tasks"] if task["status"] not in FINISHED]
            for task in unfinished:
                task["stop"] = True
                if task["status"] == QUEUED:
                    _end(task, STOPPED)
        if not unfinished:
            return None
        self._news.set()
        # Twice as long as the runner needs; a server that does not run the queue must not wait for one that is gone.
        end = time.monotonic() + 2 * self._stop_patience_s
        wanted = unfinished[0]["id"]
        while (task := self._find(wanted)) is not None and task["status"] not in FINISHED and time.monotonic() < end:
            time.sleep(_PAUSE_S / 4)
        return self._public(task) if task is not None else None

    def wait(self, task_id: str) -> dict[str, Any]:
        """Wait until a task has ended."""
        while (task := self._find(task_id)) is not None and task["status"] not in FINISHED:
            time.sleep(_PAUSE_S)
        return self._public(task) if task is not None else {}

    def _run(self) -> None:
        # Several servers may serve one folder; the lock passes on when one ends, however it ends.
        only_one = FileLock(self.folder / "runner.lock", thread_local=False)
        self.folder.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                only_one.acquire(timeout=1)
                break
            except Timeout:
                continue
        self._recover()
        while True:
            task = self._take_next()
            if task is None:
                self._news.wait(_PAUSE_S)
                self._news.clear()
                continue
            try:
                self._run_task(task)
            except Exception:
                logger.exception("The training %s could not be run", task["id"])
                self._finish(task["id"], FAILED, "the training could not be started; the server's log says why")

    def _recover(self) -> None:
        with self._changing() as state:
            for task in state["tasks"]:
                if task["status"] == RUNNING:
                    again = not task.get("stop") and task["starts"] < _MOST_STARTS
                    logger.warning("The training %s was interrupted; %s", task["id"], "resuming" if again else "ended")
                    if again:
                        task["status"] = QUEUED
                    else:
                        _end(task, STOPPED if task.get("stop") else FAILED, "the training was interrupted")
            # What was interrupted comes before what waited for it.
            state["tasks"].sort(key=lambda task: 2 if task["starts"] == 0 else int(task["status"] == QUEUED))

    def _take_next(self) -> dict[str, Any] | None:
        if not any(task["status"] == QUEUED for task in self._read()["tasks"]):
            return None
        with self._changing() as state:
            for task in state["tasks"]:
                if task["status"] == QUEUED:
                    task |= {"status": RUNNING, "starts": task["starts"] + 1, "start_ts": _now()}
                    state["new_labels"] = 0
                    return dict(task)
        return None

    def _run_task(self, task: Mapping[str, Any]) -> None:
        self._wait_for_the_former(task)
        request = {**task["request"], "task_id": task["id"]}
        log = self._log(task["id"])
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "monailabel.interfaces.utils.app", "-m", "train"]
        command += ["-r", json.dumps(request, separators=(",", ":"))]
        logger.info("Starting the training %s: %s", task["id"], request)
        with log.open("ab") as output, log.open("rb") as lines:
            lines.seek(0, os.SEEK_END)
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, env=_environment(request)
            )
            self._set(task["id"], process=[process.pid, psutil.Process(process.pid).create_time()])
            stopping_since = None
            while process.poll() is None:
                _forward(lines)
                if stopping_since is None and (self._find(task["id"]) or {}).get("stop"):
                    stopping_since = time.monotonic()
                    process.terminate()
                if stopping_since is not None and time.monotonic() - stopping_since > self._stop_patience_s:
                    _kill(psutil.Process(process.pid))
                try:
                    process.wait(_PAUSE_S)
                except subprocess.TimeoutExpired:
                    continue
            _forward(lines)
        code = process.returncode
        if code == 0:
            self._finish(task["id"], DONE)
        elif stopping_since is not None:
            self._finish(task["id"], STOPPED)
        else:
            self._finish(task["id"], FAILED, _reason(code, self._details(task["id"])))

    def _wait_for_the_former(self, task: Mapping[str, Any]) -> None:
        """A training whose server was killed ends by itself; should it hang, it is ended."""
        end = time.monotonic() + 2 * self._stop_patience_s
        while (process := _alive(task.get("process"))) is not None:
            if time.monotonic() > end:
                _kill(process)
            time.sleep(_PAUSE_S)

    def _set(self, task_id: str, **values: Any) -> None:
        with self._changing() as state:
            for task in state["tasks"]:
                if task["id"] == task_id:
                    task |= values

    def _finish(self, task_id: str, status: str, error: str | None = None) -> None:
        with self._changing() as state:
            task = next(task for task in state["tasks"] if task["id"] == task_id)
            _end(task, status, error)
        logger.info("The training %s has ended: %s%s", task_id, status, f", {error}" if error else "")
        try:
            self._on_end(self._public(task))
        except Exception:
            logger.exception("What follows a training failed")

    def _find(self, task_id: str) -> dict[str, Any] | None:
        return next((task for task in self._read()["tasks"] if task["id"] == task_id), None)

    def _public(self, task: Mapping[str, Any]) -> dict[str, Any]:
        """A task as MONAI Label's clients read it; the Slicer extension fails where ``details`` is empty."""
        shown = ("id", "status", "request", "start_ts", "end_ts", "automatic", "error")
        details = self._details(task["id"]) or [task.get("error") or task["status"]]
        return {key: task[key] for key in shown if task.get(key) is not None} | {"details": details}

    def _details(self, task_id: str) -> list[str]:
        try:
            with self._log(task_id).open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - 16_384))
                return log.read().decode(errors="replace").splitlines()[-_TAIL:]
        except FileNotFoundError:
            return []

    def _log(self, task_id: str) -> Path:
        return self.folder / "tasks" / f"{task_id}.log"

    @contextmanager
    def _changing(self) -> Iterator[dict[str, Any]]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._lock:
            state = self._read()
            before = json.dumps(state)
            yield state
            finished = [task for task in state["tasks"] if task["status"] in FINISHED]
            for task in finished[:-_KEPT]:
                state["tasks"].remove(task)
                self._log(task["id"]).unlink(missing_ok=True)
            if json.dumps(state) != before:
                write_text(self._path, json.dumps(state, indent=1) + "\n")

    def _read(self) -> dict[str, Any]:
        try:
            state = json.loads(self._path.read_text())
            return {"tasks": list(state["tasks"]), "new_labels": int(state["new_labels"])}
        except FileNotFoundError:
            pass
        except (ValueError, TypeError, KeyError) as error:
            logger.error("The queue in %s cannot be read and is begun anew: %s", self._path, error)
        return {"tasks": [], "new_labels": 0}


def _unfinished(tasks: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The running task, else the first that waits."""
    by_status = {task["status"]: task for task in reversed(tasks)}
    return by_status.get(RUNNING) or by_status.get(QUEUED)


def _new_task(request: Mapping[str, Any], automatic: bool) -> dict[str, Any]:
    return {
        "id": str(uuid.uuid4()),
        "status": QUEUED,
        "request": dict(request),
        "start_ts": _now(),
        "automatic": automatic,
        "starts": 0,
    }


def _end(task: dict[str, Any], status: str, error: str | None = None) -> None:
    task |= {"status": status, "end_ts": _now(), "ended": time.time(), "error": error}


def _now() -> str:
    return datetime.now().strftime("%Y-%m-%d %H:%M:%S")


def _environment(request: Mapping[str, Any]) -> dict[str, str]:
    environment = {**os.environ, PARENT_PIPE: "1", "MONAI_LABEL_DATASTORE_AUTO_RELOAD": "false"}
    gpus = request.get("gpus") or "all"
    if gpus != "all":
        environment["CUDA_VISIBLE_DEVICES"] = str(gpus)
    return environment


def _forward(lines: Any) -> None:
    """Into the server's own log, as MONAI Label does."""
    for line in lines.read().decode(errors="replace").splitlines():
        if line.strip():
            logging.getLogger("task_train").info(line.rstrip())


def _alive(identity: list[Any] | None) -> psutil.Process | None:
    """The process of a number and a start; numbers are used again."""
    try:
        if identity is None:
            return None
        process = psutil.Process(identity[0])
        if process.create_time() != identity[1] or process.status() == psutil.STATUS_ZOMBIE:
            return None
    except psutil.NoSuchProcess:
        return None
    return process


def _kill(process: psutil.Process) -> None:
    """With the workers that it started."""
    try:
        family = [*process.children(recursive=True), process]
    except psutil.NoSuchProcess:
        return
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue


def _reason(code: int, details: list[str]) -> str:
    if code < 0:
        name = signal.Signals(-code).name
        hint = ", perhaps because the memory was full" if -code == signal.SIGKILL else ""
        return f"the training was killed ({name}{hint}); the next one continues from its last checkpoint"
    return details[-1] if details else f"the training ended with exit code {code}"


def with_queue(stats: Mapping[str, Any], queue: TrainingQueue) -> dict[str, Any]:
    """``train_stats`` of the task that a client follows, with the queue's state.

    The trainer's own stats are those of the last training that came far enough to write some: before that, or when it
    failed on the way there, they would show the training before.
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
