"""Coarse to fine with several sequences: labels that only one of them shows, and scans that lack some."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from torch import Tensor, nn

from deformux.data.cases import Case
from deformux.data.grid import slices
from deformux.data.preprocessing import Preprocessing
from deformux.fitting import locator_training
from deformux.fitting.locator_training import FittedLocator, fit_locator
from deformux.fitting.recipe import RECIPES
from deformux.inference.locate import Locator, missing_channels, seen_intensities
from deformux.inference.locator_file import load_locator, save_locator
from deformux.inference.slabs import Windows
from deformux.inference.sliding_window import segment_labels
from deformux.networks.deformux_net import DeformUXNet
from deformux.networks.model_file import InvalidModel, ModelCard, save_model
from deformux.publishing.learner import Learner, Round
from deformux.publishing.model_versions import ModelVersions

SIZE = (90, 80, 72)
LABELS = ("ball", "box")
PREP = Preprocessing("ct", patch_size=(16, 16, 16), sequences=("arterial", "venous"))
OLD_CARD = {
    "factors": [3, 3, 3],
    "patch_size": [16, 16, 16],
    "window": [0.0, 1.0],
    "threshold": 0.1,
    "margin_mm": 6.0,
    "expected": [1],
}


def two_sequences(self: nn.Module, x: Tensor) -> Tensor:
    """Find label 1 where the first sequence is bright, label 2 where the second is, which is 0 where it is missing."""
    ball, box = 60 * (x[:, :1] - 0.75), 60 * (x[:, 1:2] - 0.75)
    return torch.cat([torch.zeros_like(ball), ball, box], 1)


class TwoSequences(nn.Module):
    forward = two_sequences


def two_locator(**changes: Any) -> Locator:
    ranges = ((0.0, 1.0), (-2.0, 6.0))
    return dataclasses.replace(Locator(TwoSequences(), (3, 3, 3), (16, 16, 16), ranges, 0.1, 6.0), **changes)


def scan(*, second: bool = True) -> MetaTensor:
    """Return a scan whose first sequence shows label 1 and whose second shows label 2, elsewhere."""
    values = torch.zeros(2, *SIZE)
    values[0] = 0.3
    values[0, 12:24, 12:24, 12:24] = 1.0
    if second:
        values[1] = -1.0
        values[1, 60:72, 54:66, 48:60] = 6.0
    return MetaTensor(values, affine=np.eye(4))


@pytest.fixture
def write_pair(tmp_path: Path) -> Callable[..., Case]:
    """Return a function that writes a scan whose first sequence shows a ball and whose second shows a box."""

    def write(name: str, *, seed: int = 0, box: bool = True, sequences: Sequence[int] = (0, 1)) -> Case:
        rng = np.random.default_rng(seed)
        grid = np.stack(np.meshgrid(*[np.arange(n) for n in SIZE], indexing="ij"))
        centre = rng.integers(20, 28, 3)
        inside = ((grid - centre[:, None, None, None]) ** 2).sum(0) < 90
        low = (centre + 30)[:, None, None, None]
        corner = np.all((grid >= low) & (grid < low + 11), axis=0) & box
        files = tuple(tmp_path / f"{name}_{number:04d}.nii.gz" for number in range(2))
        affine = np.diag([2.0, 2.0, 2.5, 1.0])
        for number, shown in enumerate((inside, corner)):
            if number in sequences:
                hu = rng.normal(-100, 10, SIZE) + 350 * shown
                nib.save(nib.Nifti1Image(hu.astype(np.float32), affine), files[number])
        label = tmp_path / f"{name}.nii.gz"
        nib.save(nib.Nifti1Image((inside + 2 * corner).astype(np.uint8), affine), label)
        return Case(name, files[sequences[0]], label, images=files)

    return write


def block_means(values: np.ndarray, factors: Sequence[int]) -> np.ndarray:
    for axis, factor in enumerate(factors):
        starts = np.arange(0, values.shape[axis], factor)
        lengths = np.diff(np.r_[starts, values.shape[axis]])
        values = np.add.reduceat(values, starts, axis) / lengths.reshape([-1 if a == axis else 1 for a in range(3)])
    return values


def test_a_label_that_only_the_second_sequence_shows_is_found() -> None:
    windows = Windows(SIZE, (16, 16, 16))
    wanted = two_locator(expected=(1, 2)).wanted(scan(), windows)
    assert wanted is not None
    for number, part in enumerate(((slice(12, 24),) * 3, (slice(60, 72), slice(54, 66), slice(48, 60)))):
        shown = np.zeros(SIZE, dtype=bool)
        shown[part] = True
        touching = [
            want for start, want in zip(windows.starts, wanted, strict=True) if shown[slices(windows.box(start))].any()
        ]
        assert all(touching), f"label {number + 1}"
    assert sum(wanted) < len(wanted) / 3


def test_a_scan_that_lacks_a_sequence_is_cut_down_only_where_that_was_checked() -> None:
    windows = Windows(SIZE, (16, 16, 16))
    lacking = scan(second=False)
    assert two_locator().wanted(lacking, windows) is None
    assert two_locator(without=((0,),)).wanted(lacking, windows) is None, "that is another sequence"
    checked = two_locator(without=((1,),))
    wanted = checked.wanted(lacking, windows)
    assert wanted is not None
    assert 0 < sum(wanted) < len(wanted) / 3
    assert dataclasses.replace(checked, expected=(1, 2)).wanted(lacking, windows) is None, "label 2 is not found"


def test_missing_sequences_are_0_as_for_the_model() -> None:
    ranges = ((-1.0, 1.0), (-2.0, 6.0))
    coarse = torch.zeros(2, 4, 4, 4)
    coarse[0, 1:3] = 0.5
    assert missing_channels(coarse) == (1,)
    seen = seen_intensities(coarse, ranges)
    np.testing.assert_allclose(seen[0], (coarse[0] + 1) / 2)
    assert not seen[1].any()
    # A scan of one sequence lacks none, whatever its values.
    assert missing_channels(coarse[1:]) == ()
    np.testing.assert_allclose(seen_intensities(coarse[1:], ranges[1:]), torch.full((1, 4, 4, 4), 0.25))


@pytest.fixture
def fit_found(write_pair: Callable[..., Case], monkeypatch: pytest.MonkeyPatch) -> Callable[..., FittedLocator]:
    """Return a function that fits a locator whose network has learnt its task."""
    monkeypatch.setattr(locator_training, "_train", lambda *_, **__: None)
    monkeypatch.setattr(DeformUXNet, "forward", two_sequences)

    def fit_it(**options: Any) -> FittedLocator:
        # Only one of them has a box, so that finding none is no reason to compute all windows.
        cases = [write_pair(f"case{i}", seed=i, box=i == 1) for i in range(3)]
        return fit_locator(cases[:2], prep=PREP, labels=LABELS, val_cases=cases[2:], seconds=20, **options)

    return fit_it


def test_a_locator_of_several_sequences_is_kept_with_its_model(
    fit_found: Callable[..., FittedLocator], write_pair: Callable[..., Case], tmp_path: Path
) -> None:
    fitted = fit_found()
    assert fitted.locator is not None, fitted.facts
    assert (fitted.facts["recall"], fitted.locator.expected, fitted.locator.without) == (1, (1,), ())
    assert fitted.facts["share_of_windows"] < 0.8
    model = tmp_path / "model.safetensors"
    card = save_locator(model, fitted.locator, ModelCard(LABELS, PREP, "tiny", 2, locator=fitted.facts))
    save_model(model, DeformUXNet(2, 3, "tiny"), card)
    loaded = load_locator(model, ModelCard.from_json(card.to_json()))
    assert loaded is not None
    assert loaded.to_dict() == fitted.locator.to_dict()
    assert len(loaded.ranges) == 2
    # A scan it has not seen: nothing that either sequence shows is lost.
    case = write_pair("new", seed=9)
    whole = segment_labels(TwoSequences(), case.images, PREP)
    told: list[int] = []
    found = segment_labels(TwoSequences(), case.images, PREP, locator=loaded, on_windows=lambda _, of: told.append(of))
    assert told[0] < len(Windows(SIZE, (16, 16, 16)).starts)
    np.testing.assert_array_equal(found.numpy(), whole.numpy())
    assert [int((whole == value).sum()) > 300 for value in (1, 2)] == [True, True]
    # The file of a model of one sequence, or of three, is not this one's.
    for sequences in ((), ("a", "b", "c")):
        other = dataclasses.replace(card, preprocessing=dataclasses.replace(PREP, sequences=sequences))
        with pytest.raises(InvalidModel, match="does not fit"):
            load_locator(model, other)


def test_it_says_without_which_sequences_it_may_be_used(fit_found: Callable[..., FittedLocator]) -> None:
    locator = fit_found(sequence_dropout=0.1).locator
    assert locator is not None
    # Without the first, the ball that every scan has is missed, which is noticed; without the second, a box is lost.
    assert locator.without == ((0,),)
    assert Locator.from_dict(locator.to_dict(), locator.network).without == ((0,),)


def test_its_network_learns_from_all_sequences_with_the_models_dropout(
    write_pair: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_PROBE_STEPS", "_LEAST_STEPS", "_MOST_STEPS"):
        monkeypatch.setattr(locator_training, name, 1)
    small = {"batch_size": 1, "patches_per_volume": 1}
    monkeypatch.setattr(locator_training, "_RECIPE", locator_training._RECIPE.replace(**small))
    calls: list[dict[str, Any]] = []
    files: dict[str, list[np.ndarray | None]] = {}
    fit = locator_training.fit

    def watched(network: DeformUXNet, cases: Sequence[Case], **options: Any) -> Any:
        calls.append({"channels": network.in_channels, **options})
        for case in cases:
            files[case.id] = [np.asarray(nib.load(path).dataobj) if path.exists() else None for path in case.images]
        return fit(network, cases, **options)

    monkeypatch.setattr(locator_training, "fit", watched)
    cases = [write_pair("both"), write_pair("second", seed=1, sequences=(1,))]
    fit_locator(cases, prep=PREP, labels=LABELS, sequence_dropout=0.2, seconds=60)
    assert len(calls) == 2, "the steps that are timed, and the others"
    for call in calls:
        assert (call["channels"], call["prep"].channels, call["recipe"].sequence_dropout) == (2, 2, 0.2)
    assert [values is None for values in files["both"] + files["second"]] == [False, False, True, False]
    factors = [-(-n // m) for n, m in zip(SIZE, files["both"][0].shape, strict=True)]
    for number in (0, 1):
        expected, lows, highs = {}, [], []
        for case in cases:
            if case.images[number].exists():
                hu = nib.load(case.images[number]).get_fdata()
                expected[case.id] = block_means(np.clip((hu + 175) / 425, 0, 1), factors)
                lows.append(expected[case.id].min())
                highs.append(expected[case.id].max())
        for name, values in expected.items():
            scaled = (values - min(lows)) / (max(highs) - min(lows))
            np.testing.assert_allclose(files[name][number], scaled, atol=1e-5)


@pytest.mark.slow
def test_a_locator_learns_what_each_sequence_shows(
    write_pair: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locator_training, "_LEAST_STEPS", 150)
    monkeypatch.setattr(locator_training, "_MOST_STEPS", 150)
    cases = [write_pair(f"case{i}", seed=i) for i in range(4)]
    found = fit_locator(cases[:3], prep=PREP, labels=LABELS, val_cases=cases[3:], sequence_dropout=0.1, seconds=3000)
    assert found.locator is not None, found.facts
    assert (found.facts["recall"], found.locator.expected) == (1, (1, 2))


def test_a_round_gives_its_dropout_and_keeps_the_locator(
    write_pair: Callable[..., Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def ready(cases: Sequence[Case], *, prep: Preprocessing, sequence_dropout: float, **_: Any) -> FittedLocator:
        asked.append(sequence_dropout)
        return FittedLocator(two_locator(network=DeformUXNet(prep.channels, 3, "tiny"), without=((1,),)), {"recall": 1})

    monkeypatch.setattr("deformux.publishing.learner.fit_locator", ready)
    step = RECIPES["finetune"].replace(steps=1, epochs=1, batch_size=1, sequence_dropout=0.2)
    learner = Learner(tmp_path / "state", labels=LABELS, preprocessing=PREP, preset="tiny")
    learner.learn([write_pair("a")], Round(scratch_recipe=step))
    assert asked == [0.2]
    versions = ModelVersions(tmp_path / "state" / "versions")
    card = versions.card("v0001")
    assert card.preprocessing.missing_sequences
    locator = load_locator(versions.path("v0001"), card)
    assert locator is not None
    assert (len(locator.ranges), locator.without) == (2, ((1,),))


def test_cards_of_one_sequence_are_read_and_written_as_before() -> None:
    locator = Locator.from_dict(OLD_CARD, TwoSequences())
    assert (locator.ranges, locator.without) == (((0.0, 1.0),), ())
    assert locator.to_dict() == OLD_CARD
