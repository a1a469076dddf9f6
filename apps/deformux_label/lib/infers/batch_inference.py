"""Batch inference in a background process, with an outcome for each volume."""

from __future__ import annotations

import errno
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastapi import HTTPException
from monailabel.interfaces.datastore import Datastore, DefaultLabelTag

from deformux_label.lib.background.task_process import PAUSE_S, alive, last_lines, reason, run_method
from deformux_label.lib.requests.identifiers import checked_text, refuse_invalid_text
from deformux_label.lib.requests.options import checked_device, checked_gpus, one_of
from deformux_label.lib.store.state import StateDatabase
from deformux_label.lib.store.tasks import DONE, FAILED, FINISHED, RUNNING, STOPPED, Tasks, end, new_task, unfinished

__all__ = ["BatchInferences", "batch_options", "images_of", "run_batch"]

logger = logging.getLogger(__name__)

_IMAGES = ("all", "labeled", "unlabeled")
_ORIGINAL = DefaultLabelTag.ORIGINAL.value
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_KEPT = 10
_MAX_SENTENCE_LENGTH = 300
_INTERRUPTED = "the batch inference was interrupted when its server ended; start it again for the volumes that are left"
# Seconds after which a task without a process counts as lost: its server ended before starting one.
_STARTING_S = 60.0


