"""Functions that end MONAI Label's background processes, such as scoring, with their server."""

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
# Runs in the new process before any large import; afterwards the kernel ends the process with its parent.
_LAUNCHER = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


def end_background_with_this_server() -> None:
    """Make MONAI Label's later background processes end with this process, even if it is killed.

    Otherwise they would run on for minutes, and write at the same time as the next server. Linux ends them at once,
    even in the middle of a volume; elsewhere ``end_with_the_parent`` ends them within a second.
    """
    os.environ[_SERVER] = str(os.getpid())
    async_tasks.subprocess = _Subprocess()
    # ``atexit`` is too late: Python first joins the threads that wait for these processes. concurrent.futures does this
    # too.
    threading._register_atexit(_stop_all)  # type: ignore[attr-defined]


def end_with_the_parent() -> None:
    """End this background process within a second of its server, whatever it is doing."""
    server = os.environ.get(_SERVER)
    if server and hasattr(os, "getppid"):
        threading.Thread(target=_exit_after, args=(int(server),), name="server-watch", daemon=True).start()


def _stop_all() -> None:
    for executor in async_tasks.background_executors.values():
        executor.shutdown(wait=False, cancel_futures=True)
    for processes in async_tasks.background_processes.values():
        for process in list(processes.values()):
            process.kill()


class _Subprocess:
    """Replacement of the module ``subprocess`` for MONAI Label's background tasks."""

    PIPE = subprocess.PIPE
    STDOUT = subprocess.STDOUT

    @staticmethod
    def Popen(command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        if sys.platform == "linux":
            command = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *command]
        return subprocess.Popen(command, **options)


def _exit_after(server: int) -> None:
    while os.getppid() == server:
        time.sleep(_PAUSE_S)
    # SIGKILL, because a library may ignore other signals. All files are written by rename.
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
