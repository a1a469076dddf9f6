"""Leases in the project's database: many processes, kill -9, bad records, damaged files, and the cost of a claim."""

from __future__ import annotations

import json
import os
import random
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fastapi import HTTPException
from live import wait_for

from deformux_label.lib.store.leases import Leases
from deformux_label.lib.store.state import StateDatabase
from deformux_label.lib.trainers.queue import TrainingQueue
from preloaded import PreloadedProcess

# Claims and queues until it is killed; each line is an acknowledgement.
CLIENT = """
import sys
from pathlib import Path
from deformux_label.lib.store.leases import Leases
from deformux_label.lib.trainers.queue import TrainingQueue

folder, name = Path(sys.argv[1]), sys.argv[2]
leases, queue = Leases(folder / "leases.json", most=10**6), TrainingQueue(folder)
cases = [f"case {number}" for number in range(100_000)]
while True:
    print(leases.claim(name, cases), flush=True)
    if len(queue.tasks()) < 15:
        print("task", queue.add({"model": "segmentation"}, enqueue=True)["id"], flush=True)
"""


def test_kill_9_loses_no_acknowledged_lease_or_task(tmp_path: Path) -> None:
    claimed: dict[str, str] = {}
    tasks: list[str] = []
    rng = random.Random(0)
    for turn in range(5):
        # Two at once, so that one is often killed while the other waits.
        names = [f"annotator {turn}-{number}" for number in range(2)]
        clients = [PreloadedProcess(CLIENT, (tmp_path, name), output=tmp_path / f"{name}.log") for name in names]
        for client in clients:
            wait_for(lambda log=client.output: "\n" in log.read_text(), "it claims a volume")
        time.sleep(rng.uniform(0.0, 0.4))
        for client in clients:
            client.kill()
        for name, client in zip(names, clients, strict=True):
            for line in client.ended().splitlines(keepends=True):
                if not line.endswith("\n"):
                    continue
                if line.startswith("task "):
                    tasks.append(line.split()[1])
                else:
                    assert line.strip() not in claimed, "no volume is leased twice"
                    claimed[line.strip()] = name
    assert len(claimed) > 50
    # Two may see 14 at once, and each killed process may have been adding one.
    assert 15 - 10 <= len(tasks) <= 16
    leases = Leases(tmp_path / "leases.json")
    active = leases.active()
    assert {case: active[case].annotator for case in claimed} == claimed
    # Each killed process may have been claiming one more.
    assert len(active) <= len(claimed) + 10
    assert {task["id"] for task in TrainingQueue(tmp_path).tasks()} >= set(tasks)
    assert leases.warnings() == []


def test_a_claim_writes_as_little_with_ten_thousand_leases(tmp_path: Path) -> None:
    cases = [f"case_{number:05d}" for number in range(10_001)]

    def written(held: int) -> int:
        """Return the bytes that one claim adds to the database's files."""
        folder = tmp_path / str(held)
        leases = Leases(folder / "leases.json")
        leases.active()
        now = time.time()
        rows = [(case, f"a{n}", "", now, now + 3600, "first", None) for n, case in enumerate(cases[:held])]
        leases.state.change(lambda db: db.executemany("INSERT INTO leases VALUES (?, ?, ?, ?, ?, ?, ?)", rows))
        leases = Leases(folder / "leases.json")
        leases.active()
        before = sum(file.stat().st_size for file in folder.glob("state.sqlite*"))
        assert leases.claim("new", cases) == cases[held]
        return sum(file.stat().st_size for file in folder.glob("state.sqlite*")) - before

    # All ten thousand rows take most of a megabyte; a row and its index entries touch a few pages of 4 kB.
    assert written(0) < 60_000
    assert written(10_000) < 60_000


def test_a_claim_sees_changes_by_other_processes(tmp_path: Path) -> None:
    mine, theirs = Leases(tmp_path / "leases.json"), Leases(tmp_path / "leases.json")
    assert mine.claim("me", ["a", "b", "c"]) == "a"
    assert theirs.claim("they", ["a", "b", "c"]) == "b"
    assert mine.claim("me", ["a", "b", "c"]) == "c"
    assert theirs.release("a") is not None
    assert set(mine.active()) == {"b", "c"}
    assert mine.others("me") == {"b"}


def test_a_release_and_a_claim_at_once_keep_both(tmp_path: Path) -> None:
    leases = [Leases(tmp_path / "leases.json") for _ in range(4)]
    cases = [f"case {number}" for number in range(60)]
    together = threading.Barrier(4)

    def work(number: int) -> None:
        together.wait()
        for _ in range(10):
            case = leases[number].claim(f"annotator {number}", cases)
            assert case is not None
            ended = leases[number].release(case)
            assert ended is not None
            assert ended.annotator == f"annotator {number}"

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert leases[0].active() == {}


def test_the_file_of_an_earlier_version_is_imported_once(tmp_path: Path) -> None:
    now = time.time()
    good = {"image": "a", "annotator": "anna", "since": now, "until": now + 60, "strategy": "first"}
    bad = [
        {**good, "image": "b", "annotator": "\ud800"},
        {**good, "image": "../c"},
        {**good, "image": "d", "until": "later"},
        {**good, "image": "e", "colour": "red"},
        ["f"],
        None,
    ]
    file = tmp_path / "leases.json"
    file.write_text(json.dumps({"leases": [good, *bad]}))
    leases = Leases(file)
    assert {image: lease.annotator for image, lease in leases.active().items()} == {"a": "anna"}
    assert len(leases.warnings()) == len(bad)
    assert all("set aside" in warning for warning in leases.warnings())
    assert json.loads((tmp_path / "leases.json.taken-over").read_text())["leases"][0] == good
    assert not file.exists()
    leases.release("a")
    assert Leases(file).active() == {}


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"leases": 3}', b"\xff\xfe"])
def test_an_unreadable_file_of_an_earlier_version_does_not_stop_the_start(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "leases.json").write_bytes(content)
    leases = Leases(tmp_path / "leases.json")
    assert leases.claim("anna", ["a"]) == "a"
    (warning,) = leases.warnings()
    assert "cannot be read" in warning
    (kept,) = tmp_path.glob("leases.json.damaged-*")
    assert kept.read_bytes() == content
    assert set(Leases(tmp_path / "leases.json").active()) == {"a"}


