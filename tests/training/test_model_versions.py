"""Versions: what is published, what it replaced, and that no crash leaves anything in between."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner, Result

from deformux.cli.main import app
from deformux.data.preprocessing import Preprocessing
from deformux.networks.model_file import ModelCard, read_card
from deformux.publishing.model_versions import ModelVersions

CARD = ModelCard(labels=("a", "b"), preprocessing=Preprocessing(), preset="tiny")


def model(value: float = 0.0) -> nn.Module:
    network = nn.Linear(2, 2)
    nn.init.constant_(network.weight, value)
    return network


def versions_of(root: Path, count: int) -> ModelVersions:
    versions = ModelVersions(root)
    for number in range(count):
        versions.write(model(float(number + 1)), CARD)
    return versions


def written(versions: ModelVersions, name: str) -> ModelCard:
    """Return the card of a version as it was before the checksum of the weights was added."""
    card = read_card(versions.path(name))
    assert card.weights_sha256 == hashlib.sha256(versions.path(name).read_bytes()).hexdigest()
    return dataclasses.replace(card, weights_sha256="")


def in_a_process(work: Callable[[], None]) -> int:
    """Run in a forked process; return its exit code, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(step: int, work: Callable[[], None]) -> int:
    """Run in a process that is killed (SIGKILL) at its `step`-th change of the disk, before the change happens."""
    seen = 0

    def count(change: Callable[..., object]) -> Callable[..., object]:
        def counted(*arguments: object, **options: object) -> object:
            nonlocal seen
            seen += 1
            if seen == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*arguments, **options)

        return counted

    def instrumented() -> None:
        for name in ("replace", "unlink", "fsync", "open", "chmod"):
            setattr(os, name, count(getattr(os, name)))
        work()

    return in_a_process(instrumented)


def test_rollback_goes_to_the_version_published_before(tmp_path: Path) -> None:
    versions = versions_of(tmp_path, 4)
    for name in ("v0001", "v0003", "v0002"):
        versions.publish(name, f"because of {name}", by="ada")
    assert versions.rollback("too many false positives", by="ben") == "v0003"
    assert versions.rollback() == "v0001", "not back to what was just rolled back"
    with pytest.raises(ValueError, match="nothing was published before v0001"):
        versions.rollback()
    assert versions.publish_trained("v0004", "better")
    assert versions.rollback() == "v0001"
    told = [(entry.version, entry.kind, entry.by) for entry in ModelVersions(tmp_path).history()]
    assert told[2:5] == [("v0002", "publish", "ada"), ("v0003", "rollback", "ben"), ("v0001", "rollback", "user")]
    assert versions.history()[3].reason == "too many false positives"


def test_a_pinned_version_stays_until_it_is_unpinned(tmp_path: Path) -> None:
    versions = versions_of(tmp_path, 3)
    with pytest.raises(ValueError, match="nothing is published yet"):
        versions.pin()
    versions.publish("v0001")
    assert versions.pin("v0002") == versions.published() == versions.pinned() == "v0002"
    assert not versions.publish_trained("v0003", "better")
    for change in (lambda: versions.publish("v0003"), versions.rollback):
        with pytest.raises(ValueError, match="v0002 is pinned; unpin it"):
            change()
    assert versions.published() == "v0002"
    versions.unpin()
    assert versions.publish_trained("v0003", "better")
    assert [info.name for info in versions.infos() if info.published] == ["v0003"]


def test_pruning_keeps_the_newest_and_all_published_versions(tmp_path: Path) -> None:
    versions = versions_of(tmp_path, 6)
    versions.publish("v0002")
    versions.publish("v0004")
    assert versions.prune(keep=1) == ["v0001", "v0003", "v0005"]
    assert versions.names() == ["v0002", "v0004", "v0006"]
    assert versions.prune(keep=1) == []
    # The newest is deleted by hand; its name is not given to another model.
    for path in tmp_path.glob("v0006.*"):
        path.unlink()
    assert versions.write(model(), CARD) == "v0007"


def test_a_kill_at_any_change_of_the_disk_loses_nothing(tmp_path: Path) -> None:
    versions = versions_of(tmp_path, 3)
    versions.publish("v0002")
    used = {"v0001", "v0002", "v0003"}
    outcomes, step = set(), 0

    def train_and_publish() -> None:
        mine = ModelVersions(tmp_path)
        mine.publish_trained(mine.write(model(7.0), CARD), "better")
        mine.prune(keep=1)

    while True:
        step += 1
        before = set(versions.names())
        outcome = killed_at(step, train_and_publish)
        # Everything listed can be read, and the published version and the last ten before it exist.
        for name in versions.names():
            assert load_file(versions.path(name))["weight"].shape == (2, 2)
            assert written(versions, name) == CARD
        published = versions.published()
        assert published is not None
        assert {entry.version for entry in versions.history()[-10:]} <= set(versions.names())
        new = set(versions.names()) - before
        assert len(new) <= 1
        assert not new & used, "a name was used for two models"
        used |= new
        outcomes.add((bool(new), published in new))
        if outcome == 0:
            break
        assert outcome == -signal.SIGKILL
    assert step > 10
    assert outcomes == {(False, False), (True, False), (True, True)}, "every stage was hit"
    # The next write finds no lock held, and removes leftovers of killed processes, half a safetensors file among them.
    (tmp_path / ".tmpAbCdEf").write_bytes(b"half")
    assert versions.write(model(), CARD) not in used
    assert versions.damaged() == {}
    kept = {f"{name}{suffix}" for name in versions.names() for suffix in (".json", ".safetensors")}
    assert {path.name for path in tmp_path.iterdir()} == kept | {"publications.json", "publications.copy.json", ".lock"}


