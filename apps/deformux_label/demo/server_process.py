"""A server in a separate process, and an HTTP client that acts like an annotation program."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.request import HTTPSHandler, ProxyHandler, build_opener

from monailabel.client import MONAILabelClient
from monailabel.client.client import MONAILabelClientException, MONAILabelError, MONAILabelUtils

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["AnnotationClient", "PlayerError", "Server", "ServerProcess", "free_port", "serve_command"]

_TRAINING_DONE = {"DONE", "ERROR"}


class PlayerError(RuntimeError):
    """The server or a request failed; the message is one sentence for the user."""


def free_port() -> int:
    """Return an unused TCP port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def serve_command(options: Mapping[str, str]) -> list[str]:
    """Return the command line of `deformux-label serve`; `options` are its options without dashes."""
    # not the installed script: it need not be on the PATH
    command = [sys.executable, "-c", "from deformux_label.cli.main import app; app()", "serve"]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", value]
    return command


class ServerProcess:
    """A server on a free port, in its own process group; a context manager that always stops it.

    Args:
        command: starts a server in the foreground; `--host` and `--port` are added.
        log: file for the server's output.
        host: address that the server listens on; requests go to 127.0.0.1.
        scheme: `http`, or `https` with any certificate.
        environment: replaces this process's environment.
        folder: working folder of the server.
        patience_s: seconds that `start` waits for the first answer.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: Path,
        host: str = "127.0.0.1",
        scheme: str = "http",
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
        patience_s: float = 180.0,
    ) -> None:
        self.port = free_port()
        self.url = f"{scheme}://127.0.0.1:{self.port}"
        self.log = log
        self._command = [*command, "--host", host, "--port", str(self.port)]
        self._environment, self._folder, self._patience_s = environment, folder, patience_s
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """Return the started process; its id is also its process group's."""
        if self._process is None:
            raise PlayerError("the server was not started")
        return self._process

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server and wait until it answers; raise PlayerError if it does not."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._process = self._launch()
        try:
            self._wait_until_it_answers()
        except BaseException:
            self.stop()
            raise

    def _launch(self) -> subprocess.Popen[bytes]:
        with self.log.open("wb") as log:
            return subprocess.Popen(
                self._command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env=self._environment,
                cwd=self._folder,
            )

    def _wait_until_it_answers(self) -> None:
        trusting = ssl.create_default_context()
        trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
        # no proxy: the server is on this machine
        opener = build_opener(ProxyHandler({}), HTTPSHandler(context=trusting))
        end = time.monotonic() + self._patience_s
        while time.monotonic() < end:
            self.check()
            try:
                with opener.open(f"{self.url}/info/", timeout=10):
                    return
            except HTTPError as error:
                if error.code == HTTPStatus.UNAUTHORIZED:  # login is required
                    return
            except (OSError, HTTPException):
                pass  # not yet
            time.sleep(0.05)
        raise PlayerError(f"the server did not answer on {self.url} within {self._patience_s:.0f} s")

    def check(self) -> None:
        """Raise PlayerError if the server has ended unexpectedly."""
        if self._process is not None and self._process.poll() is not None:
            raise PlayerError(f"the server ended unexpectedly with exit status {self._process.returncode}")

    def tail(self, lines: int = 25) -> str:
        """Return the last lines of the server's log."""
        if not self.log.is_file():
            return ""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def stop(self, grace_s: float = 10.0) -> None:
        """End the server and all its processes with SIGTERM, then with SIGKILL."""
        process = self._process
        if process is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:
                break
            end = time.monotonic() + grace_s
            while time.monotonic() < end and _group_alive(process):
                time.sleep(0.05)
        process.wait()


class Server(ServerProcess):
    """A `deformux-label serve` process; `options` as for `serve_command`, such as `{"labels": "liver"}`."""

    def __init__(self, options: Mapping[str, str], *, log: Path, patience_s: float = 180.0) -> None:
        # Not the default users file: it belongs to the account's own servers.
        own = {"users": str(log.parent / "no-users.json")}
        super().__init__(serve_command({**own, **options}), log=log, patience_s=patience_s)


