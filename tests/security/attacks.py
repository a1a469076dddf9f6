"""Helpers for attacks: snapshots of folders, raw requests, and a server on small studies."""

from __future__ import annotations

import hashlib
import os
import selectors
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import psutil
import requests
from live import LiveServer, write

__all__ = ["children", "closed", "connected", "exchange", "process_of", "refusal", "scan", "tree"]


def scan(path: Path, *shape: int, seed: int = 0) -> Path:
    """Write a small scan of noise."""
    values = np.random.default_rng(seed).normal(0, 100, shape or (12, 10, 8)).astype(np.int16)
    return write(path, values, np.eye(4))


def tree(folder: Path) -> dict[str, str]:
    """Return every path below a folder with the hash of its content, or its kind."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            what = f"link to {os.readlink(path)}"
        else:
            what = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        found[str(path.relative_to(folder))] = what
    return found


def refusal(answer: requests.Response, status: int, *words: str) -> str:
    """Return the sentence of a refusal, and check that it has the words."""
    assert answer.status_code == status, f"{answer.status_code}: {answer.text[:500]}"
    detail = answer.json()["detail"]
    assert isinstance(detail, str)
    assert "\n" not in detail
    for word in words:
        assert word in detail, detail
    return detail


def exchange(url: str, method: str, target: str, headers: Mapping[str, str] | None = None, body: bytes = b"") -> bytes:
    """Send a request exactly as written, which client libraries cannot, and return the whole answer."""
    where = urlsplit(url)
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in (headers or {}).items())]
    if not any(name.lower() == "host" for name in headers or {}):
        lines.append(f"Host: {where.netloc}")
    with socket.create_connection((where.hostname, where.port), timeout=30) as connection:
        connection.sendall("\r\n".join([*lines, "Connection: close", "", ""]).encode("latin-1") + body)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    return answer


def children(folder: Path) -> list[str]:
    """Return the names of everything below a folder except locks, also while a server removes some of it."""
    return sorted(
        str((Path(parent) / name).relative_to(folder))
        for parent, folders, files in os.walk(folder)  # unlike rglob, it takes a folder that just went for empty
        for name in (*folders, *files)
        if name != ".in-use"
    )


def connected(server: LiveServer, sent: bytes) -> socket.socket:
    where = urlsplit(server.url)
    connection = socket.create_connection((where.hostname, where.port), timeout=30)
    connection.sendall(sent)
    return connection


def closed(connections: list[socket.socket], patience_s: float, trickle: bytes = b"") -> int:
    """Return the number of connections that the server closes in time, while each sends one byte a second."""
    end = time.monotonic() + patience_s
    with selectors.DefaultSelector() as selector:
        for connection in connections:
            connection.setblocking(False)
            selector.register(connection, selectors.EVENT_READ)
        while selector.get_map() and time.monotonic() < end:
            for key, _ in selector.select(timeout=1):
                try:
                    ended = not key.fileobj.recv(65536)  # type: ignore[union-attr]
                except (BlockingIOError, InterruptedError):
                    continue
                except OSError:
                    ended = True
                if ended:
                    selector.unregister(key.fileobj)
            for key in list(selector.get_map().values()) if trickle else ():
                try:
                    key.fileobj.send(trickle)  # type: ignore[union-attr]
                except OSError:
                    continue
        return len(connections) - len(selector.get_map())


def process_of(server: LiveServer) -> psutil.Process:
    """Return the process that listens."""
    root = psutil.Process(server.process.pid)
    return next(
        process
        for process in [root, *root.children(recursive=True)]
        if any(connection.status == psutil.CONN_LISTEN for connection in process.net_connections("tcp"))
    )