def test_bad_records_in_the_database_are_set_aside(tmp_path: Path) -> None:
    leases = Leases(tmp_path / "leases.json")
    assert leases.claim("anna", ["good"]) == "good"
    until = time.time() + 60
    rows = [
        ("'not a number'", "'anna'", "0", "'later'"),
        ("CAST(x'ff80' AS TEXT)", "'anna'", "0", str(until)),
        ("'annotator'", "x'00'", "0", str(until)),
        ("'a/../b'", "'anna'", "0", str(until)),
    ]
    db = sqlite3.connect(tmp_path / "state.sqlite")
    for image, annotator, since, end in rows:
        db.execute(f"INSERT INTO leases VALUES ({image}, {annotator}, '', {since}, {end}, '', NULL)")
    db.commit()
    db.close()
    again = Leases(tmp_path / "leases.json")
    assert set(again.active()) == {"good"}
    assert len(again.warnings()) == len(rows)
    assert again.claim("ben", ["good", "annotator"]) == "annotator"
    assert len(Leases(tmp_path / "leases.json").warnings()) == 0, "they are set aside once"
    assert set(leases.active()) == {"good", "annotator"}


@pytest.mark.parametrize("damage", ["empty", "garbage", "half", "folder", "other tables", "zeros within"])
def test_a_damaged_database_is_put_aside_and_replaced(damage: str, tmp_path: Path) -> None:
    leases = Leases(tmp_path / "leases.json", most=1000)
    for number in range(300):
        leases.claim("anna", [f"case {number}"])
    TrainingQueue(tmp_path).add({"model": "segmentation"})
    leases.state._open[0].execute("PRAGMA wal_checkpoint(TRUNCATE)")  # type: ignore[index]
    path = tmp_path / "state.sqlite"
    content = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage == "other tables":
        db = sqlite3.connect(path)
        db.execute("CREATE TABLE leases (colour TEXT)")
        db.commit()
        db.close()
    else:
        zeros = content[:4096] + bytes(4096 * 8) + content[4096 * 9 :]
        path.write_bytes({"empty": b"", "garbage": os.urandom(9000), "half": content[:9000]}.get(damage, zeros))
    for store in (Leases(tmp_path / "leases.json"), leases):
        assert store.claim("ben", ["x", "y"]) in ("x", "y")
        (warning,) = store.warnings()
        assert "queued trainings are lost" in warning
    (kept,) = (file for file in tmp_path.glob("state.sqlite.damaged-*") if not file.name.endswith(("-wal", "-shm")))
    assert kept.name in warning
    queue = TrainingQueue(tmp_path)
    assert queue.add({"model": "segmentation"})["status"] == "SUBMITTED"
    assert queue.warnings() == [warning], "also after a restart"
    kept.rename(tmp_path / "elsewhere")
    assert queue.warnings() == []


def test_damage_under_a_running_server_does_not_end_it(tmp_path: Path) -> None:
    leases = Leases(tmp_path / "leases.json", most=1000)
    for number in range(300):
        leases.claim("anna", [f"case {number}"])
    leases.state._open[0].execute("PRAGMA wal_checkpoint(TRUNCATE)")  # type: ignore[index]
    with (tmp_path / "state.sqlite").open("r+b") as file:
        file.write(os.urandom(40_000))
    # Another process, which has nothing of it in memory.
    assert Leases(tmp_path / "leases.json").claim("ben", ["x"]) == "x"
    assert leases.claim("carla", ["x", "y"]) == "y"


def test_names_that_are_not_text_are_refused(tmp_path: Path) -> None:
    leases = Leases(tmp_path / "leases.json")
    for name in ("\ud800", "a\0b", "x" * 300, 7):
        with pytest.raises(HTTPException, match="client_id") as refused:
            leases.claim(name, ["a"])  # type: ignore[arg-type]
        assert refused.value.status_code == 400
    assert leases.active() == {}


def test_a_full_disk_is_said_and_changes_nothing(tmp_path: Path) -> None:
    leases = Leases(tmp_path / "leases.json")
    assert leases.claim("anna", ["a"]) == "a"
    db = leases.state._open[0]  # type: ignore[index]
    pages = db.execute("PRAGMA page_count").fetchone()[0]
    db.execute(f"PRAGMA max_page_count = {pages}")

    def fill() -> None:
        for number in range(5000):
            assert leases.claim(f"anna {number}", [f"case {number} {'x' * 150}"])

    with pytest.raises(OSError, match="No space left"):
        fill()
    given = set(leases.active())
    assert set(Leases(tmp_path / "leases.json").active()) == given
    db.execute("PRAGMA max_page_count = 100000")
    assert leases.claim("ben", ["b"]) == "b"


def test_a_change_that_fails_leaves_nothing(tmp_path: Path) -> None:
    state = StateDatabase(tmp_path)

    def half(db: sqlite3.Connection) -> None:
        db.execute("INSERT INTO numbers VALUES ('a', 1)")
        raise KeyError("stop")

    with pytest.raises(KeyError):
        state.change(half)
    assert state.read(lambda db: db.execute("SELECT count(*) FROM numbers").fetchone()[0]) == 0
