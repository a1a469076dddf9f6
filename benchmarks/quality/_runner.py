"""Running trials one after another, each in a fresh process, and going on where a killed run stopped."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.quality._trials import Result, Trial, run_trial
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from deformux.engine import TrainingError
from deformux.transforms import InvalidVolume
from deformux.weights import InvalidModel

__all__ = ["run_trials"]

Report = Callable[[Sequence[Result]], None]
_console = Console()


def run_trials(trials: Sequence[Trial], folder: Path, report: Report = lambda results: None) -> list[Result]:
    """The results of all trials in their order; those that are in ``folder`` already are not run again.

    Several processes may share a folder: each takes what no other has in hands.

    Args:
        trials: what to run.
        folder: one JSON file per finished trial, written by rename.
        report: called at the start and after each trial with the results so far.

    Raises:
        SystemExit: some trials failed; all others are done.
    """
    folder.mkdir(parents=True, exist_ok=True)
    failed: dict[str, str] = {}
    seconds: list[float] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[left]}"), console=_console) as bar:
        task = bar.add_task("", total=len(trials), left="")
        results = _finished(trials, folder)
        report(results)
        while pending := [t for t in trials if not _file(t, folder).is_file() and t.name not in failed]:
            taken = _take_first(pending, folder)
            if taken is None:
                time.sleep(1)  # another process has all that is left in hands
            else:
                trial, lock = taken
                done, began = len(_finished(trials, folder)), time.monotonic()

                def show(what: str, part: float, trial: Trial = trial, done: int = done) -> None:
                    bar.update(task, description=f"{trial.title}: {what}", completed=done + part)

                try:
                    error = _in_fresh_process(trial, folder, show)
                finally:
                    lock.release()
                seconds.append(time.monotonic() - began)
                if error:
                    failed[trial.name] = f"{trial.title}: {error}"
            results = _finished(trials, folder)
            if taken is not None:
                report(results)
                left = _left(len(trials) - len(results) - len(failed), seconds)
                bar.update(task, completed=len(results), left=left.removeprefix(", "))
                _console.print(
                    f"{trial.title}: {error or _told(trial, folder)}; {len(results)} of {len(trials)}{left}",
                    soft_wrap=True,
                )
    if failed:
        sys.exit("failed, and tried again by the next call:\n" + "\n".join(failed.values()))
    return results


def _file(trial: Trial, folder: Path) -> Path:
    return folder / f"{trial.name}.json"


def _finished(trials: Sequence[Trial], folder: Path) -> list[Result]:
    return [Result.read(_file(trial, folder), trial) for trial in trials if _file(trial, folder).is_file()]


def _take_first(trials: Sequence[Trial], folder: Path) -> tuple[Trial, FileLock] | None:
    """The first trial that no other process has in hands, locked."""
    for trial in trials:
        lock = FileLock(folder / f"{trial.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        if not _file(trial, folder).is_file():
            return trial, lock
        lock.release()
    return None


def _left(trials: int, seconds: Sequence[float]) -> str:
    if not trials:
        return ""
    return f", about {timedelta(seconds=round(trials * sum(seconds) / len(seconds)))} left"


def _told(trial: Trial, folder: Path) -> str:
    result = Result.read(_file(trial, folder), trial)
    return f"Dice {result.mean('dice'):.4f} after {result.steps} steps in {result.seconds:.0f} s"


def _in_fresh_process(trial: Trial, folder: Path, show: Callable[[str, float], None]) -> str:
    """Run a trial where nothing else has taken memory; what went wrong, or nothing."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(trial, trial.name, folder, sender))
    process.start()
    sender.close()
    error = ""
    try:
        while True:
            what, part = receiver.recv()
            if what == "error":
                error = str(part)
            else:
                show(what, part)
    except EOFError:
        process.join()
    finally:
        process.kill()
    return error or (f"its process ended with code {process.exitcode}" if process.exitcode else "")


def _child(trial: Trial, name: str, folder: Path, sender: Connection) -> None:
    def tell(what: str, part: object) -> None:
        try:
            sender.send((what, part))
        except BrokenPipeError:
            # Killed: whoever goes on needs the cores.
            os._exit(1)

    try:
        run_trial(trial, name, folder, tell)
    except (TrainingError, InvalidVolume, InvalidModel, OSError) as error:
        tell("error", str(error))
    except KeyboardInterrupt:
        os._exit(130)  # the parent says so