def test_a_full_disk_changes_nothing(tmp_path: Path) -> None:
    versions = versions_of(tmp_path, 1)
    versions.publish("v0001")
    before = (tmp_path / "publications.json").read_text()

    # Made here, not in the forked process: torch's threads do not survive a fork.
    large = nn.Linear(300, 300)

    def write_too_much() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        ModelVersions(tmp_path).write(large, CARD)

    assert in_a_process(write_too_much) == 1
    assert versions.names() == ["v0001"]
    assert versions.published() == "v0001"
    assert json.loads(before)["history"] == json.loads((tmp_path / "publications.json").read_text())["history"]
    assert versions.write(large, CARD) == "v0003"
    assert not list(tmp_path.glob("v0002*"))


def test_many_processes_publish_at_once(tmp_path: Path) -> None:
    versions_of(tmp_path, 1)

    def publish_often() -> None:
        mine = ModelVersions(tmp_path)
        for _ in range(5):
            mine.publish(mine.write(model(), CARD))

    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            publish_often()
            os._exit(0)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    versions = ModelVersions(tmp_path)
    assert versions.names() == [f"v{number:04d}" for number in range(1, 22)]
    assert len(versions.history()) == 20


def test_the_command_line(tmp_path: Path) -> None:
    root = tmp_path / "state" / "versions"
    versions = versions_of(root, 3)
    versions.publish("v0001")

    def deformux(*arguments: object) -> Result:
        return CliRunner().invoke(app, ["versions", *map(str, arguments)], env={"COLUMNS": "200"})

    assert deformux("publish", tmp_path / "state", "v0003", "--reason", "looks better").exit_code == 0
    assert (versions.published(), versions.history()[-1].reason) == ("v0003", "looks better")
    listed = deformux("list", root).output
    assert all(word in listed for word in ("v0001", "v0002", "v0003", "looks better", "published before"))
    assert deformux("rollback", root).exit_code == 0
    assert versions.published() == "v0001"
    failed = deformux("publish", root, "v0009")
    assert failed.exit_code == 2
    assert "no version 'v0009'; there are v0001, v0002, v0003" in failed.output
    assert deformux("pin", root, "v0002").exit_code == 0
    assert "v0002 is pinned; unpin it" in deformux("publish", root, "v0003").output
    assert deformux("unpin", root).exit_code == 0
    assert json.loads(deformux("show", root, "v0002").output)["labels"] == ["a", "b"]
    missing = deformux("list", tmp_path / "nowhere")
    assert missing.exit_code == 2
    assert not (tmp_path / "nowhere").exists(), "looking at a folder does not make it"


@pytest.fixture
def published(tmp_path: Path) -> ModelVersions:
    """Return three versions, published one after the other."""
    versions = versions_of(tmp_path, 3)
    for name in versions.names():
        versions.publish(name)
    return versions


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))


def change_a_number(path: Path) -> None:
    path.write_text(path.read_text().replace("v0003", "v0001"))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def unlink(path: Path) -> None:
    path.unlink()


Damage = Callable[[Path], None]


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, change_a_number, empty, unlink])
def test_a_damaged_record_is_replaced_by_its_copy(published: ModelVersions, damage: Damage) -> None:
    root, before = published.root, published.history()
    damage(root / "publications.json")
    versions = ModelVersions(root)
    assert (versions.published(), versions.history()) == ("v0003", before)
    (warning,) = versions.warnings()
    assert re.match(r"publications\.json is (damaged|missing)", warning)
    assert "its copy publications.copy.json is used" in warning
    # The next change rewrites both, and keeps the damaged file.
    assert versions.rollback() == "v0002"
    assert (ModelVersions(root).published(), ModelVersions(root).warnings()) == ("v0002", [])
    assert (root / "publications.damaged.json").exists() is (damage is not unlink)


