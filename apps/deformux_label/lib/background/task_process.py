"""Execution of a MONAI Label task in a separate process, which ends with its server."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from deformux_label.lib.requests.options import checked_gpus

__all__ = ["PARENT_PIPE", "PAUSE_S", "alive", "kill", "last_lines", "reason", "run_method"]

# Set in a process whose standard input closes when its server ends.
PARENT_PIPE = "DEFORMUX_LABEL_PARENT_PIPE"
PAUSE_S = 0.2
_LINES = 20
# Longest part of a log line that is sent to clients.
_MAX_LINE_LENGTH = 300


def run_method(
    method: str,
    request: Mapping[str, Any],
    log: Path,
    *,
    started: Callable[[list[float]], None],
    stop_wanted: Callable[[], bool],
    patience_s: float,
) -> tuple[int, bool]:
    """Run ``train`` or ``batch_infer`` of the app to its end; return its exit code and whether it was stopped.

    Args:
        method: name of the method in MONAI Label's ``interfaces.utils.app``.
        request: the task's request; its ``gpus`` are the GPUs that the process sees.
        log: file to which its output is appended.
        started: called with the process id and start time, which ``alive`` takes.
        stop_wanted: polled; once true, SIGTERM is sent, and SIGKILL after ``patience_s``.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "monailabel.interfaces.utils.app", "-m", method]
    command += ["-r", json.dumps(request, separators=(",", ":"))]
    stopping_since = None
    with log.open("ab") as output, log.open("rb") as lines:
        lines.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, env=_environment(request)
        )
        started([process.pid, psutil.Process(process.pid).create_time()])
        while process.poll() is None:
            _forward(lines, method)
            if stopping_since is None and stop_wanted():
                stopping_since = time.monotonic()
                process.terminate()
            if stopping_since is not None and time.monotonic() - stopping_since > patience_s:
                kill(psutil.Process(process.pid))
            try:
                process.wait(PAUSE_S)
            except subprocess.TimeoutExpired:
                continue
        _forward(lines, method)
    return process.returncode, stopping_since is not None


def alive(identity: list[Any] | None) -> psutil.Process | None:
    """Return the running process with this id and start time, else None; ids are reused."""
    try:
        if identity is None:
            return None
        process = psutil.Process(int(identity[0]))
        if process.create_time() != identity[1] or process.status() == psutil.STATUS_ZOMBIE:
            return None
    except (psutil.NoSuchProcess, ValueError, OverflowError):
        return None
    return process


def kill(process: psutil.Process) -> None:
    """Kill a process and its descendants."""
    try:
        family = [*process.children(recursive=True), process]
    except psutil.NoSuchProcess:
        return
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue


def last_lines(log: Path) -> list[str]:
    """Return the last lines of a log, short enough for a reply."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 16_384))
            lines = file.read().decode(errors="replace").splitlines()[-_LINES:]
    except OSError:
        return []
    return [line if len(line) <= _MAX_LINE_LENGTH else f"{line[:_MAX_LINE_LENGTH]}…" for line in lines]


def reason(what: str, code: int, details: list[str], hint: str) -> str:
    """Return why a process failed; ``hint`` is advice after a kill."""
    if code < 0:
        name = signal.Signals(-code).name
        memory = ", possibly out of memory" if -code == signal.SIGKILL else ""
        return f"the {what} was killed ({name}{memory}); {hint}"
    return details[-1] if details else f"the {what} ended with exit code {code}"


def _environment(request: Mapping[str, Any]) -> dict[str, str]:
    environment = {**os.environ, PARENT_PIPE: "1", "MONAI_LABEL_DATASTORE_AUTO_RELOAD": "false"}
    gpus = checked_gpus(request.get("gpus"))
    if gpus != "all":
        environment["CUDA_VISIBLE_DEVICES"] = gpus
    return environment


def _forward(lines: Any, method: str) -> None:
    """Copy new lines to the server's own log, as MONAI Label does."""
    for line in lines.read().decode(errors="replace").splitlines():
        if line.strip():
            logging.getLogger(f"task_{method}").info(line.rstrip())
