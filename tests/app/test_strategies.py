"""Next Sample: prepared orders, notes while there are none, and no volume for two annotators."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import time
from pathlib import Path

import pytest
import requests
import torch
from live import APP, CONF, LiveServer, Volume

from deformux.active_learning.strategies import NEEDS_SCORES
from deformux.active_learning.uncertainty_scores import volume_uncertainty
from deformux.inference.sliding_window import segment
from deformux.networks.deformux_net import DeformUXNet
from deformux.networks.model_file import ModelCard
from deformux_label.lib.activelearning.background_scores import UNTRAINED_MODEL, SelectionScores
from deformux_label.lib.activelearning.strategies import all_strategies
from deformux_label.lib.activelearning.waiting_volumes import WaitingVolumes
from deformux_label.lib.configs.project import Project
from deformux_label.lib.infers.model_loader import ServedModels
from deformux_label.lib.store.datastore import CheckedDatastore
from deformux_label.lib.store.leases import Leases
from preloaded import PreloadedProcess

PROJECT = Project.from_conf(CONF)
CASES = tuple(f"case_{number}" for number in range(6))


class Desk:
    """The parts of the app that hand out volumes, on real files, without the web server around them."""

    def __init__(self, folder: Path, volumes: dict[str, Volume], cases: tuple[str, ...] = CASES) -> None:
        self.folder = folder
        self.studies = folder / "studies"
        self.studies.mkdir(parents=True)
        for name in cases:
            shutil.copy(volumes[name].image, self.studies)
        self.datastore = CheckedDatastore(str(self.studies), labels=PROJECT.labels)
        self.models = ServedModels(PROJECT, folder / "state")
        self.scores = SelectionScores(PROJECT, self.models, folder / "state" / "selection")
        self.requested = 0
        self.leases = Leases(folder / "state" / "leases.json")
        self.waiting = WaitingVolumes(self.scores)
        self.strategies = all_strategies(self.scores, self.leases, self._request, self.waiting)

    def _request(self) -> None:
        self.requested += 1

    def next(self, strategy: str, annotator: str = "a") -> dict:
        return self.strategies[strategy]({"strategy": strategy, "client_id": annotator}, self.datastore) or {}

    def publish(self, seed: int) -> str:
        torch.manual_seed(seed)
        network = DeformUXNet(1, len(PROJECT.labels) + 1, PROJECT.preset)
        card = ModelCard(labels=PROJECT.labels, preprocessing=PROJECT.preprocessing, preset=PROJECT.preset)
        name = self.models.versions.write(network, card)
        self.models.versions.publish(name)
        return name

    def kept(self, model: str) -> dict:
        return json.loads((self.folder / "state" / "selection" / f"{model}.json").read_text())


@pytest.fixture
def desk(tmp_path: Path, volumes: dict[str, Volume]) -> Desk:
    return Desk(tmp_path, volumes)


def test_without_scores_a_random_volume_comes_at_once_and_scoring_is_requested_once(desk: Desk) -> None:
    samples = [desk.next(strategy, f"{strategy}-{turn}") for turn in range(3) for strategy in ("bald", "adaptive")]
    assert sorted(sample["id"] for sample in samples) == sorted(CASES)
    assert all("random volume" in sample["note"] for sample in samples)
    assert desk.requested == 2, "one for each strategy"
    # Others hold every volume, and the reply says so.
    for strategy in ("adaptive", "random", "first"):
        reply = desk.next(strategy, "late")
        assert reply.keys() == {"note"}
        assert re.fullmatch(
            r"of the volumes without a label 6 are leased to others, the first until \d\d:\d\d", reply["note"]
        )
    assert desk.next("first", "bald-1")["id"] == samples[2]["id"]
    assert not (desk.folder / "state" / "selection").exists(), "nothing is computed in a request"


def test_the_first_strategy_is_adaptive_and_the_old_names_still_work(desk: Desk) -> None:
    assert next(iter(desk.strategies)) == "adaptive"
    assert {"random", "first", "uncertainty", "typicality", *NEEDS_SCORES} <= set(desk.strategies)
    assert desk.next("first")["id"] == "case_0"
    assert desk.next("random")["id"] in CASES[1:]


def test_orders_follow_the_served_model(desk: Desk, volumes: dict[str, Volume]) -> None:
    desk.scores.update(desk.datastore)
    cold = desk.next("adaptive", "a")
    assert cold["id"] == desk.kept(UNTRAINED_MODEL)["orders"]["adaptive"][0]
    assert cold["scored_with"] == UNTRAINED_MODEL
    assert "note" not in cold
    assert "typical volumes" in desk.next("entropy", "b")["note"]
    assert desk.requested == 0

    first = desk.publish(seed=1)
    # The new model has no scores yet: the old order is used, and the note says so.
    waiting = desk.next("uncertainty", "c")
    assert waiting["scored_with"] == UNTRAINED_MODEL
    assert first in waiting["note"]
    assert desk.requested == 1

    desk.scores.update(desk.datastore)
    network, card = desk.models.load(first, "cpu")
    expected = {}
    for name in CASES:
        _, probabilities = segment(network, volumes[name].image, card.preprocessing)
        expected[name] = volume_uncertainty(probabilities)
    ranked = sorted(CASES, key=lambda name: -expected[name])
    taken = held(desk)
    sample = desk.next("uncertainty", "d")
    assert sample["id"] == next(name for name in ranked if name not in taken)
    assert sample["scored_with"] == first
    assert sample["uncertainty"] == pytest.approx(expected[sample["id"]], abs=1e-3)
    assert "note" not in sample
    # One model has no other to disagree with; the next one has.
    assert {score["mutual_information"] for score in desk.kept(first)["scores"].values()} == {0}
    second = desk.publish(seed=2)
    desk.scores.update(desk.datastore)
    assert all(score["mutual_information"] > 0 for score in desk.kept(second)["scores"].values())


def held(desk: Desk) -> set[str]:
    return set(desk.leases.active())


def test_scores_are_added_and_never_computed_twice(desk: Desk, volumes: dict[str, Volume]) -> None:
    model = desk.publish(seed=1)
    path = desk.folder / "state" / "selection" / f"{model}.json"
    desk.scores.update(desk.datastore)
    values = json.loads(path.read_text())
    values["scores"]["case_3"]["entropy"] = 0.999
    # A file without a checksum, as older versions wrote it, is accepted.
    del values["sha256"]
    path.write_text(json.dumps(values))
    shutil.copy(volumes["axial"].image, desk.studies / "new.nii.gz")
    (desk.studies / "broken.nii.gz").write_bytes(b"not a scan")
    again = CheckedDatastore(str(desk.studies), labels=PROJECT.labels)
    assert {"new", "broken"} <= set(again.list_images())
    desk.datastore = again
    desk.scores.update(again)
    kept = desk.kept(model)
    assert kept["scores"]["case_3"]["entropy"] == 0.999
    assert kept["orders"]["entropy"][0] == "case_3"
    assert set(kept["orders"]["adaptive"]) == {*CASES, "new"}
    assert kept["scores"]["broken"] is None
    # An unreadable volume is not tried again and not handed out.
    assert "broken" not in {desk.next("adaptive", str(turn))["id"] for turn in range(7)}
    for strategy in ("adaptive", "random", "first"):
        assert "1 is unreadable: broken" in desk.next(strategy, "late")["note"]
    assert desk.requested == 0
    written = path.stat().st_mtime_ns
    desk.scores.update(again)
    assert path.stat().st_mtime_ns == written
    # A damaged file is replaced.
    path.write_text(path.read_text()[:100])
    desk.scores.update(again)
    assert desk.kept(model)["scores"]["case_3"]["entropy"] != 0.999


def test_only_unreadable_volumes_are_left_until_one_is_repaired(desk: Desk, volumes: dict[str, Volume]) -> None:
    for name in CASES[:2]:
        (desk.studies / volumes[name].image.name).write_bytes(b"not a scan")
    desk.scores.update(desk.datastore)
    for name in CASES[2:]:
        desk.datastore.save_label(name, str(volumes[name].label), "final", {})
    for strategy in desk.strategies:
        reply = desk.next(strategy)
        assert reply == {"note": "of the volumes without a label 2 are unreadable: case_0, case_1"}
    (warning,) = desk.waiting.now(desk.datastore).warnings()
    assert "2 are unreadable and not handed out: case_0, case_1; no other volume is left" in warning
    # A repaired one is handed out at once, and scored at the next opportunity.
    shutil.copy(volumes["case_0"].image, desk.studies)
    assert desk.next("first")["id"] == desk.next("adaptive")["id"] == "case_0"
    assert desk.requested == 1
    desk.scores.update(desk.datastore)
    assert desk.kept(UNTRAINED_MODEL)["scores"]["case_0"] is not None
    assert desk.kept(UNTRAINED_MODEL)["scores"]["case_1"] is None
    desk.datastore.save_label("case_0", str(volumes["case_0"].label), "final", {})
    assert "1 is unreadable: case_1" in desk.next("random")["note"]
    desk.datastore.remove_image("case_1")
    assert desk.next("random") == {"note": "no volume is left without a label"}
    assert desk.waiting.now(desk.datastore).warnings() == []


def test_a_volume_with_an_unusable_header_is_not_handed_out_before_scoring(
    desk: Desk, volumes: dict[str, Volume]
) -> None:
    for name in CASES[:2]:
        (desk.studies / volumes[name].image.name).write_bytes(b"not a scan")
    desk.datastore.check_scans()
    given = {desk.next("first", str(turn)).get("id") for turn in range(len(CASES))}
    assert given == {*CASES[2:], None}
    assert "2 are unreadable: case_0, case_1" in desk.next("random", "late")["note"]
    shutil.copy(volumes["case_0"].image, desk.studies)
    desk.datastore.refresh()
    assert desk.next("first", "later")["id"] == "case_0"


SCORING = """
import sys
from pathlib import Path
from deformux_label.lib.configs.project import Project
from deformux_label.lib.store.datastore import CheckedDatastore
from deformux_label.lib.infers.model_loader import ServedModels
from deformux_label.lib.activelearning import background_scores
import json

