"""A training on several devices of this machine, which one process starts, watches and stops.

That process trains on the first device and starts another process for each further one. They talk over the loopback
interface and find each other in a private folder, so that nothing listens to the network. They end with the first
process, however it ends; if one of them fails, it ends with an error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from deformux.data.cases import Case
from deformux.fitting.distributed import Ranks, connected
from deformux.fitting.fit import FitResult, TrainingError, TrainingStopped, fit
from deformux.fitting.rank_task import RankTask
from deformux.networks.deformux_net import DeformUXNet

__all__ = ["fit_on"]

logger = logging.getLogger(__name__)

_STORE = "store"
# Time for a process that lost its peer to end by itself: Gloo notices after a moment, NCCL never.
_GRACE_S = 20.0
_PAUSE_S = 0.2
# Arguments of ``fit`` for the first process only.
_OF_THE_FIRST = ("on_progress", "checkpoint", "checkpoint_seconds")
_LOOPBACK = "lo" if sys.platform == "linux" else "lo0"


def fit_on(
    devices: Sequence[str],
    network: DeformUXNet,
    cases: Sequence[Case],
    *,
    memory_share: float = 1.0,
    stop: Callable[[], bool] | None = None,
    **options: Any,
) -> FitResult:
    """Train as ``fit`` does, on several devices of this machine.

    Args:
        devices: one for each process, such as ``cuda:0`` and ``cuda:1``; with only one, this is ``fit``.
        network, cases, stop: as for ``fit``.
        memory_share: largest share of a GPU's memory for each process that this one starts.
        options: the other arguments of ``fit``.

    Raises:
        TrainingStopped, TrainingError: as ``fit``, or a process ended unexpectedly.
        ValueError: the volumes of a step cannot be divided among the devices, or the network is one of the ablations.
    """
    if len(devices) == 1:
        return fit(network, cases, device=devices[0], stop=stop, **options)
    threads = torch.get_num_threads()
    # Processors are shared, GPUs are not.
    own_threads = max(1, threads // len(devices)) if devices[0] == "cpu" else threads
    shared = {name: value for name, value in options.items() if name not in _OF_THE_FIRST}
    task = RankTask(RankTask.describe(network), cases, can_stop=stop is not None, **shared)
    with tempfile.TemporaryDirectory(prefix="deformux-training-") as folder, _set(_environment()):
        followers = _Followers(devices, Path(folder), own_threads, memory_share)
        try:
            followers.tell(task)
            torch.set_num_threads(own_threads)
            ranks = Ranks(0, len(devices), len(devices), devices[0])
            with connected(ranks, dist.FileStore(str(Path(folder, _STORE)), len(devices))):
                result = fit(network, cases, device=devices[0], stop=stop, ranks=ranks, **options)
            followers.wait()
            return result
        except TrainingError:
            raise
        except (RuntimeError, OSError) as error:
            if reason := followers.failure(_GRACE_S / 4):
                raise TrainingError(reason) from error
            raise
        finally:
            followers.end()
            torch.set_num_threads(threads)


def _never() -> bool:
    return False


def _environment() -> dict[str, str]:
    """Return the variables that keep a process to the loopback interface."""
    return {"GLOO_SOCKET_IFNAME": _LOOPBACK, "NCCL_SOCKET_IFNAME": _LOOPBACK}


@contextmanager
def _set(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


class _Followers:
    """The processes on all devices but the first, and a thread that watches them.

    Args:
        devices: of all processes.
        folder: where they meet, and write why they ended.
        threads: number of threads of each.
        memory_share: share of its GPU's memory for each.
    """

    def __init__(self, devices: Sequence[str], folder: Path, threads: int, memory_share: float) -> None:
        self.devices, self.folder = devices, folder
        self._over = threading.Event()
        command = [sys.executable, "-m", "deformux.fitting.rank_processes"]
        self.processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, env={**os.environ, **_environment()}) for _ in devices[1:]
        ]
        self._places = [
            {
                "ranks": dataclasses.asdict(Ranks(rank, len(devices), len(devices), device)),
                "folder": str(folder),
                "threads": threads,
                "memory_share": memory_share,
            }
            for rank, device in enumerate(devices[1:], start=1)
        ]
        threading.Thread(target=self._watch, name="rank-watch", daemon=True).start()

    def tell(self, task: RankTask) -> None:
        """Send each process its place and its task, a line each; raise OSError if one has ended."""
        for process, place in zip(self.processes, self._places, strict=True):
            assert process.stdin is not None
            process.stdin.write(f"{json.dumps(place)}\n{task.to_json()}\n".encode())
            process.stdin.flush()

    def failure(self, patience_s: float) -> str | None:
        """Return why a process ended unexpectedly; None if none ends within a time."""
        until = time.monotonic() + patience_s
        while not any(process.poll() for process in self.processes):
            if time.monotonic() > until:
                return None
            time.sleep(_PAUSE_S)
        for told in sorted(self.folder.glob("error-*")):
            return told.read_text(encoding="utf-8")
        # A killed process comes first: the others ended because of it.
        ended = zip(self.processes, self.devices[1:], strict=True)
        code, device = min((process.returncode, device) for process, device in ended if process.returncode)
        how = f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended with exit code {code}"
        return f"the process that trained on {device} {how}; the next training resumes from the last checkpoint"

    def wait(self) -> None:
        """Wait until all have ended by themselves."""
        self._over.set()
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_S)

    def end(self) -> None:
        """End the processes that are left."""
        self._over.set()
        for process in self.processes:
            process.kill()
            process.wait()
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.close()

    def _watch(self) -> None:
        """End this process if it waits for one that has ended, and does not notice."""
        while not self._over.wait(_PAUSE_S):
            if not any(process.poll() for process in self.processes):
                continue
            if self._over.wait(_GRACE_S):
                return
            logger.error("The training failed: %s", self.failure(0.0))
            os._exit(1)


def _follow() -> None:
    """Train as one of the processes; the task comes through standard input, which ends with the first process."""
    # A signal to the whole group is for the first process, which tells the others.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    place = json.loads(sys.stdin.buffer.readline())
    task = RankTask.from_json(sys.stdin.buffer.readline())
    ranks, folder = Ranks(**place["ranks"]), Path(place["folder"])
    threading.Thread(target=_end_with_the_first, name="first-watch", daemon=True).start()
    torch.set_num_threads(place["threads"])
    if ranks.device != "cpu":
        torch.cuda.set_per_process_memory_fraction(place["memory_share"], ranks.device)
    try:
        with connected(ranks, dist.FileStore(str(folder / _STORE), ranks.size)):
            fit(
                DeformUXNet(**task.network),
                device=ranks.device,
                stop=_never if task.can_stop else None,
                ranks=ranks,
                **task.options(),
            )
    except TrainingStopped:
        return
    except TrainingError as error:
        (folder / f"error-{ranks.rank}").write_text(str(error), encoding="utf-8")
        raise SystemExit(1) from None


def _end_with_the_first() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    _follow()