@pytest.mark.parametrize("damage", [truncate, unlink])
def test_without_both_records_the_newest_that_the_gate_allowed_is_served(
    published: ModelVersions, damage: Damage
) -> None:
    root = published.root
    published.write(model(), dataclasses.replace(CARD, gate={"publish": False}))
    for name in ("publications.json", "publications.copy.json"):
        damage(root / name)
    versions = ModelVersions(root)
    assert versions.published() == "v0003"
    (warning,) = versions.warnings()
    assert "it is no longer known which version was published; v0003, the newest" in warning
    assert [entry.kind for entry in versions.history()] == ["rebuilt"]
    assert versions.write(model(), CARD) == "v0005", "a name was given twice"
    assert versions.published() == "v0003"
    versions.publish("v0002")
    assert (versions.published(), versions.warnings()) == ("v0002", [])


@pytest.mark.parametrize(
    ("damage", "suffix"),
    [(damage, suffix) for damage in (truncate, empty, unlink) for suffix in (".safetensors", ".json")]
    + [(flip_a_bit, ".safetensors")],
)
def test_in_place_of_a_damaged_version_the_one_before_is_served(
    published: ModelVersions, damage: Damage, suffix: str
) -> None:
    path = published.root / f"v0003{suffix}"
    assert published.published() == "v0003"
    intact = path.read_bytes()
    damage(path)
    for versions in (published, ModelVersions(published.root)):
        assert (versions.published(), versions.intended()) == ("v0002", "v0003")
        (warning,) = versions.warnings()
        assert "version v0003 is published but cannot be served" in warning
        assert "v0002, published before it, is served instead" in warning
        assert str(versions.root) not in warning, "it is shown to whoever may ask the server"
        assert list(versions.damaged()) == ["v0003"]
        readable = [info.name for info in versions.infos()]
        assert readable[:2] == ["v0001", "v0002"]
        with pytest.raises(ValueError, match="v0003"):
            versions.publish("v0003")
    # Writing and pruning leave files that a backup may complete.
    versions.write(model(), CARD)
    assert versions.prune(keep=1) == []
    path.write_bytes(intact)
    assert (versions.published(), versions.warnings(), versions.damaged()) == ("v0003", [], {})


def test_a_rolled_back_version_is_not_served_in_place_of_a_damaged_version(published: ModelVersions) -> None:
    assert published.rollback() == "v0002"
    flip_a_bit(published.path("v0002"))
    assert published.published() == "v0001"
    flip_a_bit(published.path("v0001"))
    assert published.published() is None
    assert "no version before it can be served" in published.warnings()[0]
    with pytest.raises(ValueError, match="nothing was published before"):
        published.rollback()


def test_an_old_record_and_an_old_card_have_no_checksum_and_are_read(published: ModelVersions) -> None:
    path = published.root / "publications.json"
    values = json.loads(path.read_text())
    del values["sha256"]
    path.write_text(json.dumps(values, indent=1) + "\n")
    (published.root / "publications.copy.json").unlink()
    card = published.root / "v0003.json"
    text = json.loads(card.read_text())
    del text["weights_sha256"]
    card.write_text(json.dumps(text))
    versions = ModelVersions(published.root)
    assert (versions.published(), versions.warnings()) == ("v0003", [])
    truncate(versions.path("v0003"))
    assert versions.published() == "v0002"


def test_pruning_keeps_the_last_published_the_pinned_and_the_best(tmp_path: Path) -> None:
    versions = ModelVersions(tmp_path)
    for number in range(1, 16):
        gate = {"publish": True, "champion": "v0003" if number == 9 else None}
        versions.publish_trained(versions.write(model(), dataclasses.replace(CARD, gate=gate)), "better")
        if number == 2:
            versions.pin()
            versions.unpin()
    assert versions.prune(keep=2) == ["v0001", "v0004", "v0005"]
    assert versions.prune(keep=2) == []
    assert versions.prune(keep=2, keep_published=3) == [f"v{number:04d}" for number in (3, *range(6, 13))]
    assert versions.names() == ["v0002", "v0013", "v0014", "v0015"]
    assert versions.rollback() == "v0014"
    # Versions under it are deleted, but for the pinned one.
    assert (versions.rollback(), versions.rollback()) == ("v0013", "v0002")
    assert versions.warnings() == []
    assert versions.prune(keep=1, keep_published=1) == ["v0013", "v0014"]
    with pytest.raises(ValueError, match="at least 1 version"):
        versions.prune(keep_published=0)


def test_the_list_names_the_damaged(published: ModelVersions) -> None:
    def listed() -> Result:
        return CliRunner().invoke(app, ["versions", "list", str(published.root)], env={"COLUMNS": "200"})

    assert "damaged" not in listed().output
    (published.root / "v0002.json").write_text("{")
    flip_a_bit(published.path("v0003"))
    done = listed()
    assert done.exit_code == 0
    assert "v0002.json is not a model card" in done.output
    assert "v0003.safetensors is damaged" in done.output
    assert "v0001, published before it, is served instead" in done.output
    for path in published.root.glob("*.json"):
        path.unlink()
    assert "needs its card" in listed().output
