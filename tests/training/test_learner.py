"""A round of learning: which cases train and validate, what is published, and what a killed round leaves."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from deformux.data.cases import Case, find_cases
from deformux.data.label_quality import coherence
from deformux.data.preprocessing import Preprocessing
from deformux.fitting.checkpoint import label_checksum
from deformux.fitting.fit import FitResult, TrainingError, TrainingStopped
from deformux.fitting.rank_processes import fit_on
from deformux.fitting.recipe import RECIPES
from deformux.networks.model_file import load_model
from deformux.networks.presets import PRESETS, Preset
from deformux.networks.pretrained import pretrained_path
from deformux.publishing.learner import Learner, Outcome, Round
from deformux.publishing.model_versions import ModelVersions
from preloaded import run_preloaded

PREP = Preprocessing("ct", patch_size=(16, 16, 16))
STEP = RECIPES["finetune"].replace(steps=1, epochs=1, batch_size=1)
SMALL = Preset((4, 8, 16, 32), 32, (1, 1, 1, 1))
QUICK = Round(scratch_recipe=STEP, continue_recipe=STEP)


@pytest.fixture(autouse=True)
def small_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use networks of a hundredth of the size: these tests are about what happens around them."""
    monkeypatch.setattr("deformux.networks.deformux_net.PRESETS", {**PRESETS, "small-test": SMALL})


def learner(root: Path) -> Learner:
    return Learner(root, labels=("ball", "box"), preprocessing=PREP, preset="small-test")


def relabelled(case: Case, folder: Path, change) -> Case:
    """Return the case with another label file."""
    file = nib.load(case.label)
    path = folder / f"{case.id}-changed.nii.gz"
    nib.save(nib.Nifti1Image(change(np.asarray(file.dataobj)).astype(np.uint8), file.affine), path)
    return Case(case.id, case.image, path)


def noise(label: np.ndarray) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 3, label.shape)


def test_from_one_label_to_seven(write_case, tmp_path: Path) -> None:
    cases = [write_case(f"c{number}", seed=number, size=(16, 16, 16)) for number in range(7)]
    state = tmp_path / "state"
    with pytest.raises(TrainingError, match="no labelled volumes"):
        learner(state).learn([], QUICK)
    first = learner(state).learn(cases[:1], QUICK)
    assert (first.version, first.published, first.decision.provisional) == ("v0001", True, True)
    assert first.card.training_cases == ("c0",)
    assert "too few labelled cases" in first.decision.reason
    assert first.card.network_options == {"guidance": True}
    assert load_model(ModelVersions(state / "versions").path("v0001"))[0].guidance_channels == 5

    # One relabelled, four new, one of noise: five can be used, and one of them validates from now on.
    changed = relabelled(cases[0], tmp_path, lambda label: np.roll(label, 1, 0))
    second = learner(state).learn([changed, *cases[1:5], relabelled(cases[5], tmp_path, noise)], QUICK)
    card = ModelVersions(state / "versions").card("v0002")
    assert second.card.to_json() == card.to_json()
    assert set(second.set_aside) == {"c5"}
    assert "unrelated" in second.set_aside["c5"]
    validating = {"c1", "c2", "c3", "c4"} - set(card.training_cases)
    assert len(validating) == 1
    assert "c0" in card.training_cases, "it had trained before"
    assert set(card.validation["per_case"]) == validating
    assert (card.parent, card.training_labels["c0"] != first.card.training_labels["c0"]) == ("v0001", True)
    assert (card.seed, card.device, card.recipe["steps"]) == (0, "cpu", 1)
    assert card.gate["reason"]

    # The labels have more than doubled since the only training from scratch, of one: both ways were tried.
    assert (first.card.scratch_cases, card.scratch_cases) == (1, 4)
    third = learner(state).learn([changed, *cases[1:5], cases[5], cases[6]], QUICK)
    assert not set(third.card.training_cases) & validating
    assert third.card.scratch_cases == 4
    assert not list(state.glob("training/*"))


