"""A full disk: a submitted label is stored completely or not at all, also after a restart."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from live import LABELS, write, write_volume

from deformux_label.lib.store.datastore import CheckedDatastore

LEVELS = 34
SPACE_CALLS = ((shutil, "copyfile"), (Path, "write_text"), (os, "fsync"), (tempfile, "mkstemp"), (os, "mkdir"))
RENAMES = ((os, "replace"), (os, "link"))


pytestmark = pytest.mark.usefixtures("unwatched")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of two megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


class Desk:
    """A scan with uncompressed labels to submit, each with an organ of another size."""

    def __init__(self, studies: Path, outside: Path) -> None:
        self.studies, self.outside = studies, outside
        self.volume = write_volume(studies / "scan.nii", outside / "label.nii", spacing=(2, 2, 2))

    def store(self) -> CheckedDatastore:
        return CheckedDatastore(str(self.studies), labels=LABELS)

    def submit(self, number: int) -> None:
        values = np.zeros_like(self.volume.truth)
        values.flat[:number] = 1
        label = write(self.outside / "sent.nii", values, self.volume.affine)
        self.store().save_label("scan", str(label), "final", {"client_id": f"annotator {number}"})

    def found(self) -> dict[str, Any]:
        """Return the state that a newly started server finds."""
        store = self.store()
        label = store.get_label_uri("scan", "final")
        info = store.get_label_info("scan", "final") if label else {}
        kept = store.revisions.history("scan", "final")
        return {
            "current": Path(label).read_bytes() if label else None,
            "revisions": [(r.number, r.annotator, store.revisions.is_intact(r) or r.deleted) for r in kept],
            "by": info.get("client_id"),
            "revision": info.get("revision"),
            "files": sorted(
                str(path.relative_to(self.studies))
                for path in self.studies.rglob("*")
                if path.is_file() and path.name not in (".lock", "ballast")
            ),
            "index": json.loads((self.studies / "datastore_v2.json").read_text())["objects"],
        }


@pytest.mark.parametrize("labelled", [True, False])
def test_a_submit_at_every_level_of_free_space(small_disk: Path, tmp_path: Path, labelled: bool) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    desk = Desk(small_disk / "studies", outside)
    if labelled:
        desk.submit(1)
    before = desk.found()
    size = (outside / "label.nii").stat().st_size
    refused = []
    for level in range(LEVELS):
        with (small_disk / "ballast").open("wb") as ballast:
            free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
            # From nothing to room for more than two copies and the records.
            ballast.write(b"\0" * max(0, free - level * (3 * size + 60_000) // (LEVELS - 1)))
        try:
            desk.submit(level + 2)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            refused.append(level)
            assert desk.found() == before, f"level {level}: something changed"
        else:
            now = desk.found()
            assert now["by"] == f"annotator {level + 2}"
            assert now["revisions"] == [*before["revisions"], (len(before["revisions"]) + 1, now["by"], True)]
            before = now
        (small_disk / "ballast").unlink()
        assert desk.found() == before, f"level {level}: after a restart with room"
    assert 5 < len(refused) < LEVELS - 2
    desk.submit(100)


@pytest.mark.parametrize("action", ["submit", "replace", "delete", "remove", "upload"])
def test_a_failure_at_every_call_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    desk = Desk(tmp_path / "studies", outside)
    if action != "submit":
        desk.submit(1)
    other = write_volume(outside / "other.nii", outside / "other_label.nii", spacing=(8, 8, 8), seed=1)
    acts: dict[str, Callable[[], object]] = {
        "submit": lambda: desk.submit(9),
        "replace": lambda: desk.submit(9),
        "delete": lambda: desk.store().remove_label("scan", "final"),
        "remove": lambda: desk.store().remove_image("scan"),
        "upload": lambda: desk.store().add_image("other", str(other.image), {}),
    }
    before = desk.found()
    tree = {path: path.read_bytes() for path in desk.studies.rglob("*") if path.is_file()}
    shutil.copytree(desk.studies, outside / "kept")
    failed = 0
    for lasting, calls in ((True, SPACE_CALLS), (False, RENAMES)):
        for number in range(1, 60):
            passed_over = False
            with monkeypatch.context() as broken:
                seen = fail_from(broken, calls, number, lasting=lasting)
                try:
                    acts[action]()
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                else:
                    # Some calls have an alternative, such as a copy where a link fails.
                    if seen[0] < number:
                        break
                    passed_over = True
            if passed_over:
                reset(desk)
                continue
            failed += 1
            assert {path: path.read_bytes() for path in desk.studies.rglob("*") if path.is_file()} == tree, number
        else:
            pytest.fail("it never succeeds")
        # The first sweep ended with success; the second starts from the same state.
        if lasting:
            reset(desk)
            assert desk.found()["current"] == before["current"]
            tree = {path: path.read_bytes() for path in desk.studies.rglob("*") if path.is_file()}
    assert failed > 8


def reset(desk: Desk) -> None:
    """Restore the studies, with the times of their files."""
    shutil.rmtree(desk.studies)
    shutil.copytree(desk.outside / "kept", desk.studies)


def fail_from(broken: pytest.MonkeyPatch, calls: Any, number: int, *, lasting: bool) -> list[int]:
    """Make the ``number``-th of these calls fail, and if ``lasting`` all after it; return the count so far."""
    seen = [0]

    def failing(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            seen[0] += 1
            if seen[0] == number or (lasting and seen[0] > number):
                raise OSError(errno.ENOSPC, "No space left on device")
            return call(*arguments, **options)

        return counted

    for owner, name in calls:
        broken.setattr(owner, name, failing(getattr(owner, name)))
    return seen
