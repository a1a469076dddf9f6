"""Labels and maps on a scan's grid against SciPy's interpolation, whatever the axes, and in parts."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy import ndimage

from deformux.data.grid import ScanGrid, highest
from deformux.data.label_values import in_file_order

# Voxels of a file, its axes in those of the network's grid and their directions, and the spacing relative to that.
GRIDS = {
    "finer": ((37, 41, 23), (0, 1, 2), (1, 1, 1), (0.31, 0.27, 0.62)),
    "turned": ((23, 37, 41), (2, 0, 1), (-1, 1, -1), (0.4, 0.33, 0.5)),
    "coarser": ((7, 9, 8), (1, 0, 2), (1, -1, 1), (1.7, 2.3, 1.0)),
    "one slice": ((30, 1, 28), (0, 2, 1), (1, 1, -1), (0.5, 1.0, 0.45)),
    "same": ((12, 11, 13), (0, 1, 2), (1, 1, 1), (1.0, 1.0, 1.0)),
}


def scan_grid(name: str, *, degrees: float = 0.0) -> ScanGrid:
    """The grid of a file that begins 0.37 voxels beside the network's grid, turned about the last axis."""
    size, order, signs, spacing = GRIDS[name]
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    for axis, (along, sign, step) in enumerate(zip(order, signs, spacing, strict=True)):
        affine[along, axis] = sign * step
        affine[along, 3] = 0.0 if name == "same" else (0.37 if sign > 0 else 0.37 + step * (size[axis] - 1))
    angle = np.deg2rad(degrees)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    extent = np.ceil(np.abs(affine[:3, :3]) @ (np.array(size) - 1)).astype(int) + 1
    meta = {"original_affine": turn @ affine, "spatial_shape": size}
    return ScanGrid.of(MetaTensor(torch.zeros(1, *(int(n) for n in extent)), affine=torch.eye(4).double(), meta=meta))


def by_scipy(grid: ScanGrid, values: np.ndarray) -> np.ndarray:
    index = np.indices(grid.size).reshape(3, -1)
    at = grid.to_network[:3, :3] @ index + grid.to_network[:3, 3:]
    return np.stack([
        ndimage.map_coordinates(one.astype(float), at, order=1, mode="nearest").reshape(grid.size) for one in values
    ])  # fmt: skip


@pytest.mark.parametrize("degrees", [0.0, 20.0])
@pytest.mark.parametrize("name", list(GRIDS))
def test_labels_are_those_of_the_highest_interpolated_logit(name: str, degrees: float) -> None:
    grid = scan_grid(name, degrees=degrees)
    rng = np.random.default_rng(0)
    smooth = ndimage.gaussian_filter(rng.normal(size=(4, *grid.network_size)), (0, 1, 1, 1)).astype(np.float32)
    wanted = by_scipy(grid, smooth)
    found = grid.labels(torch.from_numpy(smooth)).numpy()
    lead = np.sort(wanted, axis=0)
    certain = lead[-1] - lead[-2] > 1e-5
    assert certain.mean() > 0.95
    np.testing.assert_array_equal(found[certain], wanted.argmax(0)[certain])
    maps = grid.interpolate(torch.from_numpy(100 * np.abs(smooth[:1])), lambda part: part[0].round()).numpy()
    assert np.abs(maps - by_scipy(grid, 100 * np.abs(smooth[:1]))[0]).max() <= 0.51


@pytest.mark.parametrize("name", list(GRIDS))
def test_a_part_is_as_in_the_whole_to_the_voxel(name: str) -> None:
    grid = scan_grid(name)
    logits = torch.from_numpy(np.random.default_rng(1).normal(size=(5, *grid.network_size)).astype(np.float32))
    whole = grid.labels(logits)
    assert torch.equal(whole, grid.interpolate(logits, highest))
    rng = np.random.default_rng(2)
    for _ in range(20):
        low = [int(rng.integers(n)) for n in grid.size]
        box = tuple(low), tuple(int(rng.integers(a, n)) + 1 for a, n in zip(low, grid.size, strict=True))
        first, last = grid.needed(box)
        part = logits[(slice(None), *map(slice, first, last))]
        inside = whole[tuple(map(slice, *box))]
        assert torch.equal(grid.labels(part, box=box, origin=first), inside)
        everywhere = np.ones(part.shape[1:], dtype=bool)
        assert torch.equal(grid.labels(part, box=box, origin=first, among=everywhere), inside)


def test_without_the_other_voxels_what_they_touch_alone_is_not_interpolated() -> None:
    """The effect of a change is complete around the voxels that changed."""
    grid = scan_grid("finer")
    rng = np.random.default_rng(3)
    before = torch.from_numpy(rng.normal(size=(3, *grid.network_size)).astype(np.float32))
    after = before.clone()
    changed = np.zeros(grid.network_size, dtype=bool)
    changed[3:6, 4, 5:8] = True
    after[:, torch.from_numpy(changed)] = torch.from_numpy(rng.normal(size=(3, int(changed.sum()))).astype(np.float32))
    differs = grid.labels(after) != grid.labels(before)
    assert differs.any()
    fast = [grid.labels(values, among=changed) for values in (before, after)]
    assert torch.equal(fast[1] != fast[0], differs)
    assert torch.equal(fast[1][differs], grid.labels(after)[differs])


def test_logits_that_are_not_a_number_give_some_class() -> None:
    grid = scan_grid("finer")
    for broken in (slice(None), slice(1, 2)):
        logits = torch.from_numpy(np.random.default_rng(5).normal(size=(3, *grid.network_size)).astype(np.float32))
        logits[broken, 2:6, 3:7, 4:9] = torch.nan
        assert int(grid.labels(logits).max()) < 3


def test_labels_are_the_same_without_numba() -> None:
    code = """
import sys
if sys.argv[1] == "broken":
    sys.modules["numba"] = None
import numpy as np, torch
from tests.training.test_scan_grid import scan_grid
grid = scan_grid("turned")
logits = torch.from_numpy(np.random.default_rng(4).normal(size=(4, *grid.network_size)).astype(np.float32))
sys.stdout.buffer.write(grid.labels(logits).numpy().tobytes())
assert bool(sys.modules.get("numba")) == (sys.argv[1] == "works")
"""
    works, broken = (
        subprocess.run([sys.executable, "-c", code, how], capture_output=True, check=True).stdout
        for how in ("works", "broken")
    )
    assert len(set(works)) == 4
    assert works == broken


@pytest.mark.parametrize("shape", [(5, 6, 7), (1, 4, 3), (4, 3), (4, 1, 1)])
def test_values_in_the_order_of_a_file_are_the_same(shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).integers(0, 255, shape).astype(np.uint8)
    for given in (values, np.asfortranarray(values), values[::-1]):
        ordered = in_file_order(given)
        np.testing.assert_array_equal(ordered, given)
        assert ordered.flags.f_contiguous or ordered.ndim != 3
