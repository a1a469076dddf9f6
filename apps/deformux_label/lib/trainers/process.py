"""How a training behaves beside the server that started it."""

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

# What an inference and the driver need, of a GPU that a training may otherwise fill.
TRAININGS_SHARE = 0.8
_PATIENCE_S = 20.0


def end_with_the_server() -> None:
    """End this process politely on SIGTERM, and also when the server that started it is gone, however it went.

    Without its server nobody would see or stop a training; the next server starts it again, and it resumes from its
    last checkpoint.
    """
    signal.signal(signal.SIGTERM, _raise_exit)
    if os.environ.get(PARENT_PIPE):
        threading.Thread(target=_wait_for_the_end_of_input, name="server-watch", daemon=True).start()


def leave_room_on_the_gpu() -> None:
    """Never take all memory of a GPU: an inference beside this training would find none.

    A training that needs more fails with a sentence, and the inference goes on; an inference that finds too little
    falls back to smaller windows, then to the CPU.
    """
    for index in range(torch.cuda.device_count()):
        torch.cuda.set_per_process_memory_fraction(TRAININGS_SHARE, index)


def _raise_exit(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _wait_for_the_end_of_input() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_PATIENCE_S)
    os._exit(128 + signal.SIGTERM)
