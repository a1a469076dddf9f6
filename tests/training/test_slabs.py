"""Logits slab by slab, against MONAI's sliding window and against the whole volume."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from torch import Tensor

from deformux.data.grid import ScanGrid, highest
from deformux.inference import slabs as slab_module
from deformux.inference.slab_labels import SlabLabels
from deformux.inference.slabs import LogitSlab, Windows, hand_on, logit_slabs
from deformux.inference.sliding_window import WindowInferer

SHAPES = {
    "several windows": ((50, 41, 37), (16, 16, 16)),
    "smaller than the window": ((9, 12, 7), (16, 16, 16)),
    "partly smaller": ((40, 10, 33), (16, 16, 16)),
    "anisotropic": ((30, 37, 12), (24, 16, 4)),
    "one slice": ((33, 40, 1), (16, 16, 1)),
    "one window": ((16, 16, 16), (16, 16, 16)),
}


def network(x: Tensor) -> Tensor:
    """Return four classes that depend on the place in the window, as a network's do at its borders."""
    ramp = torch.linspace(-1, 1, x.shape[2])[:, None, None]
    padded = torch.nn.functional.pad(x, [1] * 6, mode="replicate")
    smooth = torch.nn.functional.avg_pool3d(padded, 3, 1)
    return torch.cat([x, 2 * smooth - x, x * ramp, smooth.flip(4)], 1)


@pytest.fixture
def in_slabs(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a function after which even the smallest scan is summed in slabs and handed on in pieces."""

    def small() -> None:
        monkeypatch.setattr(slab_module, "_WHOLE_BYTES", 0)
        monkeypatch.setattr(slab_module, "_PIECE_BYTES", 40_000)

    return small


def joined(found: list[LogitSlab]) -> Tensor:
    for before, after in itertools.pairwise(found):
        assert before.stop == after.start
    return torch.cat([slab.logits for slab in found], found[0].axis + 1)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slabs_are_monais_sliding_window(name: str, axis: int, in_slabs: Callable[[], None]) -> None:
    size, window = SHAPES[name]
    image = torch.from_numpy(np.random.default_rng(1).normal(size=(1, *size)).astype(np.float32))
    monai = SlidingWindowInferer(window, overlap=0.25, mode="gaussian", padding_mode="replicate")(image[None], network)
    windows = Windows(size, window)
    assert torch.equal(joined(list(logit_slabs(image, network, windows, axis=0))), monai[0])
    in_slabs()
    found = list(logit_slabs(image, network, windows, axis=axis))
    torch.testing.assert_close(joined(found), monai[0], rtol=1e-5, atol=1e-5)
    assert axis or torch.equal(joined(found), monai[0]), "MONAI's own order"


def grids() -> dict[str, MetaTensor]:
    rng = np.random.default_rng(2)
    made = {}
    turned = np.array([[0, -1.5, 0, 3], [0, 0, 2, -4], [-1, 0, 0, 9], [0, 0, 0, 1.0]])
    angle = np.deg2rad(8)
    oblique = np.eye(4)
    oblique[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    for name, affine, target, size in (
        ("same", np.eye(4), np.eye(4), (30, 28, 33)),
        ("finer", np.diag([0.8, 0.7, 0.9, 1]), np.eye(4), (38, 41, 36)),
        ("coarser", np.diag([1.5, 2, 1.2, 1]), np.eye(4), (20, 14, 27)),
        ("permuted and flipped", turned, np.eye(4), (33, 20, 14)),
        ("oblique", oblique, np.eye(4), (26, 24, 33)),
    ):
        image = MetaTensor(torch.from_numpy(rng.normal(size=(1, 30, 28, 33)).astype(np.float32)), affine=target)
        image.meta |= {"original_affine": affine, "spatial_shape": np.array(size)}
        made[name] = image
    return made


@pytest.mark.parametrize("name", grids())
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_labels_of_slabs_are_those_of_the_whole_volume(name: str, axis: int, in_slabs: Callable[[], None]) -> None:
    image = grids()[name]
    grid = ScanGrid.of(image)
    whole = WindowInferer((16, 16, 16))(image[None], network)[0]
    expected = grid.labels(whole)
    in_slabs()
    labels = SlabLabels(grid)
    hand_on(logit_slabs(image, network, Windows((30, 28, 33), (16, 16, 16)), axis=axis), [labels])
    assert labels.labels.dtype == torch.uint8
    # Coordinates relative to a slab round differently, which decides ties.
    assert (labels.labels != expected).float().mean() < (1e-3 if name != "same" else 1e-6)


def test_windows_of_air_are_computed_once_and_change_nothing() -> None:
    image = torch.zeros(1, 64, 32, 32)
    image[:, :20, :20, :20] = torch.rand(1, 20, 20, 20) + 0.1
    calls = []

    def counted(x: Tensor) -> Tensor:
        calls.append(len(x))
        return network(x)

    windows = Windows((64, 32, 32), (16, 16, 16))
    found = joined(list(logit_slabs(image, counted, windows)))
    expected = SlidingWindowInferer((16, 16, 16), mode="gaussian")(image[None], network)[0]
    assert torch.equal(found, expected)
    assert sum(calls) < len(windows.starts) / 2


@pytest.mark.parametrize("axis", [0, 2])
def test_windows_that_are_left_out_are_background(axis: int, in_slabs: Callable[[], None]) -> None:
    image = torch.rand(1, 40, 30, 35) + 1
    windows = Windows((40, 30, 35), (16, 16, 16))
    wanted = [start[0] == 12 and start[1] == 12 for start in windows.starts]
    assert 0 < sum(wanted) < len(wanted)
    results = []
    for small in (False, True):
        if small:
            in_slabs()
        results.append(joined(list(logit_slabs(image, network, windows, wanted=wanted, axis=axis))))
    torch.testing.assert_close(*results)
    seen = torch.zeros(40, 30, 35, dtype=torch.bool)
    seen[12:28, 12:28] = True
    classes = highest(results[1])
    assert (classes[~seen] == 0).all()
    assert (classes[seen] > 0).any()


def test_progress_counts_every_window_and_may_end_it() -> None:
    image = torch.rand(1, 40, 30, 35)
    windows = Windows((40, 30, 35), (16, 16, 16))
    told: list[tuple[int, int]] = []
    list(logit_slabs(image, network, windows, on_windows=lambda done, of: told.append((done, of))))
    assert told == [(n, len(windows.starts)) for n in range(1, len(windows.starts) + 1)]

    def stop(done: int, _: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(logit_slabs(image, network, windows, on_windows=stop))


def test_memory_does_not_grow_with_the_classes_of_the_whole_scan(repository: Path) -> None:
    """Labels, uncertainty and what clicks need, together, beside the logits that were once kept whole."""
    driver = repository / "tests/training/slab_memory_driver.py"
    found = json.loads(subprocess.run([sys.executable, driver], check=True, capture_output=True, text=True).stdout)
    assert found["all_logits"] > 512 * 2**20, "it must not count as a small scan"
    assert found["grown"] < 0.65 * found["all_logits"]
