"""Logits of large scans in bounded memory, and edits that start from them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deformux.data.grid import highest
from deformux.data.preprocessing import Preprocessing
from deformux.data.transforms import inference_transforms, run_transforms
from deformux.inference.slabs import LogitSlab
from deformux.interactive import kept_logits
from deformux.interactive.editor import Editor
from deformux.interactive.kept_logits import AllLogits, LogitKeeper, TopLogits
from deformux.interactive.open_scan import scan_from_slabs

SIZE = (20, 18, 14)


def logits_of(n_classes: int, *, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    values = torch.from_numpy(rng.normal(0, 3, (n_classes, *SIZE)).astype(np.float32))
    # Nearly equal ones, which float16 makes equal.
    values[1] = values[0] + 1e-4 * torch.from_numpy(rng.choice([-1, 1], SIZE).astype(np.float32))
    return values


def kept(logits: torch.Tensor, *, axis: int = 0, step: int = 5) -> LogitKeeper:
    keeper = LogitKeeper(SIZE)
    for start in range(0, SIZE[axis], step):
        part = logits.narrow(axis + 1, start, min(step, SIZE[axis] - start))
        keeper.add(LogitSlab(axis, start, part))
    return keeper


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_few_logits_are_all_kept(axis: int) -> None:
    logits = logits_of(6)
    keeper = kept(logits, axis=axis)
    found = keeper.kept()
    assert isinstance(found, AllLogits)
    assert torch.equal(highest(found.values.float()), highest(logits))
    torch.testing.assert_close(found.values.float(), logits, rtol=2e-3, atol=2e-3)
    np.testing.assert_array_equal(keeper.classes, highest(logits).numpy())


@pytest.mark.parametrize("axis", [0, 2])
@pytest.mark.parametrize("n_classes", [5, 6, 43])
def test_of_many_the_three_highest_are_kept(axis: int, n_classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_logits, "_ALL_BYTES", 0)
    monkeypatch.setattr(kept_logits, "_CHUNK", 3 * n_classes * SIZE[1] * SIZE[2])
    logits = logits_of(n_classes, seed=n_classes)
    keeper = kept(logits, axis=axis)
    found = keeper.kept()
    assert isinstance(found, TopLogits)
    assert found.nbytes == 11 * np.prod(SIZE)
    box = ((3, 0, 2), (20, 18, 9))
    part = logits[:, 3:20, 0:18, 2:9]
    values = found.in_box(box)
    assert torch.equal(highest(values), highest(part))
    top = part.topk(3, dim=0)
    torch.testing.assert_close(values.gather(0, top.indices), top.values, rtol=2e-3, atol=2e-3)
    rest = (part.sum(0) - top.values.sum(0)) / (n_classes - 3)
    others = torch.ones_like(part, dtype=torch.bool).scatter_(0, top.indices, value=False)
    torch.testing.assert_close(values[others], rest.expand_as(part)[others], rtol=5e-3, atol=5e-3)
    voxels = np.random.default_rng(1).integers(0, SIZE, (30, 3))
    whole = torch.cat([slab.logits for slab in found.slabs()], 1)
    np.testing.assert_array_equal(found.at(voxels), whole.numpy()[(slice(None), *voxels.T)])
    torch.testing.assert_close(found.probability(1, box), values.softmax(0)[1])


def test_edits_of_a_large_scan_are_order_free_and_reversible(write_case, monkeypatch: pytest.MonkeyPatch) -> None:
    """And clicks change what they change with all logits, but for few voxels."""
    n_labels, prep = 5, Preprocessing("ct", patch_size=(32, 32, 16))
    case = write_case("a", size=(44, 40, 28))
    image = run_transforms(inference_transforms(prep), {"image": case.image})["image"]
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in image.shape[1:]], indexing="ij")).astype(np.float32)
    centres = [(10 + 6 * label, 8 + 5 * label, 14) for label in range(1, n_labels + 1)]
    distances = [np.sqrt(((grid - np.array(c)[:, None, None, None]) ** 2).sum(0)) for c in centres]
    logits = torch.from_numpy(np.stack([np.zeros_like(distances[0]), *(3 * (6 - d) for d in distances)]))

    def network(x: torch.Tensor, guidance: torch.Tensor) -> torch.Tensor:
        found = torch.zeros(1, n_labels + 1, *x.shape[2:])
        found[:, 1:] = 4 * guidance[:, :n_labels]
        return found

    pieces = [LogitSlab(0, at, logits[:, at : at + 9]) for at in range(0, logits.shape[1], 9)]
    everything = scan_from_slabs(image, pieces)
    monkeypatch.setattr(kept_logits, "_ALL_BYTES", 0)
    bounded = scan_from_slabs(image, pieces)
    assert isinstance(bounded.logits, TopLogits)
    np.testing.assert_array_equal(bounded.labels, everything.labels)

    clicks = {1: [(22, 13, 14)], 2: [(16, 20, 14), (22, 26, 14)], 0: [(28, 23, 14)]}
    results = []
    for scan in (everything, bounded):
        editor = Editor(scan, network, prep)
        first = editor.apply({1: clicks[1]})
        both = editor.apply(clicks)
        np.testing.assert_array_equal(editor.apply({1: clicks[1]}), first)
        np.testing.assert_array_equal(editor.apply({}), scan.labels)
        backwards = {label: voxels[::-1] for label, voxels in reversed(clicks.items())}
        np.testing.assert_array_equal(Editor(scan, network, prep).apply(backwards), both)
        assert all(both[voxel] == label for label, voxels in clicks.items() for voxel in voxels)
        changed = both != scan.labels
        assert changed.sum() > 20
        results.append(both)
    assert (results[0] != results[1]).sum() < 0.1 * (results[0] != everything.labels).sum()