background_scores._SECONDS_BETWEEN_WRITES = 0.0
background_scores._SHARE_OF_WRITING = 1.0
folder, project = Path(sys.argv[1]), Project.from_conf(json.loads(sys.argv[2]))
state = folder / "state"
scores = background_scores.SelectionScores(project, ServedModels(project, state), state / "selection")
scores.update(CheckedDatastore(str(folder / "studies"), labels=project.labels))
"""


def test_killed_scoring_resumes(desk: Desk) -> None:
    model = desk.publish(seed=1)
    path = desk.folder / "state" / "selection" / f"{model}.json"
    process = PreloadedProcess(SCORING, (desk.folder, json.dumps(CONF)), output=desk.folder / "scoring.log")
    end = time.monotonic() + 120
    while not path.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)
    process.kill()
    process.wait()
    early = desk.kept(model)
    assert early["scores"], "what was written is whole"
    for name in early["scores"]:
        early["scores"][name]["entropy"] = 0.5
    del early["sha256"]
    path.write_text(json.dumps(early))
    (path.parent / ".tmpAbCdEf").write_bytes(b"half of a file of features")
    desk.scores.update(desk.datastore)
    kept = desk.kept(model)
    assert set(kept["scores"]) == set(CASES)
    assert {name: kept["scores"][name] for name in early["scores"]} == early["scores"]
    assert {p.name for p in path.parent.iterdir()} == {path.name, f"{model}.safetensors", ".lock"}


def scored(folder: Path) -> set[str]:
    """Return the volumes that have a score of any model."""
    names: set[str] = set()
    for path in folder.glob("[!.]*.json"):
        with contextlib.suppress(FileNotFoundError):  # an older model's, pruned meanwhile
            names |= set(json.loads(path.read_text())["scores"])
    return names


def test_a_server_scores_in_the_background_and_never_leases_a_case_twice(
    server: LiveServer, studies: Path, volumes: dict[str, Volume]
) -> None:
    def ask(strategy: str, annotator: str) -> dict:
        answer = requests.post(f"{server.url}/activelearning/{strategy}", json={"client_id": annotator}, timeout=120)
        assert answer.status_code == 200, answer.text
        return answer.json()

    try:
        samples = [ask(strategy, f"reader-{turn}") for turn, strategy in enumerate(("adaptive", "random", "first"))]
        ids = [sample["id"] for sample in samples if "id" in sample]
        assert len(ids) == len(set(ids)) > 0
        unlabelled = {name for name, entry in server.objects().items() if "final" not in entry["labels"]}
        assert set(ids) <= unlabelled
        folder = PROJECT.state_folder(APP, str(studies)) / "selection"
        end = time.monotonic() + 240
        while not unlabelled <= scored(folder):
            assert time.monotonic() < end, f"no scores were written: {server.log.read_text()[-3000:]}"
            time.sleep(0.2)
    finally:
        # Other tests share this server and need volumes too.
        leases = Leases(PROJECT.state_folder(APP, str(studies)) / "leases.json")
        for image in leases.active():
            leases.release(image)
