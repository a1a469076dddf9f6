"""The server answers while it works: the order of events with real clients, not their durations."""

from __future__ import annotations

import asyncio
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch
from live import LABELS, PATIENCE_S, LiveServer, publish_untrained, serve_command, wait_for, write, write_volume

from deformux_label.lib.infers.gpu_memory import Placement, within_memory
from deformux_label.web.inference_queue import Turns

# The smallest windows: a scan can then be as slow as a test needs, and ends as soon as its client leaves.
CONF = {"labels": ",".join(LABELS), "modality": "ct", "patch_size": "16,16,16"}


@pytest.fixture(scope="module")
def busy(start_here: Callable[..., LiveServer], tmp_path_factory: pytest.TempPathFactory) -> LiveServer:
    """Start a server with a model, a few small scans, and one whose inference takes many minutes."""
    folder = tmp_path_factory.mktemp("busy") / "studies"
    for number in range(4):
        write_volume(folder / f"small_{number}.nii.gz", folder.parent / "label.nii.gz", spacing=(4, 4, 4), seed=number)
    slow = np.random.default_rng(0).integers(-100, 100, (256, 256, 256), dtype=np.int16)
    write(folder / "slow.nii", slow, np.eye(4))
    publish_untrained(folder, CONF)
    return start_here(folder, CONF, serve_command)