class BatchInferences:
    """Batch inferences, one at a time; the project's database stores them, and the outcome of each volume.

    Args:
        folder: state folder of the project.
        stop_patience_s: seconds between SIGTERM and SIGKILL.
    """

    def __init__(self, folder: Path, *, stop_patience_s: float = 20.0) -> None:
        self.folder = folder
        self.state = StateDatabase(folder)
        self._tasks = Tasks(self.state, "batch")
        self._stop_patience_s = stop_patience_s
        self._own: set[str] = set()

    def start(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Start a batch inference and return its task.

        Raises:
            HTTPException: 429 while one is running.
        """
        self._fail_lost()
        task = new_task(request)
        task |= {"status": RUNNING, "starts": 1, "began": time.time()}

        def append(db: sqlite3.Connection) -> None:
            self._tasks.change_within(db, lambda tasks: _append(tasks, task))
            db.execute("DELETE FROM results WHERE task NOT IN (SELECT id FROM tasks WHERE kind = 'batch')")

        self._own.add(task["id"])
        self.state.change(append)
        threading.Thread(target=self._run, args=(task,), name="batch-inference", daemon=True).start()
        return self.shown(task)

    def tasks(self) -> list[dict[str, Any]]:
        """Return all stored tasks, oldest first, without the outcome of each volume."""
        self._fail_lost()
        return [self.shown(task, images=False) for task in self._tasks.read()]

    def unfinished(self) -> dict[str, Any] | None:
        """Return the running task, else None."""
        self._fail_lost()
        task = unfinished(self._tasks.read())
        return None if task is None else self.shown(task)

    def latest(self) -> dict[str, Any] | None:
        """Return the running task, else the last one, else None."""
        self._fail_lost()
        tasks = self._tasks.read()
        return self.shown(tasks[-1]) if tasks else None

    def stop(self) -> dict[str, Any] | None:
        """Stop the running task and return it once it has ended; None if none is running."""
        self._fail_lost()

        def mark(tasks: list[dict[str, Any]]) -> str | None:
            running = unfinished(tasks)
            if running is None:
                return None
            running["stop"] = True
            return str(running["id"])

        task_id = self._tasks.change(mark)
        return None if task_id is None else self.wait(task_id, 2 * self._stop_patience_s)

    def wait(self, task_id: str, most_s: float = float("inf")) -> dict[str, Any]:
        """Wait until a task has ended, and return it."""
        until = time.monotonic() + most_s
        while (task := self._tasks.find(task_id)) is not None and task["status"] not in FINISHED:
            if time.monotonic() > until:
                break
            time.sleep(PAUSE_S)
            self._fail_lost()
        return self.shown(task) if task is not None else {}

    def shown(self, task: Mapping[str, Any], *, images: bool = True) -> dict[str, Any]:
        """Return a task for clients: MONAI Label's fields, and the outcome of each volume."""
        listed = ("id", "status", "request", "start_ts", "end_ts", "error", "total")
        found = {key: task[key] for key in listed if task.get(key) is not None}
        query = "SELECT image, stored, detail FROM results WHERE task = ? ORDER BY image"
        rows = self.state.read(lambda db: db.execute(query, (task["id"],)).fetchall())
        found["stored"] = sum(stored for _, stored, _ in rows)
        found["failed"] = len(rows) - found["stored"]
        if images:
            found["images"] = {image: "stored" if stored else f"failed: {detail}" for image, stored, detail in rows}
        return found | {"details": last_lines(self._log(task["id"])) or [task.get("error") or task["status"]]}

    def _run(self, task: Mapping[str, Any]) -> None:
        try:
            code, stopped = run_method(
                "batch_infer",
                {**task["request"], "task_id": task["id"]},
                self._log(task["id"]),
                started=lambda process: self._set(task["id"], process=process),
                stop_wanted=lambda: bool((self._tasks.find(task["id"]) or {}).get("stop")),
                patience_s=self._stop_patience_s,
            )
            hint = "start it again for the volumes that are left"
            error = reason("batch inference", code, last_lines(self._log(task["id"])), hint) if code else None
            self._finish(task["id"], DONE if code == 0 else STOPPED if stopped else FAILED, None if stopped else error)
        except Exception:
            logger.exception("The batch inference %s could not be run", task["id"])
            self._finish(task["id"], FAILED, "the batch inference could not be run; the server's log says why")
        finally:
            self._own.discard(task["id"])

    def _fail_lost(self) -> None:
        """Mark tasks of killed servers as failed; their processes end by themselves."""

        def is_lost(task: Mapping[str, Any]) -> bool:
            if task["status"] != RUNNING or task["id"] in self._own or alive(task.get("process")):
                return False
            return bool(task.get("process")) or time.time() - float(task.get("began") or 0) > _STARTING_S

        if any(is_lost(task) for task in self._tasks.read()):

            def settle(tasks: list[dict[str, Any]]) -> None:
                for task in filter(is_lost, tasks):
                    end(task, FAILED, _INTERRUPTED)

            self._tasks.change(settle)

    def _set(self, task_id: str, **values: Any) -> None:
        def update(tasks: list[dict[str, Any]]) -> None:
            for task in tasks:
                if task["id"] == task_id:
                    task |= values

        self._tasks.change(update)

    def _finish(self, task_id: str, status: str, error: str | None) -> None:
        def finish(tasks: list[dict[str, Any]]) -> None:
            for task in tasks:
                if task["id"] == task_id and task["status"] not in FINISHED:
                    end(task, status, error)

        self._tasks.change(finish)
        logger.info("The batch inference %s has ended: %s%s", task_id, status, f", {error}" if error else "")

    def _log(self, task_id: str) -> Path:
        return self.folder / "tasks" / f"{task_id}.log"


def batch_options(images: Any, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the checked options of a batch inference, without those that have no effect.

    ``multi_gpu`` and ``max_workers`` are accepted without effect: volumes are segmented one at a time.

    Raises:
        HTTPException: 400 for an unknown or invalid option.
    """
    refuse_invalid_text(params)
    known = ("device", "multi_gpu", "gpus", "logging", "save_label", "label_tag", "max_workers", "max_batch_size")
    unknown = sorted(str(key) for key in params if key not in (*known, "images", "client_id"))
    if unknown:
        raise HTTPException(
            400, f"batch inference has no option {ascii(unknown[0])[:60]}; its options are {', '.join(known)}"
        )
    images = one_of("images", params.get("images") or images or "all", _IMAGES)
    if str(params.get("save_label", True)).lower() not in ("true", "1", "yes"):
        raise HTTPException(400, "save_label must be true: batch inference stores its segmentations, and returns none")
    tag = params.get("label_tag") or _ORIGINAL
    if tag != _ORIGINAL:
        raise HTTPException(
            400,
            f"label_tag must be {_ORIGINAL}: a model's proposal must not replace a submitted label; got "
            f"{ascii(tag)[:60]}",
        )
    if str(params.get("multi_gpu", True)).lower() not in ("true", "false"):
        raise HTTPException(400, f"multi_gpu must be true or false; got {ascii(params['multi_gpu'])[:60]}")
    _whole("max_workers", params.get("max_workers"))
    options = {
        "images": images,
        "device": checked_device(params.get("device")),
        "gpus": checked_gpus(params.get("gpus")),
        "logging": one_of("logging", str(params.get("logging") or "INFO").upper(), _LEVELS),
        "max_batch_size": _whole("max_batch_size", params.get("max_batch_size")),
    }
    if params.get("client_id"):
        options["client_id"] = checked_text("client_id", params["client_id"], 200)
    return options


def images_of(datastore: Datastore, request: Mapping[str, Any]) -> list[str]:
    """Return the volumes of a batch inference by name, at most ``max_batch_size`` unless that is 0."""
    which = request.get("images") or "all"
    lists = (datastore.list_images, datastore.get_labeled_images, datastore.get_unlabeled_images)
    images = sorted(dict(zip(_IMAGES, lists, strict=True))[which]())
    return images[: request.get("max_batch_size") or None]


def run_batch(folder: Path, task_id: str | None, images: Sequence[str], infer: Callable[[str], Any]) -> dict[str, str]:
    """Segment volumes one after the other, continue after failures, and return the outcome of each volume.

    Args:
        folder: state folder of the project, which stores the outcomes of the task ``task_id``.
        infer: segments a volume and stores the label.
    """
    state = StateDatabase(folder)
    if task_id is not None:
        BatchInferences(folder)._set(task_id, total=len(images))
    outcomes = {}
    for number, image in enumerate(images, start=1):
        error = _outcome(image, infer)
        outcomes[image] = error or "stored"
        logger.info("%d of %d: %s: %s", number, len(images), image, outcomes[image])
        if task_id is not None:
            row = (task_id, image, not error, error)
            state.change(lambda db: db.execute("INSERT OR REPLACE INTO results VALUES (?, ?, ?, ?)", row))  # noqa: B023
    return outcomes


def _outcome(image: str, infer: Callable[[str], Any]) -> str:
    """Segment a volume; return why its label could not be stored, or an empty string."""
    try:
        infer(image)
    except HTTPException as error:
        return str(error.detail)[:_MAX_SENTENCE_LENGTH]
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            # Every other volume would fail for the same reason, after its inference.
            raise SystemExit(
                "The batch inference ended: the server's disk is full; free some space and start it again"
            ) from None
        logger.exception("Batch inference of %s", image)
        return f"its file could not be read or written: {os.strerror(error.errno or 0)}"
    except Exception:
        logger.exception("Batch inference of %s", image)
        return "the inference failed; the server's log says why"
    return ""


def _append(tasks: list[dict[str, Any]], task: dict[str, Any]) -> None:
    running = unfinished(tasks)
    if running is not None:
        raise HTTPException(
            429, f"a batch inference is already running (task {running['id']}); wait for it, or stop it first"
        )
    del tasks[: max(0, len(tasks) - _KEPT + 1)]
    tasks.append(task)


def _whole(name: str, value: Any) -> int:
    if value in (None, ""):
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 1_000_000:
        raise HTTPException(400, f"{name} must be a whole number from 0 to 1000000; got {ascii(value)[:60]}")
    return value
