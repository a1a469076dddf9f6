"""MONAI Label's background processes (scoring, batch inference), made to end with the server that started them."""

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
# Runs in the new process, before anything large is imported: from here on the kernel ends it with its parent.
_LAUNCHER = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


def end_background_with_this_server() -> None:
    """Make every background process that MONAI Label starts from now on end with this process, however that ends.

    MONAI Label starts them itself, with nothing that would tell them of its end: they would work on for minutes, and
    write beside the next server. Linux ends them at once, in the middle of a volume or of their own start; elsewhere
    ``end_with_the_parent`` notices within a second.
    """
    os.environ[_SERVER] = str(os.getpid())
    async_tasks.subprocess = _Subprocess()
    # Earlier than ``atexit``: before the threads are waited for that wait for them. As concurrent.futures does it.
    threading._register_atexit(_stop_all)  # type: ignore[attr-defined]


def end_with_the_parent() -> None:
    """End this process, at any point of its work, soon after the server that started it; for a background process."""
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
    # Not politely: the work may be in a library that hears no signal. All its files are written by rename.
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
