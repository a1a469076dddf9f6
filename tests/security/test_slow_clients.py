"""Clients that block the server with unfinished requests or too many connections are dropped."""

from __future__ import annotations

import functools
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from attacks import closed, connected, process_of, scan
from live import CONF, WAYS, LiveServer

# The server's own limits are 15 s for headers and 20 s for a pause in a body.
_PATIENCE_S = 40


@pytest.fixture(scope="module")
def started(
    start_here: Callable[..., LiveServer], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], LiveServer]:
    """Start a server in one of two ways: once each, in whatever order tests ask for them."""

    @functools.cache
    def start(way: str) -> LiveServer:
        studies = tmp_path_factory.mktemp("patient") / "studies"
        studies.mkdir()
        scan(studies / "one.nii.gz")
        # Larger than the buffers of the two sockets between server and client.
        scan(studies / "large.nii", 200, 200, 300)
        return start_here(studies, CONF, WAYS[way])

    return start


@pytest.fixture(params=WAYS)
def patient(started: Callable[[str], LiveServer], request: pytest.FixtureRequest) -> LiveServer:
    """A server started in each of the two ways."""
    return started(request.param)


def upload(name: bytes, declared: int, sent: int) -> bytes:
    head = b'--b\r\nContent-Disposition: form-data; name="' + name + b'"; filename="a.nii"\r\n\r\n' + b"\0" * sent
    return (
        b"Host: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\nContent-Length: %d\r\n\r\n" % declared
    ) + head


def half_requests(server: LiveServer) -> list[socket.socket]:
    """Return headers and bodies that end too early, each kind on several connections."""
    chunked = b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n[1\r\n"
    kinds = [
        b"",
        b"GET /info/ HTTP/1.1\r\nHost: localhost\r\n",
        # After an answered request on the same connection.
        b"GET /auth/ HTTP/1.1\r\nHost: localhost\r\n\r\nGET /in",
        b"PUT /session/ HTTP/1.1\r\n" + upload(b"files", 10**8, 10_000),
        b"POST /infer/segmentation HTTP/1.1\r\n" + upload(b"file", 10**8, 10),
        b"POST /train/x HTTP/1.1\r\nHost: localhost\r\n" + chunked,
    ]
    return [connected(server, kind) for kind in kinds for _ in range(25)]


def test_unfinished_and_trickling_requests_end(patient: LiveServer) -> None:
    """Without limits, 400 half headers and 200 half uploads would stay forever."""
    process = process_of(patient)
    before = process.num_fds()
    half = half_requests(patient)
    trickling = [
        connected(patient, kind)
        for kind in (
            b"GET /info/ HTTP/1.1\r\nHost: localhost\r\nX: ",
            b"PUT /session/ HTTP/1.1\r\n" + upload(b"files", 10**6, 10),
        )
        for _ in range(5)
    ]
    # Others are answered meanwhile.
    assert requests.get(f"{patient.url}/info/", timeout=10).ok
    # Connections beyond the limit of an address are refused at once.
    more = [connected(patient, b"") for _ in range(460)]
    assert closed(more, 3) >= 350
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(closed, [*half, *more], _PATIENCE_S)
        dripping = pool.submit(closed, trickling, _PATIENCE_S, b"x")
        assert waiting.result() == len(half) + len(more)
        assert dripping.result() == len(trickling)
    for connection in (*half, *trickling, *more):
        connection.close()
    time.sleep(1.5)
    assert process.num_fds() <= before + 5
    assert requests.get(f"{patient.url}/info/", timeout=10).ok


def test_slow_but_honest_clients_are_served(patient: LiveServer, tmp_path: Path) -> None:
    """An upload at 10 kB a second, and a client that reads slowly."""
    volume = scan(tmp_path / "slow.nii", 40, 40, 40).read_bytes()
    body = upload(b"files", 0, 0).partition(b"\r\n\r\n")[2] + volume + b"\r\n--b--\r\n"

    def slowly() -> Iterator[bytes]:
        for start in range(0, len(body), 10_000):
            yield body[start : start + 10_000]
            time.sleep(0.5)

    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    answer = requests.put(f"{patient.url}/session/", data=slowly(), headers=kind, timeout=60)
    assert answer.status_code == 200, answer.text
    with requests.get(f"{patient.url}/datastore/image?image=large", stream=True, timeout=60) as answer:
        size = 0
        for part in answer.iter_content(2_000_000):
            size += len(part)
            time.sleep(0.5)
    assert size == int(answer.headers["content-length"])


@pytest.mark.slow
def test_a_reply_that_is_not_read_ends(patient: LiveServer) -> None:
    """It ends after a minute, and its file is closed."""
    process = process_of(patient)
    before = process.num_fds()
    stalled = [
        connected(patient, b"GET /datastore/image?image=large HTTP/1.1\r\nHost: localhost\r\n\r\n") for _ in range(5)
    ]
    time.sleep(5)
    assert process.num_fds() >= before + 5
    end = time.monotonic() + 90
    while time.monotonic() < end and process.num_fds() > before:
        time.sleep(1)
    assert process.num_fds() <= before
    for connection in stalled:
        connection.close()