class SlowInference:
    """A client that requests the slow scan over a plain connection, which it can close."""

    def __init__(self, server: LiveServer, client_id: str) -> None:
        host, port = server.url.removeprefix("http://").split(":")
        form = (
            f'--x\r\nContent-Disposition: form-data; name="params"\r\n\r\n{{"client_id": "{client_id}"}}\r\n--x--\r\n'
        )
        request = (
            f"POST /infer/segmentation?image=slow HTTP/1.1\r\nHost: {host}\r\n"
            f"Content-Type: multipart/form-data; boundary=x\r\nContent-Length: {len(form)}\r\n\r\n{form}"
        )
        self.connection = socket.create_connection((host, int(port)))
        self.connection.sendall(request.encode())
        self.connection.setblocking(False)

    def answered(self) -> bool:
        try:
            return bool(self.connection.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return False

    def leave(self) -> None:
        self.connection.close()


def inferences(server: LiveServer) -> dict[str, Any]:
    """Return the client that uses the one device, and those that wait for it."""
    return next(iter(requests.get(f"{server.url}/deformux/inferences", timeout=60).json().values()), {})


@pytest.fixture
def slow(busy: LiveServer) -> Iterator[SlowInference]:
    """Start an inference and wait until it runs."""
    logged = busy.log.read_text().count("Infer Request (final)")
    client = SlowInference(busy, "somebody slow")
    wait_for(lambda: busy.log.read_text().count("Infer Request (final)") > logged, "the slow inference starts")
    yield client
    client.leave()
    wait_for(lambda: not inferences(busy), "every inference ends")


def small(server: LiveServer, number: int, client_id: str) -> requests.Response:
    return server.infer(f"small_{number}", client_id=client_id)


def test_other_requests_are_answered_during_an_inference(busy: LiveServer, slow: SlowInference, tmp_path: Path) -> None:
    truth = write_volume(tmp_path / "image.nii.gz", tmp_path / "label.nii.gz", spacing=(4, 4, 4), seed=0)
    for _ in range(3):
        assert requests.get(f"{busy.url}/info/", timeout=60).json()["labels"] == [*LABELS, "background"]
        assert "small_1" in busy.objects()
        assert requests.post(f"{busy.url}/activelearning/first", json={}, timeout=60).json()["id"]
        image = requests.get(f"{busy.url}/datastore/image", params={"image": "slow"}, timeout=60)
        assert len(image.content) > 256**3
        assert busy.submit("small_0", truth.label).status_code == 200
    assert not slow.answered()
    shown = inferences(busy)
    assert (shown["running"], shown["waiting"]) == ("somebody slow", [])


def test_a_running_inference_shows_its_windows(busy: LiveServer, slow: SlowInference) -> None:
    wait_for(lambda: inferences(busy).get("windows_done", 0) > 1, "some windows are done")
    # 256 voxels along each axis in steps of 12, three quarters of 16.
    first = inferences(busy)
    assert first["windows"] == 21**3
    assert 0 < first["windows_done"] < first["windows"]
    assert first["seconds_left"] > 0
    wait_for(lambda: inferences(busy)["windows_done"] > first["windows_done"], "more are done")
    wait_for(lambda: re.search(r"\d+ of 9261 windows, \d+ s left", busy.log.read_text()), "the log says so too")
    left = time.monotonic()
    slow.leave()
    wait_for(lambda: not inferences(busy), "it ends")
    # It has many minutes of work left; polling takes a moment of this.
    assert time.monotonic() - left < 5


def test_a_client_that_leaves_frees_its_place(busy: LiveServer, slow: SlowInference) -> None:
    """A running one, and a waiting one."""
    second = SlowInference(busy, "impatient")
    wait_for(lambda: inferences(busy)["waiting"] == ["impatient"], "the second one waits")
    with ThreadPoolExecutor() as pool:
        third = pool.submit(small, busy, 1, "patient")
        wait_for(lambda: inferences(busy)["waiting"] == ["impatient", "patient"], "the third one waits")
        second.leave()
        wait_for(lambda: inferences(busy)["waiting"] == ["patient"], "the second one's place is free")
        assert not third.done()
        slow.leave()
        assert third.result(PATIENCE_S).status_code == 200


def test_clients_take_turns(busy: LiveServer, slow: SlowInference) -> None:
    logged = len(order_of_inferences(busy))
    arriving = ["a", "a", "a", "b", "c", "b"]
    answers: list[Future[requests.Response]] = []
    with ThreadPoolExecutor() as pool:
        for number, client in enumerate(arriving, start=1):
            answers.append(pool.submit(small, busy, number % 4, client))
            wait_for(lambda number=number: len(inferences(busy)["waiting"]) == number, "it waits")
        assert inferences(busy)["waiting"] == ["a", "b", "c", "a", "b", "a"]
        slow.leave()
        assert [answer.result(PATIENCE_S).status_code for answer in answers] == [200] * 6
    assert order_of_inferences(busy)[logged:] == ["a", "b", "c", "a", "b", "a"]


def order_of_inferences(server: LiveServer) -> list[str]:
    return re.findall(r"Infer Request: .*?'client_id': '(\w+)'", server.log.read_text())


def test_many_clients_at_once(busy: LiveServer) -> None:
    """More waiting inferences than the server has threads for anything else."""
    ready = threading.Barrier(48)

    def one(number: int) -> int:
        ready.wait()
        return small(busy, number % 4, f"client {number % 6}").status_code

    with ThreadPoolExecutor(48) as pool:
        answers = [pool.submit(one, number) for number in range(48)]
        assert requests.get(f"{busy.url}/info/", timeout=60).status_code == 200
        assert [answer.result(PATIENCE_S) for answer in answers] == [200] * 48


def test_versions_over_http(busy: LiveServer) -> None:
    studies = Path(
        requests.get(f"{busy.url}/datastore/image/info", params={"image": "slow"}, timeout=60).json()["path"]
    )
    second = publish_untrained(studies.parent, CONF)
    url = f"{busy.url}/deformux/versions"

    def served() -> str:
        return busy.infer("small_0", query={"output": "json"}).json()["model_version"]

    def change(what: str) -> tuple[int, dict[str, Any]]:
        answer = requests.post(f"{url}/{what}", timeout=60)
        return answer.status_code, answer.json()

    assert (second, served()) == ("v0002", "v0002")
    assert change("rollback") == (200, {"published": "v0001", "pinned": None})
    assert served() == "v0001"
    assert change("rollback")[0] == 409
    assert change("v0002/publish") == (200, {"published": "v0002", "pinned": None})
    assert change("v0001/pin") == (200, {"published": "v0001", "pinned": "v0001"})
    status, refusal = change("v0002/publish")
    assert (status, "pinned" in refusal["detail"]) == (409, True)
    assert served() == "v0001"
    assert change("unpin") == (200, {"published": "v0001", "pinned": None})
    listed = requests.get(url, timeout=60).json()
    assert [(version["name"], version["published"]) for version in listed["versions"]] == [
        ("v0001", True),
        ("v0002", False),
    ]
    assert len(listed["history"]) == 5
    assert requests.get(f"{url}/v0002", timeout=60).json()["card"]["labels"] == list(LABELS)
    for answer in (requests.get(f"{url}/v0009", timeout=60), requests.post(f"{url}/v0009/publish", timeout=60)):
        assert answer.status_code == 404
        assert "v0001, v0002" in answer.json()["detail"]
    assert requests.get(f"{url}/v0001/publish", timeout=60).status_code == 405
    assert served() == "v0001"


def test_nothing_of_this_was_a_server_error(busy: LiveServer) -> None:
    assert "Exception in ASGI application" not in busy.log.read_text()


def test_a_turn_that_is_given_up_as_it_comes_goes_to_the_next() -> None:
    async def scene() -> list[str]:
        turns, served = Turns(), []

        async def ask(client: str) -> None:
            end = await turns.take("gpu", client)
            served.append(client)
            end()

        end_first = await turns.take("gpu", "first")
        others = [asyncio.create_task(ask(client)) for client in ("leaves", "stays")]
        await asyncio.sleep(0)
        end_first()
        others[0].cancel()
        await asyncio.gather(*others, return_exceptions=True)
        assert turns.state() == {}
        return served

    assert asyncio.run(scene()) == ["stays"]


@pytest.mark.parametrize(
    ("fits", "expected"),
    [
        (lambda _: True, Placement((96, 96, 64), "cuda", "cuda")),
        (lambda a: a.volume_device == "cpu", Placement((96, 96, 64), "cuda", "cpu")),
        (lambda a: np.prod(a.window) <= 48 * 48 * 32, Placement((48, 48, 32), "cuda", "cpu")),
        (lambda a: a.device == "cpu", Placement((96, 96, 64), "cpu", "cpu")),
    ],
)
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("CUDNN_STATUS_ALLOC_FAILED")]
)
def test_a_full_gpu_means_a_slower_answer(
    fits: Callable[[Placement], bool], expected: Placement, error: Exception
) -> None:
    tried: list[Placement] = []

    def run(placement: Placement) -> torch.Tensor:
        tried.append(placement)
        if not fits(placement):
            raise error
        return torch.ones(())

    result, warning = within_memory(run, (96, 96, 64), "cuda")
    assert result == 1
    assert tried[-1] == expected
    assert (warning is None) == (len(tried) == 1)
    if warning:
        assert "x".join(map(str, expected.window)) in warning
        assert ("CPU" in warning) == (expected.device == "cpu")


def test_other_errors_are_not_taken_for_a_full_gpu() -> None:
    def run(placement: Placement) -> torch.Tensor:
        raise RuntimeError("the shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        within_memory(run, (96, 96, 96), "cuda")