def test_a_stopped_round_is_resumed_and_a_diverged_one_publishes_nothing(write_case, tmp_path: Path) -> None:
    cases = [write_case("c0", size=(16, 16, 16))]
    state = tmp_path / "state"
    two = Round(scratch_recipe=STEP.replace(steps=2))
    with pytest.raises(TrainingStopped):
        learner(state).learn(cases, two, stop=lambda: True)
    seen = []
    outcome = learner(state).learn(cases, two, on_progress=seen.append)
    assert {p.step for p in seen} == {2}, "the first step was not done again"
    assert outcome.published
    wild = STEP.replace(steps=12, learning_rate=1e30, schedule="constant", mixed_precision=False, ema_decay=None)
    with pytest.raises(TrainingError, match="no longer finite"):
        learner(state).learn(cases, Round(continue_recipe=wild))
    versions = ModelVersions(state / "versions")
    assert (versions.names(), versions.published()) == (["v0001"], "v0001")
    versions.pin()
    pinned = learner(state).learn(cases, QUICK)
    assert not pinned.published
    assert "v0001 is pinned" in pinned.decision.reason
    assert versions.published() == "v0001"


def test_a_worse_model_is_kept_but_not_published(shared_data: Path, tmp_path: Path) -> None:
    # The shipped weights are served; some of these cases trained them, which does not matter here.
    start = pretrained_path("hippocampus")
    card = load_model(start)[1]
    cases = find_cases(shared_data / "hippocampus", subset="train")[:5]
    # A label of random noise is set aside before it can train or validate.
    cases.append(relabelled(find_cases(shared_data / "hippocampus", subset="train")[5], tmp_path, noise))
    project = Learner(tmp_path / "state", labels=card.labels, preprocessing=card.preprocessing)
    bad = project.learn(cases, Round(scratch_recipe=STEP, served=start))
    assert (bad.version, bad.published) == ("v0001", False)
    assert "worse than the published model" in bad.decision.reason
    assert bad.decision.incumbent > 0.8 > 0.2 > bad.decision.candidate
    assert project.versions.published() is None
    # As good as what is served, since it is the same but for a vanishing step.
    still = STEP.replace(learning_rate=1e-9, click_probability=1.0)
    same = project.learn(cases, Round(scratch_recipe=still, start=start, served=start))
    assert (same.version, same.published) == ("v0002", True)
    assert same.decision.candidate == pytest.approx(same.decision.incumbent, abs=0.002)
    # Then the next model is compared with the published one.
    worse = project.learn(cases, Round(scratch_recipe=STEP, from_scratch=True))
    assert not worse.published
    assert worse.decision.incumbent == pytest.approx(same.decision.candidate, abs=1e-6)
    assert project.versions.published() == "v0002"
    assert set(worse.set_aside) == {cases[-1].id}


class Falling:
    """The real training of one step, whose Dice on the validation cases is set to a given one, round by round."""

    def __init__(self, dice: list[float]) -> None:
        self.dice = list(dice)

    def __call__(self, *arguments: Any, **options: Any) -> FitResult:
        result = fit_on(*arguments, **options)
        dice = self.dice.pop(0)
        return dataclasses.replace(result, best_dice=dice, per_case={case: [dice, dice] for case in result.per_case})


def steered(
    cases: list[Case], state: Path, dice: list[float], monkeypatch: pytest.MonkeyPatch, options: Round = QUICK
) -> list[Outcome]:
    """Return the outcomes of rounds on the same cases, each by a new learner, as in a new process."""
    monkeypatch.setattr("deformux.publishing.round_training.fit_on", Falling(dice))
    return [learner(state).learn(cases, options) for _ in dice]


@pytest.fixture
def five_cases(write_case) -> list[Case]:
    return [write_case(f"c{number}", seed=number, size=(16, 16, 16)) for number in range(5)]


