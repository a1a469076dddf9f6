"""Scans without a label: which are learnt from, what the teacher says of them, and how patches are mixed."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from deformux.data.cases import Case, Scan
from deformux.data.preprocessing import Preprocessing
from deformux.fitting.fit import TrainingStopped, fit
from deformux.fitting.minutes import in_minutes
from deformux.fitting.patches import Patches
from deformux.fitting.recipe import RECIPES, Recipe
from deformux.fitting.unlabelled import MeanTeacher, UnlabelledPatches, labelled_region, read_scans
from deformux.networks.deformux_net import DeformUXNet
from deformux.networks.presets import PRESETS, Preset
from deformux.publishing.learner import Learner, Round

LABELS = ("ball", "box")
PREP = Preprocessing("ct", patch_size=(16, 16, 16))
RECIPE = RECIPES["finetune"].replace(
    steps=6, epochs=2, clicks=2, click_start=0.0, mixed_precision=False, unlabelled_scans=8, unlabelled_start=0.3
)
SMALL = Preset((4, 8, 16, 32), 32, (1, 1, 1, 1))


@pytest.fixture(autouse=True)
def small_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use networks of a hundredth of the size: these tests are about what happens around them."""
    monkeypatch.setattr("deformux.networks.deformux_net.PRESETS", {**PRESETS, "small-test": SMALL})


def network() -> DeformUXNet:
    torch.manual_seed(0)
    return DeformUXNet(1, 3, "small-test", guidance=True)


def as_scan(case: Case) -> Scan:
    return Scan(case.id, case.images)


