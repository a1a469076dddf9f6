"""Trainings by a project's plan: settings that nobody gave, steps by the clock, and what a killed round keeps."""

from __future__ import annotations

import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from deformux.data.choices import Choices
from deformux.data.preprocessing import Preprocessing
from deformux.fitting.fit import TrainingStopped, fit
from deformux.fitting.minutes import in_minutes
from deformux.fitting.recipe import RECIPES
from deformux.networks.deformux_net import DeformUXNet
from deformux.networks.model_file import ModelCard, load_model, save_model
from deformux.networks.presets import PRESETS, Preset
from deformux.publishing.learner import Learner, Round
from deformux.publishing.model_versions import ModelVersions
from deformux.publishing.project_plan import ProjectPlanner, last_plan

LABELS = ("ball", "box")
SMALL = Preset((4, 8, 16, 32), 32, (1, 1, 1, 1))
THICK = np.diag([1.0, 1.0, 6.0, 1.0])
QUICK = RECIPES["finetune"].replace(steps=2, epochs=1)


@pytest.fixture(autouse=True)
def small_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deformux.networks.deformux_net.PRESETS", {**PRESETS, "tiny": SMALL})


def planner(state: Path, cases: list, **choices: object) -> ProjectPlanner:
    scans = [case.image for case in cases]
    return ProjectPlanner(state / "plan", labels=LABELS, choices=Choices(**choices), scans=lambda: scans, minutes=0.1)


def learner(state: Path, cases: list, **choices: object) -> Learner:
    return Learner(state, labels=LABELS, planner=planner(state, cases, **choices))


def test_a_version_carries_its_plan_and_keeps_it_when_it_is_continued(write_case, tmp_path: Path) -> None:
    cases = [write_case(f"c{number}", seed=number, size=(40, 36, 32)) for number in range(3)]
    state = tmp_path / "state"
    options = Round(scratch_recipe=QUICK, continue_recipe=QUICK)
    first = learner(state, cases).learn(cases[:2], options).card
    plan = last_plan(state / "plan")
    assert plan is not None
    assert first.preprocessing == plan.preprocessing
    assert set(first.plan["reasons"]) >= {"modality", "frame", "spacing_mm", "patch_size", "preset", "strides"}
    assert first.recipe["batch_size"] == plan.recipe_changes["batch_size"]
    # Thicker slices would be planned otherwise, but a training that continues changes nothing.
    thick = [write_case(f"t{number}", seed=number, size=(60, 60, 10), affine=THICK) for number in range(4)]
    continued = learner(state, thick).learn([*cases, *thick[:1]], options).card
    assert continued.parent == "v0001"
    assert (continued.preprocessing, continued.network_options) == (first.preprocessing, first.network_options)
    again = learner(state, thick).learn([*cases, *thick], Round(scratch_recipe=QUICK, from_scratch=True)).card
    assert again.preprocessing != first.preprocessing
    network, card = load_model(ModelVersions(state / "versions").path("v0003"))
    assert network.strides[0] == (2, 2, 1)
    assert card.to_json() == again.to_json()


def test_the_labels_of_now_decide_what_a_continued_model_keeps(write_case, tmp_path: Path) -> None:
    cases = [write_case(f"c{number}", seed=number, size=(24, 24, 24)) for number in range(4)]
    for case in cases[:3]:
        label = np.zeros((24, 24, 24), np.uint8)
        label[4:12, 4:12, 4:12], label[12:20, 4:12, 4:12] = 1, 2
        nib.save(nib.Nifti1Image(label, nib.load(case.image).affine), case.label)
    model = tmp_path / "model.safetensors"
    for kept in (False, True):
        card = ModelCard(labels=LABELS, preprocessing=Preprocessing("ct", keep_largest=kept), preset="tiny")
        save_model(model, DeformUXNet(1, 3, "tiny"), card)
        own = planner(tmp_path / "state", cases)
        assert own.continued(model).preprocessing == card.preprocessing
        one_piece, apart = own.continued(model, cases[:3]), own.continued(model, cases)
        assert one_piece.preprocessing.keep_largest
        assert not apart.preprocessing.keep_largest
        assert "in 1 of 4 labelled scans" in apart.reasons["keep_largest"]
        assert planner(tmp_path / "state", cases, keep_largest=kept).continued(model, cases).preprocessing == (
            card.preprocessing
        )


def test_what_a_user_gives_is_taken_at_once(write_case, tmp_path: Path) -> None:
    cases = [write_case(f"c{number}", seed=number, size=(24, 24, 24)) for number in range(2)]
    state, options = tmp_path / "state", Round(scratch_recipe=QUICK, continue_recipe=QUICK)
    learner(state, cases).learn(cases, options)
    card = learner(state, cases, spacing_mm=(2.0, 2.0, 2.0), patch_size=(16, 16, 16)).learn(cases, options).card
    assert card.parent == "v0001"
    assert card.preprocessing.spacing_mm == (2.0, 2.0, 2.0)
    assert card.preprocessing.patch_size == (16, 16, 16)


def test_a_killed_round_goes_on_with_the_plan_and_the_steps_it_began_with(write_case, tmp_path: Path) -> None:
    cases = [write_case(f"c{number}", seed=number, size=(24, 24, 24)) for number in range(3)]
    state = tmp_path / "state"
    options = Round(scratch_recipe=QUICK, minutes=0.1, checkpoint_seconds=0)
    with pytest.raises(TrainingStopped):
        learner(state, cases).learn(cases[:2], options, stop=(state / "training" / "recipe-0.json").exists)
    kept = {file.name: file.read_text() for file in (state / "training").glob("*.json")}
    assert {"plan-0.json", "recipe-0.json"} <= set(kept)
    # Meanwhile there are other scans, by which a new plan would be another.
    thick = [write_case(f"t{number}", seed=number, size=(60, 60, 10), affine=THICK) for number in range(9)]
    steps = []
    outcome = learner(state, thick).learn(cases[:2], options, on_progress=lambda p: steps.append(p.total_steps))
    assert outcome.published
    recipe = outcome.card.recipe
    assert f'"steps": {recipe["steps"]},' in kept["recipe-0.json"]
    assert outcome.card.preprocessing.to_dict()["patch_size"] == last_plan(state / "plan").preprocessing.patch_size
    assert set(steps) == {steps[0]}


def test_as_many_steps_as_fit_into_the_time(write_case) -> None:
    cases = [write_case(f"c{number}", seed=number, size=(24, 24, 24)) for number in range(2)]
    prep = Preprocessing("ct", patch_size=(16, 16, 16))
    torch.manual_seed(0)
    network = DeformUXNet(1, 3, "tiny", guidance=True)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    options = {"recipe": RECIPES["finetune"], "prep": prep, "labels": LABELS, "val_cases": cases[:1]}
    short = in_minutes(0.05, network, cases, **options)
    long = in_minutes(10, network, cases, **options)
    assert long.steps > 3 * short.steps
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    began = time.process_time()
    fit(network, cases, **{**options, "recipe": short})
    # Of this process, for machines are shared: this catches a factor, not a percentage.
    assert time.process_time() - began < 6 * 60 * 0.05 + 10
    with pytest.raises(ValueError, match="minutes must be a positive number; got 0"):
        in_minutes(0, network, cases, **options)