def test_many_small_falls_are_stopped_before_they_add_up(
    five_cases: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, versions = tmp_path / "state", ModelVersions(tmp_path / "state" / "versions")
    falls = [0.9 - 0.0019 * number for number in range(4)]
    *published, stopped = steered(five_cases, state, falls, monkeypatch)
    # Each is within 0.002 of the one before; the third is 0.0038 below the first, the fourth would be 0.0057.
    assert [outcome.published for outcome in (*published, stopped)] == [True, True, True, False]
    assert stopped.decision.reason == ("worse than v0001 was: mean Dice 0.8943 instead of 0.9000 on 1 validation case")
    assert [outcome.card.gate["champion"] for outcome in published] == [None, "v0001", "v0001"]
    assert (stopped.decision.incumbent, stopped.decision.best) == (pytest.approx(0.8962), pytest.approx(0.9))
    # Refused models do not move the bar; a new best does, and falls are counted from there.
    after = steered(five_cases, state, [0.8945, 0.895, 0.91, 0.9081, 0.9062, 0.9049], monkeypatch)
    assert [outcome.published for outcome in after] == [False, True, True, True, True, False]
    assert "worse than v0007 was" in after[-1].decision.reason
    # Back to the last but one, with the champion that it was compared with.
    assert versions.rollback() == "v0008"
    (again,) = steered(five_cases, state, [0.9049], monkeypatch)
    assert "worse than the published model" in again.decision.reason
    assert again.decision.champion == "v0007"


def test_falls_from_the_pretrained_model_do_not_add_up(
    five_cases: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, state = learner(tmp_path / "other"), tmp_path / "state"
    options = Round(STEP, STEP, served=first.versions.path(first.learn(five_cases[:1], QUICK).version))
    # Scores of the served model before the rounds begin, as after a restart.
    checksums = {case.id: label_checksum(case) for case in five_cases}
    learner(state).scores.remember("pretrained-v0001", {case: [0.9, 0.9] for case in checksums}, checksums)
    outcomes = steered(five_cases, state, [0.8981, 0.8962, 0.8943], monkeypatch, options)
    assert [outcome.published for outcome in outcomes] == [True, True, False]
    assert "worse than pretrained-v0001 was: mean Dice 0.8943 instead of 0.9000" in outcomes[-1].decision.reason


def _files(state: Path) -> list[Path]:
    names = ("assignment.json", "label_facts.json", "validation_scores.json", "training/run.json")
    return [*(state / name for name in names), *sorted((state / "versions").glob("publications*.json"))]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"cases": [], "c": {"label": 3}, "id": [], "history": 1}', "\udcff"]
)
def test_no_damaged_file_ends_a_training_or_changes_the_validation_cases(
    five_cases: list[Case], tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state"
    (first,) = steered(five_cases, state, [0.9], monkeypatch)
    assert first.published
    with pytest.raises(TrainingStopped):
        learner(state).learn(five_cases, Round(continue_recipe=STEP.replace(steps=2)), stop=lambda: True)
    for path in _files(state):
        assert path.exists()
        path.write_bytes(text.encode(errors="surrogateescape"))
    (second,) = steered(five_cases, state, [0.91], monkeypatch)
    assert set(second.card.validation["per_case"]) == set(first.card.validation["per_case"])
    assert second.card.parent == "v0001"
    assert ModelVersions(state / "versions").warnings() == []


def test_a_training_starts_from_the_version_before_a_damaged_one(
    five_cases: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state"
    steered(five_cases, state, [0.9, 0.91], monkeypatch)
    weights = ModelVersions(state / "versions").path("v0002")
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    (third,) = steered(five_cases, state, [0.905], monkeypatch)
    assert (third.card.parent, third.published) == ("v0001", True)
    assert third.decision.incumbent == pytest.approx(0.9)
    assert ModelVersions(state / "versions").warnings() == []


def test_killed_at_every_rename_a_round_publishes_one_version(write_case, tmp_path: Path) -> None:
    write_case("c0", size=(16, 16, 16))
    # Facts, assignment, run, checkpoint, number, card, weights, scores, publication: one kill before each.
    kills = ",".join(f"before-rename={number}" for number in range(1, 10))
    driver = (Path(__file__).parent / "resume_driver.py").read_text()
    done = run_preloaded(driver, tmp_path, f"learn:{kills}", environment={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout.splitlines()[-1])["codes"]
    assert codes[-1] == 0, done.stderr
    assert codes.count(-9) >= 6, codes
    versions = ModelVersions(tmp_path / "state" / "versions")
    last = versions.published()
    assert last is not None
    told = [entry.version for entry in versions.history()]
    assert len(set(told)) == len(told), "a version was published twice"
    runs = [info.card.run for info in versions.infos()]
    assert len(set(runs)) == len(runs), "a round was written twice"
    assert versions.card(last).training_cases == ("c0",)


def test_coherence_tells_drawings_from_noise() -> None:
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.arange(32)] * 3, indexing="ij"))
    ball = (((grid - 16) ** 2).sum(0) < 64).astype(np.uint8)
    tubes = np.zeros((32, 32, 32), np.uint8)
    tubes[::4, ::4] = 1
    for drawn in (ball, ball + 2 * np.roll(ball, 14, 0), tubes, np.where(grid[0] > 15, 255, ball).astype(np.uint8)):
        value = coherence(drawn)
        assert value is not None
        assert value > 0.25
    for density in (0.02, 0.3, 0.95):
        value = coherence(((rng.random((32, 32, 32)) < density) * rng.integers(1, 3, (32, 32, 32))).astype(np.uint8))
        assert value is not None
        assert abs(value) < 0.05
    clicks = np.zeros((32, 32, 32), np.uint8)
    clicks[::8, ::8, ::8] = 1
    assert coherence(clicks) is None