class Rounding(nn.Module):
    """A network whose class is the rounded voxel, and surer the nearer that is to a whole number."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes, self.weight = classes, nn.Parameter(torch.zeros(1))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        distance = torch.stack([(image[:, 0] - value).abs() for value in range(self.classes)], 1)
        return -8 * distance + self.weight


def teacher(recipe: Recipe = RECIPE, classes: int = 3) -> MeanTeacher:
    return MeanTeacher(AveragedModel(Rounding(classes)), recipe, seed=0)


def test_patches_are_mixed_in_turns_and_each_half_keeps_its_own_labels() -> None:
    size = (2, 1, 12, 9, 6)
    image, label = torch.full(size, 10.0), torch.ones(size, dtype=torch.uint8)
    others = torch.randint(0, 3, size).float()
    annotated = torch.ones(2, 3, dtype=torch.bool)
    nowhere = torch.zeros(size, dtype=torch.uint8)
    boxes = []
    for step in (3, 4):
        mixed, answers, clicked = teacher().mixed(step, image, label, annotated, others, nowhere)
        foreign = mixed != 10.0
        assert torch.equal(mixed[foreign], others[foreign])
        assert torch.equal(answers[foreign].float(), others[foreign]), "certain answers are the labels"
        assert (answers[~foreign] == 1).all()
        # Nobody clicks on what the teacher said.
        assert torch.equal(clicked == 255, foreign)
        # Two thirds of each side, inside one patch and outside the other.
        assert int(foreign[0].sum()) == 8 * 6 * 4
        assert torch.equal(foreign[0], ~foreign[1])
        boxes.append(foreign[0])
    assert not torch.equal(*boxes)
    again = teacher().mixed(4, image, label, annotated, others, nowhere)[0]
    assert torch.equal(again != 10.0, torch.stack([boxes[1], ~boxes[1]]))


def test_voxels_without_a_sure_answer_are_unlabelled_but_rare_labels_stay() -> None:
    size = (2, 1, 12, 12, 12)
    image, label = torch.full(size, 10.0), torch.zeros(size, dtype=torch.uint8)
    # Background is certain in most voxels, label 1 in none: 0.55 to 0.65 are less sure than 0.8 anywhere.
    others = torch.full(size, 0.02)
    others[..., :3] = 0.46
    others[..., 8:] = torch.linspace(0.505, 0.52, 4)
    everywhere = torch.zeros(size, dtype=torch.uint8)
    beyond = everywhere.clone()
    beyond[:, :, 0] = 255
    annotated = torch.ones(2, 3, dtype=torch.bool)
    mixed, answers, _ = teacher().mixed(3, image, label, annotated, others, beyond)
    foreign = (mixed != 10.0) & (beyond == 0)
    assert (answers[(mixed != 10.0) & (beyond == 255)] == 255).all()
    near, unsure = foreign & (others == 0.02), foreign & (others == 0.46)
    assert (answers[near] == 0).all()
    assert (answers[unsure] == 255).all()
    rare = foreign & (others > 0.5)
    assert set(answers[rare].tolist()) == {1, 255}, "the surer half of the voxels with label 1"
    assert (answers[foreign & (others > 0.519)] == 1).all()


def test_labels_that_were_not_annotated_beside_count_as_background() -> None:
    size = (2, 1, 12, 12, 12)
    annotated = torch.tensor([[True, True, True], [True, True, False]])
    others = torch.full(size, 2.0)
    mixed, answers, _ = teacher().mixed(
        3, torch.full(size, 10.0), torch.ones(size, dtype=torch.uint8), annotated, others, torch.zeros(size)
    )
    for number, value in enumerate((2, 0)):
        assert set(answers[number][mixed[number] == 2].tolist()) == {value}


def test_unlabelled_patches_come_from_where_labels_are_whatever_the_file_s_axes(write_case, tmp_path: Path) -> None:
    """The label is in one corner of the body; the unlabelled file is stored with other axes."""
    case = write_case("a", size=(48, 48, 32))
    for path, values in ((case.image, np.zeros((48, 48, 32), np.float32)), (case.label, np.zeros((48, 48, 32)))):
        values = values.copy()
        values[40:46, 2:8, 24:30] = 100 if path == case.image else 1
        nib.save(nib.Nifti1Image(values.astype(np.float32), np.diag([2.0, 2, 3, 1])), path)
    file = nib.load(case.image)
    turned = nib.as_closest_canonical(file).as_reoriented(np.array([[2, -1], [0, -1], [1, 1]]))
    other = tmp_path / "other.nii.gz"
    nib.save(turned, other)
    recipe = RECIPE.replace(foreground_ratio=1.0, elastic_probability=0.0, affine_probability=0.0)
    options = {"recipe": recipe, "prep": PREP}
    region = labelled_region(Patches([case], new=(), labels=("x",), workers=0, **options))
    np.testing.assert_allclose(region, [(40 / 48, 2 / 48, 24 / 32), (46 / 48, 8 / 48, 30 / 32)])
    volumes = read_scans([Scan("other", (other,))], region, seed=0, **options)
    patches = UnlabelledPatches(volumes, n_labels=1, workers=0, **options)
    batches = list(patches.loader(first_step=0, steps=8, seed=0))
    assert all(float(batch["image"].max()) > 0.4 for batch in batches), "the bright corner is in every patch"
    assert all(batch["image"].shape == (2, 1, 16, 16, 16) for batch in batches)


def test_a_training_with_scans_resumes_exactly(write_case, tmp_path: Path) -> None:
    cases = [write_case(f"c{number}", seed=number) for number in range(5)]
    options = {"recipe": RECIPE, "prep": PREP, "labels": LABELS, "scans": [as_scan(case) for case in cases[2:]]}
    whole, without, parts = network(), network(), network()
    fit(whole, cases[:2], **options)
    fit(without, cases[:2], **{**options, "scans": ()})
    for stop_at in (2, 4):
        steps = iter(range(1, stop_at + 1))
        with pytest.raises(TrainingStopped):
            fit(
                parts,
                cases[:2],
                **options,
                checkpoint=tmp_path / "checkpoint",
                checkpoint_seconds=0.0,
                stop=lambda steps=steps, last=stop_at: next(steps, last) >= last,
            )
        parts = network()
    result = fit(parts, cases[:2], **options, checkpoint=tmp_path / "checkpoint")
    assert result.resumed_from > 0
    assert all(torch.equal(value, parts.state_dict()[name]) for name, value in whole.state_dict().items())
    assert any(not torch.equal(value, without.state_dict()[name]) for name, value in whole.state_dict().items())


def test_an_unreadable_scan_is_left_out_with_a_warning(write_case, tmp_path: Path, caplog) -> None:
    cases = [write_case(f"c{number}", seed=number) for number in range(2)]
    damaged = tmp_path / "damaged.nii.gz"
    damaged.write_bytes(cases[1].image.read_bytes()[:2000])
    empty = tmp_path / "empty.nii.gz"
    empty.touch()
    scans = [Scan(path.name, (path,)) for path in (damaged, empty)]
    recipe = RECIPE.replace(steps=2, epochs=1, unlabelled_start=0.0)
    with caplog.at_level(logging.WARNING):
        fit(network(), cases[:1], recipe=recipe, prep=PREP, labels=LABELS, scans=[*scans, as_scan(cases[1])])
        fit(network(), cases[:1], recipe=recipe, prep=PREP, labels=LABELS, scans=scans)
        sure = in_minutes(0.05, network(), cases[:1], recipe=recipe, prep=PREP, labels=LABELS, scans=scans)
    assert sure.steps > 0
    said = [record.getMessage() for record in caplog.records]
    assert sum("damaged.nii.gz is not learnt from" in line for line in said) == 2


def test_memory_and_minutes_bound_how_many_scans_are_read(write_case) -> None:
    cases = [write_case(f"c{number}", seed=number) for number in range(6)]
    scans = [as_scan(case) for case in cases]
    whole = ((0.0,) * 3, (1.0,) * 3)
    some = read_scans(scans, whole, recipe=RECIPE.replace(unlabelled_scans=4), prep=PREP, seed=0)
    others = read_scans(scans, whole, recipe=RECIPE.replace(unlabelled_scans=4), prep=PREP, seed=1)
    assert len(some) == len(others) == 4
    assert set(some) != set(others)
    # 32 x 32 x 24 voxels at 8 bytes, in half of the memory.
    little = RECIPE.replace(cache_gb=2 * 2.5 * 32 * 32 * 24 * 8 / 1e9)
    assert len(read_scans(scans, whole, recipe=little, prep=PREP, seed=0)) == 2
    assert not read_scans(scans, whole, recipe=RECIPE, prep=PREP, seed=0, stop=lambda: True)
    options = {"prep": PREP, "labels": LABELS}
    assert in_minutes(2, network(), cases[:1], recipe=RECIPE, scans=scans, **options).unlabelled_scans == 6
    hurried = in_minutes(1e-5, network(), cases[:1], recipe=RECIPE, scans=scans, **options)
    assert hurried.unlabelled_scans == 0
    assert in_minutes(0.01, network(), cases[:1], recipe=RECIPE, **options).unlabelled_scans == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"unlabelled_scans": -1}, "unlabelled_scans must be a whole number"),
        ({"unlabelled_scans": 1, "ema_decay": None}, "needs ema_decay"),
        ({"unlabelled_start": 1.5}, "unlabelled_start must be between 0 and 1"),
        ({"unlabelled_confidence": -0.1}, "unlabelled_confidence must be between 0 and 1"),
    ],
)
def test_bad_numbers_are_refused(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RECIPE.replace(**changes)
    assert Recipe.from_dict(RECIPE.to_dict()) == RECIPE
    assert "unlabelled_scans" not in RECIPES["paper"].to_dict()


def test_a_round_learns_from_scans_that_never_validate(write_case, tmp_path: Path, monkeypatch) -> None:
    cases = [write_case(f"c{number}", seed=number, size=(16, 16, 16)) for number in range(14)]
    seen: list[set[str]] = []
    step = RECIPE.replace(steps=2, epochs=1, batch_size=1, clicks=0)
    broken = dataclasses.replace(cases[6], label=cases[6].image)

    def noting(scans, *arguments, **options):
        seen.append({scan.id for scan in scans})
        return read_scans(scans, *arguments, **options)

    monkeypatch.setattr("deformux.fitting.fit.read_scans", noting)
    learner = Learner(tmp_path / "state", labels=LABELS, preprocessing=PREP, preset="small-test")
    outcome = learner.learn(
        [*cases[:6], broken], Round(step, step), scans=[as_scan(case) for case in (*cases[3:], cases[0])]
    )
    # One in five, by the hash of the id, is kept for validation from the start.
    later = {c.id for c in cases[7:] if int(hashlib.sha256(c.id.encode()).hexdigest()[:16], 16) % 5 == 0}
    assert later, "choose other names"
    assert seen == [{case.id for case in cases[7:]} - later]
    assert "c6" in outcome.set_aside
    assert outcome.card.recipe["unlabelled_scans"] == 8