def _group_alive(process: subprocess.Popen[bytes]) -> bool:
    process.poll()  # reaps the leader, which would stay in the group as a zombie
    try:
        os.killpg(process.pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


class AnnotationClient:
    """MONAI Label's client with the calls of an annotation program; errors become PlayerError."""

    def __init__(self, server: ServerProcess, folder: Path, *, name: str = "simulated-radiologist") -> None:
        self._server = server
        self._folder = folder
        self._folder.mkdir(parents=True, exist_ok=True)
        self._name = name
        self._client = MONAILabelClient(server.url, tmpdir=str(folder), client_id=name)

    def _ask(self, what: str, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        try:
            return call(*arguments, **options)
        except MONAILabelClientException as error:
            raise PlayerError(f"{what} failed: {_reason(error)}") from error
        except (OSError, ValueError) as error:
            self._server.check()
            raise PlayerError(f"{what} failed: {error}") from error

    def info(self) -> dict[str, Any]:
        """Return the server's information: models, labels, trainers, strategies."""
        return dict(self._ask("asking for the server's information", self._client.info))

    def next_sample(self, strategy: str) -> str:
        """Return the id of the volume that `strategy` offers next; raise PlayerError if none is left."""
        sample = self._ask(f"asking for the next sample ({strategy})", self._client.next_sample, strategy, {})
        if not sample.get("id"):
            raise PlayerError("the server offered no next sample: every volume is labelled")
        return str(sample["id"])

    def infer(self, model: str, image_id: str, *, files: Sequence[Path] = ()) -> Path:
        """Return the file with the model's segmentation of a case in the studies, or of the files of one, uploaded."""
        session = self._ask(f"sending {files[0].name}", self._new_session, files) if files else None
        parameters = {"result_extension": ".nii.gz", "result_dtype": "uint8"}
        target = self._folder / f"{image_id}.nii.gz"
        try:
            result, _ = self._ask(
                f"segmenting {image_id}", self._client.infer, model, "" if session else image_id, parameters,
                session_id=session,
            )  # fmt: skip
        finally:
            if session:
                self._client.remove_session(session)
        if not result:
            raise PlayerError(f"segmenting {image_id} failed: the server returned no label file")
        shutil.move(result, target)
        return target

    def _new_session(self, files: Sequence[Path]) -> str:
        """Upload the sequences of a case, and return the id of their session; MONAI Label's client sends one file."""
        status, response, _ = MONAILabelUtils.http_upload(
            "PUT", self._server.url, "/session/", {"client_id": self._name}, [str(path) for path in files]
        )
        if status != HTTPStatus.OK:
            text = f"Status: {status}; Response: {response}"
            raise MONAILabelClientException(MONAILabelError.SERVER_ERROR, text, status, response)
        return str(json.loads(response)["session_id"])

    def submit(self, image_id: str, label: Path, labels: Sequence[str], *, model: str) -> None:
        """Submit a corrected label, as the Slicer extension does."""
        label_info = [{"name": name, "idx": value} for value, name in enumerate(labels, start=1)]
        self._ask(
            f"submitting the label of {image_id}", self._client.save_label, image_id, str(label),
            params={"label_info": label_info, "model": model, "client_id": self._name},
        )  # fmt: skip

    def train(self, model: str, parameters: Mapping[str, Any], on_progress: Callable[[float], None]) -> None:
        """Train `model` on all submitted labels and wait; `on_progress` gets the share done, 0..1."""
        self._ask("starting the training", self._client.train_start, model, dict(parameters))
        while True:
            self._server.check()
            task = self._ask("asking for the training's state", self._client.train_status)
            stats = self.info().get("train_stats", {}).get(model, {})
            on_progress(min(1.0, float(stats.get("step") or 0) / float(stats.get("total_steps") or 1)))
            if task.get("status") in _TRAINING_DONE:
                break
            time.sleep(0.5)
        if task["status"] == "ERROR":
            reason = str(stats.get("error") or "the training failed; the server's log says why")
            raise PlayerError(reason if reason.startswith("the training") else f"the training failed: {reason}")
        on_progress(1.0)


def _reason(error: MONAILabelClientException) -> str:
    """Return the server's sentence from the client's message."""
    text = str(error.msg)
    found = re.search(r"Response: (.*)", text, re.DOTALL)
    body = found.group(1) if found else text
    try:
        detail = json.loads(body)["detail"]
    except (ValueError, KeyError, TypeError):
        return text.strip() or "the server gave no reason"
    return str(detail)
