"""Coarse to fine: which windows are left out, and when none may be."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from torch import Tensor, nn

from deformux.data.cases import Case
from deformux.data.grid import slices
from deformux.data.preprocessing import Preprocessing
from deformux.fitting.locator_training import FittedLocator, fit_locator
from deformux.inference.locate import Locator, coarse_factors, coarsened, touched
from deformux.inference.locator_file import load_locator, locator_path, save_locator
from deformux.inference.slabs import Windows
from deformux.inference.sliding_window import segment_labels
from deformux.networks.deformux_net import DeformUXNet
from deformux.networks.model_file import InvalidModel, ModelCard
from deformux.publishing.model_versions import ModelVersions

PREP = Preprocessing("ct", patch_size=(16, 16, 16))
LABELS = ("ball", "box")


class Bright(nn.Module):
    """Finds label 1 where the scan is bright, label 2 nowhere."""

    def forward(self, x: Tensor) -> Tensor:
        lead = 40 * (x - 0.7)
        return torch.cat([-lead, lead, torch.full_like(x, -50)], 1)


@pytest.fixture
def write_large(tmp_path: Path) -> Callable[..., Case]:
    """Return a function that writes a scan of many windows, with a bright ball and a dark box beside each other."""

    def write(name: str, *, seed: int = 0, size: tuple[int, int, int] = (90, 80, 72)) -> Case:
        rng = np.random.default_rng(seed)
        grid = np.stack(np.meshgrid(*[np.arange(n) for n in size], indexing="ij"))
        centre = rng.integers(20, 28, 3)
        ball = ((grid - centre[:, None, None, None]) ** 2).sum(0) < 90
        low = (centre + 11)[:, None, None, None]
        box = np.all((grid >= low) & (grid < low + 11), axis=0)
        hu = rng.normal(20, 10, size) + 250 * ball - 180 * box
        case = Case(name, tmp_path / f"{name}_image.nii.gz", tmp_path / f"{name}_label.nii.gz")
        affine = np.diag([2.0, 2.0, 2.5, 1.0])
        nib.save(nib.Nifti1Image(hu.astype(np.float32), affine), case.image)
        nib.save(nib.Nifti1Image((ball + 2 * box).astype(np.uint8), affine), case.label)
        return case

    return write


def bright_locator(**changes) -> Locator:
    locator = Locator(Bright(), (3, 3, 3), (16, 16, 16), ((0.0, 1.0),), threshold=0.1, margin_mm=6.0)
    return dataclasses.replace(locator, **changes)


def scan(bright: tuple[slice, slice, slice] | None) -> MetaTensor:
    values = torch.full((1, 90, 80, 72), 0.3)
    if bright is not None:
        values[(0, *bright)] = 1.0
    return MetaTensor(values, affine=np.diag([1.0, 2.0, 3.0, 1.0]))


def test_every_window_near_a_label_is_wanted_and_most_others_are_not() -> None:
    bright = (slice(30, 41), slice(12, 23), slice(50, 61))
    windows = Windows((90, 80, 72), (16, 16, 16))
    wanted = bright_locator().wanted(scan(bright), windows)
    assert wanted is not None
    where = np.zeros((90, 80, 72), dtype=bool)
    # The margin is 6 mm of voxels of 1, 2 and 3 mm.
    where[24:47, 9:26, 48:63] = True
    core = np.zeros_like(where)
    core[bright] = True
    for start, want in zip(windows.starts, wanted, strict=True):
        inside = slices(windows.box(start))
        assert want or not core[inside].any(), "brute force"
        if not where[inside].any():
            # Three voxels more, since the locator sees blocks of three.
            grown = tuple(slice(max(0, s.start - 6), s.stop + 6) for s in inside)
            assert not want or where[grown].any()
    assert sum(wanted) < len(wanted) / 3


@pytest.mark.parametrize("factors", [(1, 1, 1), (2, 3, 5)])
def test_touched_windows_are_those_of_brute_force(factors: tuple[int, int, int]) -> None:
    size = (41, 30, 27)
    windows = Windows(size, (16, 8, 12))
    coarse = tuple(-(-n // f) for n, f in zip(size, factors, strict=True))
    where = np.random.default_rng(1).random(coarse) > 0.995
    fine = where.repeat(factors[0], 0).repeat(factors[1], 1).repeat(factors[2], 2)[: size[0], : size[1], : size[2]]
    found = touched(where, factors, windows)
    for start, want in zip(windows.starts, found, strict=True):
        low, high = windows.box(start)
        first = [a // f for a, f in zip(low, factors, strict=True)]
        last = [-(-b // f) for b, f in zip(high, factors, strict=True)]
        assert want == where[tuple(slice(a, b) for a, b in zip(first, last, strict=True))].any()
        assert want or not fine[slices((low, high))].any()


def test_all_windows_are_computed_where_the_locator_is_unsure() -> None:
    bright = (slice(30, 41), slice(12, 23), slice(50, 61))
    windows = Windows((90, 80, 72), (16, 16, 16))
    assert bright_locator().wanted(scan(None), windows) is None, "it finds nothing"
    assert bright_locator(expected=(1, 2)).wanted(scan(bright), windows) is None, "it misses a label it always found"
    assert bright_locator(expected=(1,)).wanted(scan(bright), windows) is not None
    few = Windows((90, 80, 72), (64, 64, 64))
    assert bright_locator().wanted(scan(bright), few) is None, "a scan of few windows has no need of it"


def test_coarse_voxels_are_few_and_as_cubic_as_can_be() -> None:
    factors = coarse_factors((512, 512, 300), (0.8, 0.8, 1.5))
    assert np.prod([-(-n // f) for n, f in zip((512, 512, 300), factors, strict=True)]) <= 96**3
    sides = np.array(factors) * (0.8, 0.8, 1.5)
    assert sides.max() / sides.min() < 1.6
    assert coarsened(torch.zeros(1, 512 // 8, 30, 7), (4, 4, 4)).shape == (1, 16, 8, 2)


def test_a_small_scan_needs_no_locator(write_case) -> None:
    cases = [write_case(f"case{i}", seed=i) for i in range(2)]
    assert fit_locator(cases, prep=dataclasses.replace(PREP, patch_size=(32, 32, 16)), labels=LABELS) == FittedLocator()


def bright_forward(self: DeformUXNet, x: Tensor) -> Tensor:
    """Find the ball where a scan is bright and the box where it is dark, as a trained locator would."""
    ball, box = 60 * (x - 0.75), 60 * (0.25 - x)
    return torch.cat([torch.zeros_like(x), ball, box], 1)


@pytest.fixture
def fitted(write_large, monkeypatch: pytest.MonkeyPatch) -> FittedLocator:
    """Return what ``fit_locator`` makes of a network that has learnt its task."""
    monkeypatch.setattr("deformux.fitting.locator_training._train", lambda *_, **__: None)
    monkeypatch.setattr(DeformUXNet, "forward", bright_forward)
    cases = [write_large(f"case{i}", seed=i) for i in range(4)]
    return fit_locator(cases[:3], prep=PREP, labels=LABELS, val_cases=cases[3:], seconds=20)


def test_a_locator_that_loses_no_labelled_voxel_is_used(fitted: FittedLocator, write_large) -> None:
    assert fitted.locator is not None, fitted.facts
    assert fitted.facts["recall"] == 1
    assert fitted.facts["share_of_windows"] < 0.8
    assert fitted.facts["cases"] == 4
    assert fitted.locator.expected == (1, 2)
    json.dumps(fitted.facts)
    # A scan it has not seen, through a network that marks brightness: nothing that is there may be lost.
    case = write_large("new", seed=9)
    whole = segment_labels(Bright(), case.image, PREP)
    told: list[int] = []
    found = segment_labels(Bright(), case.image, PREP, locator=fitted.locator, on_windows=lambda _, of: told.append(of))
    assert told[0] < len(Windows((90, 80, 72), (16, 16, 16)).starts)
    np.testing.assert_array_equal(found.numpy(), whole.numpy())
    assert (whole == 1).sum() > 300


@pytest.mark.slow
def test_a_locator_learns_from_the_models_labels(write_large, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deformux.fitting.locator_training._LEAST_STEPS", 150)
    monkeypatch.setattr("deformux.fitting.locator_training._MOST_STEPS", 150)
    cases = [write_large(f"case{i}", seed=i) for i in range(4)]
    found = fit_locator(cases[:3], prep=PREP, labels=LABELS, val_cases=cases[3:], seconds=3000)
    assert found.locator is not None, found.facts
    assert found.facts["recall"] == 1


def test_a_locator_that_misses_labels_is_refused(write_large, monkeypatch: pytest.MonkeyPatch) -> None:
    """Untrained, it finds nothing but chance."""
    cases = [write_large(f"case{i}", seed=i) for i in range(2)]

    def forget(self: DeformUXNet, x: Tensor) -> Tensor:
        logits = torch.zeros(len(x), self.out_channels, *x.shape[2:])
        logits[:, 0] = 30
        return logits

    monkeypatch.setattr("deformux.fitting.locator_training._train", lambda *_, **__: None)
    monkeypatch.setattr(DeformUXNet, "forward", forget)
    found = fit_locator(cases, prep=PREP, labels=LABELS, seconds=1)
    assert found.locator is None
    assert "misses" in found.facts["refused"]


def test_versions_keep_and_delete_locators_with_their_models(fitted: FittedLocator, tmp_path: Path) -> None:
    versions = ModelVersions(tmp_path / "versions")
    card = ModelCard(LABELS, PREP, "tiny", locator=fitted.facts)
    network = DeformUXNet(1, 3, "tiny")
    names = [versions.write(network, card, locator=fitted.locator) for _ in range(3)]
    versions.publish(names[0])
    assert versions.names() == names
    loaded = load_locator(versions.path(names[0]), versions.card(names[0]))
    assert loaded is not None
    assert fitted.locator is not None
    assert loaded.to_dict() == fitted.locator.to_dict()
    coarse = torch.rand(1, 20, 20, 20)
    np.testing.assert_array_equal(loaded.look(coarse).foreground, fitted.locator.look(coarse).foreground)

    assert versions.prune(1) == [names[1]]
    assert not locator_path(tmp_path / "versions" / f"{names[1]}.safetensors").exists()
    assert locator_path(versions.path(names[2])).exists()

    data = bytearray(locator_path(versions.path(names[0])).read_bytes())
    data[-1] ^= 1
    locator_path(versions.path(names[0])).write_bytes(data)
    with pytest.raises(InvalidModel, match="damaged"):
        load_locator(versions.path(names[0]), versions.card(names[0]))
    assert versions.published() == names[0], "its model is sound"
    locator_path(versions.path(names[2])).unlink()
    with pytest.raises(InvalidModel, match="no locator"):
        load_locator(versions.path(names[2]), versions.card(names[2]))


def test_a_model_without_a_locator_has_none(tmp_path: Path) -> None:
    card = ModelCard(LABELS, PREP, "tiny", locator={"refused": "it misses a label"})
    assert load_locator(tmp_path / "model.safetensors", card) is None
    described = save_locator(
        tmp_path / "model.safetensors",
        Locator(DeformUXNet(1, 3, "tiny"), (3, 3, 3), (16, 16, 16), ((0.0, 1.0),), 0.1, 10.0),
        dataclasses.replace(card, locator={}),
    )
    assert ModelCard.from_json(described.to_json()).locator == described.locator
