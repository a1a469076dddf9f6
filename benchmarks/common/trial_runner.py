"""Run trials, each in a fresh process, and resume where a killed run stopped."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.common.trial_data import TrialData
from benchmarks.common.trials import Result, Tell, Trial, affordable_steps, run_trial
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from deformux.cli.common import ProgressBar
from deformux.cli.devices import torch_device
from deformux.data.volume_reader import InvalidVolume
from deformux.fitting.fit import TrainingError
from deformux.networks.model_file import InvalidModel

__all__ = ["run_trials"]

Report = Callable[[Sequence[Result]], None]
_console = Console()


def run_trials(
    trials: Sequence[Trial], data: TrialData, report: Report = lambda _: None, *, jobs: int = 1
) -> list[Result]:
    """Return the results of all trials in their order; run those that are not in the data yet.

    Several processes may share a data file and its work folder: each takes trials that no other one runs.

    Args:
        trials: what to run.
        data: finished trials, to which each new one is added, unless it is to stay as it is.
        report: called at the start and after each trial with the results so far.
        jobs: how many trials to run at a time; steps are timed before, with nothing beside them.

    Raises:
        ValueError: this machine does not have the device of a trial that is left to run.
        SystemExit: some trials failed; all others are done.
    """
    if data.complete:
        report(data.of(trials))
        return data.of(trials)
    data.work.mkdir(parents=True, exist_ok=True)
    data.merge()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with ProgressBar(*columns, TextColumn("{task.fields[left]}"), console=_console) as bar:
        queue = _Queue(trials, data, report, bar, jobs)
        for device in {trial.device for trial in queue.pending()}:
            torch_device(device)
        if jobs == 1:
            queue.work()
        else:
            queue.time_steps()
            with ThreadPoolExecutor(jobs) as pool:
                try:
                    for worker in [pool.submit(queue.work) for _ in range(jobs)]:
                        worker.result()
                except BaseException:
                    queue.stopped.set()
                    raise
    if queue.failed:
        sys.exit("failed, and tried again by the next call:\n" + "\n".join(queue.failed.values()))
    return data.of(trials)


class _Queue:
    """Trials that several threads and processes take one by one, and the progress that is shown."""

    def __init__(self, trials: Sequence[Trial], data: TrialData, report: Report, bar: Progress, jobs: int) -> None:
        self.trials, self.data, self.report, self.bar, self.jobs = trials, data, report, bar, jobs
        self.failed: dict[str, str] = {}
        self.stopped = threading.Event()
        self._parts: dict[str, float] = {}
        self._over = 0
        self._began = time.monotonic()
        self._one_at_a_time = threading.Lock()
        results = data.of(trials)
        self._task = bar.add_task("", total=len(trials), completed=len(results), left="")
        report(results)

    def pending(self) -> list[Trial]:
        return [t for t in self.trials if t not in self.data and t.name not in self.failed]

    def work(self) -> None:
        """Run trials until none is left."""
        while not self.stopped.is_set() and (pending := self.pending()):
            taken = _take_first(pending, self.data)
            if taken is None:
                time.sleep(1)  # others run all that is left
                continue
            trial, lock = taken
            try:
                error = self._in_fresh_process(trial.title, _trial, trial, trial.name, self.data.work, self.jobs)
                self.data.merge()
            finally:
                lock.release()
            if not self.stopped.is_set():
                with self._one_at_a_time:
                    self._finish(trial, error)

    def time_steps(self) -> None:
        """Time the steps of trials with a budget of seconds, while nothing else runs."""
        paces = {trial.pace_name: trial for trial in self.pending() if trial.seconds is not None}
        if paces and (error := self._in_fresh_process("timing", _paces, list(paces.values()), self.data.work)):
            sys.exit(f"steps could not be timed: {error}")
        self._began = time.monotonic()

    def _finish(self, trial: Trial, error: str) -> None:
        self._over += 1
        if error:
            self.failed[trial.name] = f"{trial.title}: {error}"
        results = self.data.of(self.trials)
        self.report(results)
        left = self._move_bar()
        what = f"{error or _outcome(*self.data.of([trial]))}; {len(results)} of {len(self.trials)}"
        _console.print(f"{trial.title}: {what}{left and ', '}{left}", soft_wrap=True)

    def _show(self, title: str, what: str, part: float) -> None:
        self._parts[title] = part
        self._move_bar(description=f"{title}: {what}")

    def _move_bar(self, **changes: str) -> str:
        """Show the progress; return the time left, estimated from what was done since the first trial began."""
        running = sum(self._parts.values())
        left, done = len(self.pending()) - running, self._over + running
        time_left = ""
        if left and done:
            time_left = f"about {timedelta(seconds=round((time.monotonic() - self._began) * left / done))} left"
        completed = len(self.trials) - len(self.failed) - left
        self.bar.update(self._task, completed=completed, left=time_left, **changes)
        return time_left

    def _in_fresh_process(self, title: str, what: Callable[..., None], *arguments: object) -> str:
        """Run a function in a process whose memory is fresh; return its error, or an empty text."""
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(what, arguments, sender))
        process.start()
        sender.close()
        error = ""
        try:
            while not self.stopped.is_set():
                if not receiver.poll(1):
                    continue
                told, part = receiver.recv()
                if told == "error":
                    error = str(part)
                else:
                    self._show(title, told, part)
        except EOFError:
            process.join()
        finally:
            process.kill()
            self._parts.pop(title, None)
        return error or (f"its process ended with code {process.exitcode}" if process.exitcode else "")


def _take_first(trials: Sequence[Trial], data: TrialData) -> tuple[Trial, FileLock] | None:
    """Return the first trial that no other process runs, locked."""
    for trial in trials:
        lock = FileLock(data.work / f"{trial.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        if trial not in data:
            return trial, lock
        lock.release()
    return None


def _outcome(result: Result) -> str:
    return f"Dice {result.mean('dice'):.4f} after {result.steps} steps in {result.seconds:.0f} s"


def _child(what: Callable[..., None], arguments: Sequence[object], sender: Connection) -> None:
    def tell(told: str, part: object) -> None:
        try:
            sender.send((told, part))
        except BrokenPipeError:
            # The parent was killed: leave the cores to the run that resumes.
            os._exit(1)

    try:
        what(tell, *arguments)
    except (TrainingError, InvalidVolume, InvalidModel, OSError) as error:
        tell("error", str(error))
    except KeyboardInterrupt:
        os._exit(130)  # the parent says so


def _trial(tell: Tell, trial: Trial, name: str, folder: Path, jobs: int) -> None:
    run_trial(trial, name, folder, tell, jobs=jobs)


def _paces(tell: Tell, trials: Sequence[Trial], folder: Path) -> None:
    # The first training loads what all networks share, on a GPU also the kernels of rare augmentations. That must not
    # count as its pace.
    with TemporaryDirectory() as thrown_away:
        affordable_steps(trials[0], Path(thrown_away), lambda what, part: tell(f"warming up, {what}", part))
    for trial in trials:
        name = f"{trial.network} {trial.size}"
        affordable_steps(trial, folder, lambda what, part, name=name: tell(f"{name}, {what}", part))
