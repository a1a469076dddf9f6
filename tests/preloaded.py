"""Python processes that start in a second: forked from one that has imported the large libraries.

Importing torch and MONAI takes seven seconds, and the tests start a hundred processes. Only libraries are imported
before the fork, nothing of this project or of MONAI Label, so that what is tested still reads its environment itself.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

# Reads a request a line: a program to start, or the id of a process of which the status is asked.
_PARENT = """
import json, os, sys, tempfile
sys.path.pop(0)
import fastapi, monai, nibabel, numpy, sklearn.mixture, torch, uvicorn
requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
for line in requests:
    request = json.loads(line)
    if "process" in request:
        ended, status = os.waitpid(request["process"], os.WNOHANG)
        print(os.waitstatus_to_exitcode(status) if ended else "null", file=answers, flush=True)
        continue
    child = os.fork()
    if child:
        print(child, file=answers, flush=True)
        continue
    requests.close(), answers.close()
    os.setsid()
    for number, path in enumerate((os.devnull, request["output"], request["errors"])):
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        os.dup2(file, number), os.close(file)
    os.chdir(request["folder"])
    os.environ.clear(), os.environ.update(request["environment"])
    tempfile.tempdir = None  # found by the parent's environment
    sys.argv = ["-c", *request["arguments"]]
    break
else:
    sys.exit()
exec(compile(request["program"], "<preloaded>", "exec"), {"__name__": "__main__"})
"""


@functools.cache
def _parent() -> tuple[subprocess.Popen[str], threading.Lock]:
    # As the server sets it, before it imports these libraries.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    command = [sys.executable, "-c", _PARENT]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, text=True, env=environment, start_new_session=True, **pipes), threading.Lock()


def _ask(request: Mapping[str, Any]) -> Any:
    parent, lock = _parent()
    assert parent.stdin is not None
    assert parent.stdout is not None
    with lock:
        parent.stdin.write(json.dumps(request) + "\n")
        parent.stdin.flush()
        return json.loads(parent.stdout.readline())


class PreloadedProcess:
    """A running ``python -c PROGRAM ARGUMENTS`` in a session of its own, with what tests use of ``Popen``.

    Its output is appended to a file, and its errors to the same or another.
    """

    def __init__(
        self,
        program: str,
        arguments: Sequence[object],
        *,
        output: Path,
        errors: Path | None = None,
        folder: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.output = output
        self.returncode: int | None = None
        self.pid: int = _ask(
            {
                "program": program,
                "arguments": [str(argument) for argument in arguments],
                "output": str(output),
                "errors": str(errors or output),
                "folder": str(folder or Path.cwd()),
                "environment": dict(environment or os.environ),
            }
        )

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal, or None while it runs."""
        if self.returncode is None:
            self.returncode = _ask({"process": self.pid})
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it has ended, and return its exit status."""
        end = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired("a preloaded process", timeout or 0.0)
            time.sleep(0.02)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL unless it has ended."""
        self.send_signal(signal.SIGKILL)

    def ended(self, timeout: float | None = None) -> str:
        """Wait until it has ended, and return its whole output."""
        self.wait(timeout)
        return self.output.read_text()


def run_preloaded(program: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, in at most 500 seconds."""
    with TemporaryDirectory() as folder:
        output, errors = (Path(folder) / name for name in ("output", "errors"))
        process = PreloadedProcess(program, arguments, output=output, errors=errors, **options)
        try:
            status = process.wait(timeout=500)
        finally:
            process.kill()
        return subprocess.CompletedProcess(arguments, status, output.read_text(), errors.read_text())


# What ``python -m deformux.cli.main`` runs; Ctrl-C ends it even where the tests run in the background of a shell.
_DEFORMUX = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
_DEFORMUX += "from deformux.cli.main import app; app()"


def start_deformux(*arguments: object, output: Path, **options: Any) -> PreloadedProcess:
    """Start a ``deformux`` command in a process of its own."""
    return PreloadedProcess(_DEFORMUX, arguments, output=output, **options)


def deformux(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a ``deformux`` command to its end."""
    return run_preloaded(_DEFORMUX, *arguments)
