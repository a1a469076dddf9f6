"""Ending MONAI Label's background processes, such as scoring, with the server that started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from monailabel.utils.async_tasks import utils as async_tasks

__all__ = ["end_background_with_this_server", "end_with_the_parent"]

_SERVER = "DEFORMUX_LABEL_SERVER"
_PAUSE_S = 0.5
# Runs in the new process before any large import; from then on the kernel ends it with its parent.
_LAUNCHER = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


def end_background_with_this_server() -> None:
    """Make background processes that MONAI Label starts from now on end with this process, however that ends.

    MONAI Label starts them without any link to itself: they would work on for minutes, and write beside the next
    server. Linux ends them at once, even in the middle of a volume; elsewhere ``end_with_the_parent`` notices within a
    second.
    """
    os.environ[_SERVER] = str(os.getpid())
    async_tasks.subprocess = _Subprocess()
    # Earlier than ``atexit``, as concurrent.futures does it: Python joins the threads that wait for them before that.
    threading._register_atexit(_stop_all)  # type: ignore[attr-defined]


def end_with_the_parent() -> None:
    """End this background process, at any point of its work, soon after the server that started it."""
    server = os.environ.get(_SERVER)
    if server and hasattr(os, "getppid"):
        threading.Thread(target=_wait_for_the_end_of, args=(int(server),), name="server-watch", daemon=True).start()


def _stop_all() -> None:
    for executor in async_tasks.background_executors.values():
        executor.shutdown(wait=False, cancel_futures=True)
    for processes in async_tasks.background_processes.values():
        for process in list(processes.values()):
            process.kill()


class _Subprocess:
    """The module ``subprocess`` as MONAI Label's background tasks use it."""

    PIPE = subprocess.PIPE
    STDOUT = subprocess.STDOUT

    @staticmethod
    def Popen(command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        if sys.platform == "linux":
            command = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *command]
        return subprocess.Popen(command, **options)


def _wait_for_the_end_of(server: int) -> None:
    while os.getppid() == server:
        time.sleep(_PAUSE_S)
    # With SIGKILL: the work may be in a library that ignores signals. All its files are written by rename.
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
