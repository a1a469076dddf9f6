"""A client with many names, or with endless requests, does not lease all volumes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import requests
from live import LABELS, LiveServer, serve_command, write

from deformux_label.lib.store.leases import MAX_LEASES, Leases

CONF = {"labels": ",".join(LABELS), "modality": "ct", "spacing": "4,4,4", "patch_size": "16,16,16"}
N_CASES = MAX_LEASES + 10
CASES = tuple(f"case_{number:03d}" for number in range(N_CASES))


@pytest.fixture(scope="module")
def server(start_here: Callable[..., LiveServer], tmp_path_factory: pytest.TempPathFactory) -> LiveServer:
    studies = tmp_path_factory.mktemp("bounds") / "studies"
    for number, name in enumerate(CASES):
        noise = np.random.default_rng(number).integers(-100, 200, (6, 6, 6)).astype(np.int16)
        write(studies / f"{name}.nii.gz", noise, np.diag([4.0, 4, 4, 1]))
    return start_here(studies, CONF, serve_command)


def ask(server: LiveServer, strategy: str = "first", /, **body: object) -> dict:
    answer = requests.post(f"{server.url}/activelearning/{strategy}", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def leases(server: LiveServer) -> list[dict]:
    return requests.get(f"{server.url}/deformux/leases", timeout=60).json()["leases"]


def test_an_address_with_changing_names_leases_a_bounded_number(server: LiveServer) -> None:
    # An address that a client sends is refused.
    spoofed = requests.post(f"{server.url}/activelearning/first", json={"_address": "10.0.0.1"}, timeout=60)
    assert spoofed.status_code == 400
    own = [ask(server, client_id=f"name {number}")["id"] for number in range(MAX_LEASES)]
    assert len(set(own)) == MAX_LEASES
    before = {lease["image"] for lease in leases(server)}
    assert before == set(own)
    for number, strategy in enumerate(("first", "random", "adaptive") * 5):
        taken = ask(server, strategy, client_id=f"other name {number}")["id"]
        assert taken == own[number], "the address's oldest come round"
    after = leases(server)
    assert {lease["image"] for lease in after} == before
    assert not any("address" in name for lease in after for name in lease), "who reads the leases sees no addresses"
    assert requests.get(f"{server.url}/info/", timeout=60).json().get("warnings", []) == []


def test_an_annotator_leases_a_bounded_number_and_others_go_on(tmp_path: Path) -> None:
    now = [1000.0]
    leases = Leases(tmp_path / "leases.json", clock=lambda: now[0])
    for number in range(MAX_LEASES):
        now[0] += 1
        assert leases.claim("greedy", CASES, address="10.0.0.1") == CASES[number]
    # A colleague on another machine gets a free one; one behind the same address takes over the oldest.
    assert leases.claim("colleague", CASES, address="10.0.0.3") == CASES[MAX_LEASES]
    now[0] += 1
    assert leases.claim("neighbour", CASES, address="10.0.0.1") == CASES[0]
    assert leases.active()[CASES[0]].annotator == "neighbour"
    leases.release(CASES[0])
    assert leases.claim("greedy", CASES, address="10.0.0.2") == CASES[0], "there is room again"
    now[0] += 1
    assert leases.claim("greedy", CASES, address="10.0.0.4") == CASES[1], "from wherever they ask"
    # With a login the address does not count: a large ward may share one.
    for number in range(MAX_LEASES + 1, N_CASES):
        assert leases.claim(f"user {number}", CASES) == CASES[number]
    assert leases.claim("one more", CASES) is None
    # Submitting frees a lease.
    leases.release(CASES[3])
    assert leases.claim("greedy", CASES) == CASES[3]
    now[0] += 3601
    assert leases.claim("neighbour", CASES, address="10.0.0.1") == CASES[0], "all have expired"
    assert set(leases.active()) == {CASES[0]}


def test_an_address_that_is_not_text_counts_as_one(tmp_path: Path) -> None:
    leases = Leases(tmp_path / "leases.json", most=2)
    given = [
        leases.claim(f"name {n}", CASES, address=address) for n, address in enumerate(("\ud800", "x" * 5000, "\0"))
    ]
    assert given == [CASES[0], CASES[1], CASES[0]]


def test_names_that_are_not_text_lease_nothing(server: LiveServer) -> None:
    before = leases(server)
    for name in ("\ud800", "a\u0000b", "x" * 5000):
        answer = requests.post(
            f"{server.url}/activelearning/first",
            data=json.dumps({"client_id": name}),
            headers={"content-type": "application/json"},
            timeout=60,
        )
        assert answer.status_code == 400, answer.text
    assert leases(server) == before
