"""A server that is measured, and requests to it that must succeed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from deformux_label.cli.common import app_folder
from deformux_label.demo.server_process import PlayerError, Server
from deformux_label.lib.configs.project import Project

__all__ = ["Client", "Login", "Running", "serving", "state_of"]

_TIMEOUT_S = 600


@dataclass(frozen=True)
class Login:
    """A user of the login, and the file that holds all users."""

    name: str
    password: str
    users: Path


class Client:
    """Requests to one server; a failure ends the program with the server's sentence."""

    def __init__(self, url: str, login: Login | None = None) -> None:
        self.url = url
        self._headers: dict[str, str] = {}
        if login is not None:
            form = {"username": login.name, "password": login.password, "grant_type": "password"}
            token = self._ask("POST", "auth/token", data=form).json()["access_token"]
            self._headers = {"Authorization": f"bearer {token}"}

    def get(self, path: str) -> requests.Response:
        return self._ask("GET", path)

    def post(self, path: str, body: Mapping[str, Any] | None = None, **options: Any) -> requests.Response:
        return self._ask("POST", path, json=body, **options)

    def put(self, path: str, **options: Any) -> requests.Response:
        return self._ask("PUT", path, **options)

    def delete(self, path: str, **options: Any) -> requests.Response:
        return self._ask("DELETE", path, **options)

    def _ask(self, method: str, path: str, **options: Any) -> requests.Response:
        answer = requests.request(method, f"{self.url}/{path}", headers=self._headers, timeout=_TIMEOUT_S, **options)
        if not answer.ok:
            raise SystemExit(f"{answer.url}: {answer.status_code} {answer.text}")
        return answer


@dataclass(frozen=True)
class Running:
    """A server that answers: a client of it, seconds from its start to its first answer, and its process id."""

    client: Client
    start_s: float
    pid: int


@contextmanager
def serving(studies: Path, conf: Mapping[str, str], login: Login | None = None) -> Iterator[Running]:
    """Serve a folder until the block ends."""
    options = {"studies": str(studies), **conf, **({"users": str(login.users)} if login else {})}
    server = Server(options, log=studies.parent / "server.log", patience_s=_TIMEOUT_S)
    began = time.perf_counter()
    try:
        server.start()
    except PlayerError as error:
        raise SystemExit(f"{error}\n{server.tail()}") from error
    start_s = time.perf_counter() - began
    try:
        yield Running(Client(server.url, login), start_s, server.process.pid)
    finally:
        server.stop()


def state_of(studies: Path, conf: Mapping[str, str]) -> Path:
    """Return the folder with a server's state of a studies folder."""
    return Project.from_conf(conf).state_folder(app_folder(), str(studies))
