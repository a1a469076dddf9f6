"""The training process: its end, and its share of a GPU."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType

import torch

from deformux_label.lib.trainers.queue import PARENT_PIPE

__all__ = ["TRAININGS_SHARE", "end_with_the_server", "leave_room_on_the_gpu"]

# The rest of a GPU's memory is left for inference and the driver.
TRAININGS_SHARE = 0.8
_PATIENCE_S = 20.0


def end_with_the_server() -> None:
    """End this process cleanly on SIGTERM, and when its server ends for any reason.

    Without its server a training could neither be seen nor stopped. The next server starts it again,
    and it resumes from its last checkpoint.
    """
    signal.signal(signal.SIGTERM, _raise_exit)
    if os.environ.get(PARENT_PIPE):
        threading.Thread(target=_exit_after_input, name="server-watch", daemon=True).start()


def leave_room_on_the_gpu() -> None:
    """Limit this process's memory on each GPU, so that simultaneous inference finds some.

    A training that needs more fails with one sentence. An inference that needs more falls back to smaller
    windows, then to the CPU.
    """
    for index in range(torch.cuda.device_count()):
        torch.cuda.set_per_process_memory_fraction(TRAININGS_SHARE, index)


def _raise_exit(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _exit_after_input() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_PATIENCE_S)
    os._exit(128 + signal.SIGTERM)
