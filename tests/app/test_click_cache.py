"""The cache between clicks: computes once, bounds bytes, drops idle items, and is thread-safe."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deformux_label.lib.infers.click_cache import ClickCache, ScanKey

PATIENCE_S = 120


def key(name: str, version: str = "v0001") -> ScanKey:
    return ScanKey(f"/studies/{name}", 1, 1, version, "cpu")


def sized(nbytes: int, **more: Any) -> Any:
    """Return a scan or an editor, as far as this cache knows either."""
    return SimpleNamespace(nbytes=nbytes, **more)


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def cache(clock: Clock) -> ClickCache:
    return ClickCache(1_000, idle_s=600, clock=clock)


def hold(cache: ClickCache, name: str, nbytes: int, clock: Clock) -> Any:
    clock.now += 1
    return cache.scan(key(name), lambda: sized(nbytes))


def edit(cache: ClickCache, name: str, client: str, nbytes: int, clock: Clock, mask: str = "") -> Any:
    clock.now += 1
    with cache.editor(key(name), client, mask, lambda: sized(nbytes)) as editor:
        return editor


def held(cache: ClickCache, *names: str) -> list[bool]:
    """Return which scans are held, without marking them as used."""
    return [key(name) in cache._held for name in names]


def test_the_least_recently_used_goes_first_and_never_more_than_the_bound(cache: ClickCache, clock: Clock) -> None:
    for name in "abc":
        hold(cache, name, 300, clock)
    hold(cache, "a", 300, clock)
    hold(cache, "d", 300, clock)
    assert held(cache, *"abcd") == [True, False, True, True]
    assert cache.state() == {"bytes": 900, "most_bytes": 1_000, "volumes": 3, "editors": 0, "evictions": 1}
    huge = hold(cache, "huge", 1_001, clock)
    assert huge.nbytes == 1_001, "it is used all the same"
    assert held(cache, "a", "c", "d", "huge") == [True, True, True, False]


def test_editors_go_before_their_study_and_with_it(cache: ClickCache, clock: Clock) -> None:
    hold(cache, "a", 300, clock)
    first = edit(cache, "a", "one", 200, clock)
    second = edit(cache, "a", "two", 200, clock)
    assert edit(cache, "a", "one", 200, clock) is first
    assert edit(cache, "a", "two", 200, clock, mask="another") is not second
    hold(cache, "b", 400, clock)
    assert held(cache, "a", "b") == [True, True]
    assert cache.state()["editors"] == 1, "the least recently used one is gone"
    assert edit(cache, "a", "one", 200, clock) is not first
    hold(cache, "b", 400, clock)
    hold(cache, "c", 500, clock)
    assert held(cache, "a", "b", "c") == [False, True, True]
    assert cache.state() == {"bytes": 900, "most_bytes": 1_000, "volumes": 2, "editors": 0, "evictions": 4}


def test_an_editor_that_grows_is_weighed_again(cache: ClickCache, clock: Clock) -> None:
    hold(cache, "a", 500, clock)
    hold(cache, "b", 300, clock)
    with cache.editor(key("b"), "one", "", lambda: sized(10)) as editor:
        editor.nbytes = 600
    assert held(cache, "a", "b") == [False, True]
    with cache.editor(key("b"), "one", "", lambda: sized(10)) as editor:
        editor.nbytes = 800
    assert held(cache, "b") == [True]
    assert cache.state()["editors"] == 0, "it does not fit together with its scan"


def test_unused_items_expire(cache: ClickCache, clock: Clock) -> None:
    hold(cache, "a", 100, clock)
    edit(cache, "a", "one", 50, clock)
    edit(cache, "a", "two", 50, clock)
    hold(cache, "b", 100, clock)
    clock.now += 500
    edit(cache, "a", "two", 50, clock)
    clock.now += 200
    cache.expire()
    assert held(cache, "a", "b") == [True, False]
    assert cache.state()["editors"] == 1
    clock.now += 600
    cache.expire()
    assert cache.state()["bytes"] == cache.state()["volumes"] == 0


def test_it_expires_without_any_request() -> None:
    cache = ClickCache(1_000, idle_s=0.05)
    cache.put(key("a"), sized(100))
    waited = threading.Event()
    for _ in range(PATIENCE_S * 20):
        if not cache.state()["volumes"]:
            return
        waited.wait(0.05)
    raise AssertionError("it is still there")


def test_a_study_is_computed_once_and_others_do_not_wait(cache: ClickCache) -> None:
    started, go = threading.Event(), threading.Event()
    computed = []

    def slowly() -> Any:
        started.set()
        assert go.wait(PATIENCE_S)
        computed.append(threading.get_ident())
        return sized(100)

    with ThreadPoolExecutor(9) as pool:
        waiting = [pool.submit(cache.scan, key("a"), slowly) for _ in range(8)]
        assert started.wait(PATIENCE_S)
        # Another volume is served meanwhile.
        other = pool.submit(cache.scan, key("b"), lambda: sized(100)).result(PATIENCE_S)
        assert cache.peek(key("b")) is other
        go.set()
        found = [each.result(PATIENCE_S) for each in waiting]
    assert len(computed) == 1
    assert all(each is found[0] for each in found)


def test_a_client_that_disconnects_does_not_fail_the_others(cache: ClickCache) -> None:
    started, go = threading.Event(), threading.Event()

    def leaves() -> Any:
        started.set()
        assert go.wait(PATIENCE_S)
        raise ConnectionError("gone")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(cache.scan, key("a"), leaves)
        assert started.wait(PATIENCE_S)
        second = pool.submit(cache.scan, key("a"), lambda: sized(100))
        go.set()
        assert isinstance(first.exception(PATIENCE_S), ConnectionError)
        assert second.result(PATIENCE_S) is cache.peek(key("a"))


def test_another_version_or_another_file_of_the_same_name_replaces_a_study(cache: ClickCache, tmp_path: Path) -> None:
    (tmp_path / "scan.nii").write_bytes(b"one")
    before = ScanKey.of(tmp_path / "scan.nii", "v0001", "cpu")
    assert ScanKey.of(tmp_path / "scan.nii", "v0001", "cpu") == before
    cache.put(before, sized(100))
    (tmp_path / "scan.nii").write_bytes(b"three")
    after = ScanKey.of(tmp_path / "scan.nii", "v0001", "cpu")
    assert cache.peek(after) is None
    cache.put(after, sized(100))
    assert cache.peek(before) is None
    newer = ScanKey.of(tmp_path / "scan.nii", "v0002", "cpu")
    cache.put(newer, sized(100))
    assert cache.state()["volumes"] == 1
    cache.forget_other_versions("v0003")
    assert cache.state()["volumes"] == 0


def test_many_clients_at_once() -> None:
    """In any order, a client gets the editor of its own mask and scan for itself, and the bound holds."""
    cache = ClickCache(1_000)

    def client(number: int) -> None:
        rng = random.Random(number)
        for _ in range(300):
            name, mask = rng.choice("abcdef"), rng.choice(["", "mask"])
            study = cache.scan(key(name), lambda name=name: sized(200, name=name))
            assert study.name == name
            who = f"client {rng.randrange(3)}"

            def make(name: str = name, mask: str = mask) -> Any:
                return sized(50, made_for=(name, mask), users=threading.Lock())

            with cache.editor(key(name), who, mask, make) as editor:
                assert editor.made_for == (name, mask)
                assert editor.users.acquire(blocking=False), "two threads share an editor"
                editor.nbytes = rng.randrange(400)
                editor.users.release()
            assert cache.state()["bytes"] <= 1_000

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(client, number) for number in range(8)]:
            done.result(PATIENCE_S)
