"""The fast backward kernels, run over every block and thread on the CPU, against the float64 reference."""

from dataclasses import replace

import pytest
import torch
from cuda_emulator import FORWARD, REVERSE, SHUFFLED, EmulatedRuntime
from deform_problems import direction_like

from deform3d import _launch, reference
from deform3d._checks import check
from tolerances import assert_near

LAST = torch.channels_last_3d
CUBE = {"kernel": (3, 3, 3), "stride": (1, 1, 1), "padding": (1, 1, 1), "dilation": (1, 1, 1), "batch": 2}
FAST = {"deform_backward_taps", "deform_sum_rows", "deform_cell_starts", "deform_cell_place"}
FAST |= {"deform_cell_gather", "deform_add_edges"}


@pytest.fixture
def runtime(kernel_compiler):
    return EmulatedRuntime(kernel_compiler, _launch.source, _launch.Tuning())


def channels_last(problem):
    return problem.map(lambda t: t.contiguous(memory_format=LAST) if t.dim() == 5 and t.shape[1] > 1 else t)


def gradients(runtime, p):
    """Return the gradients of a fixed direction and those of the float64 reference, by name."""
    options = (p.options[name] for name in ("stride", "padding", "dilation"))
    g = check(p.input, p.offset, p.weight, p.bias, p.mask, *options)
    needs = (True, True, True, True, p.mask is not None)
    grad = direction_like(p.input)
    runtime.launches.clear()
    actual = _launch.backward(runtime, grad, p.input, p.offset, p.weight, p.mask, g, needs)
    q = p.oracle()
    expected = reference.backward(grad.double(), q.input, q.offset, q.weight, q.mask, g, needs)
    return actual._asdict(), expected._asdict()


def assert_all_near(actual, expected):
    for name, value in expected.items():
        if value is not None:
            assert_near(actual[name], value, name)


@pytest.mark.parametrize(
    ("dtype", "channels"),
    [(torch.float32, n) for n in (16, 24, 32, 48, 64, 96, 128, 192, 384)]
    + [(torch.bfloat16, n) for n in (16, 24, 48, 64, 384)]
    + [(torch.float16, n) for n in (32, 96, 128, 192)],
)
def test_preset_channels(make_problem, runtime, dtype, channels):
    runtime.order = SHUFFLED
    p = channels_last(make_problem(**CUBE, channels=channels, dtype=dtype, size=(5, 4, 7)))
    actual, expected = gradients(runtime, p)
    assert {launch.kernel.name for launch in runtime.launches} == FAST
    assert_all_near(actual, expected)


# An odd and an even number of pieces per voxel, and the widest; most samples have all corners inside.
@pytest.mark.parametrize("channels", [48, 64, 96])
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_samples_inside(make_problem, runtime, channels, mask, last):
    p = make_problem(**CUBE, channels=channels, dtype=torch.float32, size=(9, 10, 11), spread=0.4, mask=mask)
    assert_all_near(*gradients(runtime, channels_last(p) if last else p))


@pytest.mark.parametrize(
    "tuning",
    [
        {"taps_warps": 8, "taps_voxels": 256},
        {"taps_voxels": 8, "count_in_taps": False},
        {"taps_voxels": 1},
        {"cells_threads": 40, "cells_band": 3, "cells_segment": 3},
        {"cells_threads": 20, "cells_unroll": 4, "cells_band": 64, "cells_segment": 11},
        {"chunk_bytes": 300_000},
        {"fast_cells": False},
        {"fast_samples": False},
        {"cells_bytes": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("deterministic", [False, True])
def test_any_division_of_the_work(make_problem, runtime, tuning, deterministic):
    runtime.tuning = replace(_launch.Tuning(), **tuning)
    p = make_problem(**CUBE, channels=48, dtype=torch.float32, size=(5, 9, 11))
    torch.use_deterministic_algorithms(deterministic)
    try:
        for runtime.order, runtime.most_blocks in ((FORWARD, 2**31 - 1), (REVERSE, 2)):
            assert_all_near(*gradients(runtime, p))
    finally:
        torch.use_deterministic_algorithms(False)


def test_same_bits_on_any_grid(make_problem, runtime):
    """With deterministic algorithms, neither the order nor the number of blocks matters."""
    p = make_problem(**CUBE, channels=48, dtype=torch.float32, size=(5, 9, 7), spread=3)
    first = None
    torch.use_deterministic_algorithms(True)
    try:
        for runtime.order, runtime.most_blocks in ((FORWARD, 2**31 - 1), (REVERSE, 1), (SHUFFLED, 2)):
            actual, _ = gradients(runtime, p)
            first = first or actual
            for name, value in actual.items():
                assert torch.equal(value, first[name]), name
    finally:
        torch.use_deterministic_algorithms(False)


def test_many_samples_in_one_cell(make_problem, runtime):
    """All positions are within one voxel: neither the sort nor the gather depends on the size of a count."""
    p = channels_last(make_problem(**CUBE, channels=16, dtype=torch.float32, size=(4, 5, 6)))
    axes = torch.meshgrid(*(torch.arange(n) for n in (4, 5, 6)), indexing="ij")
    shifts = p.offset.permute(0, 2, 3, 4, 1).reshape(2, 4, 5, 6, 3, 3, 3, 3)
    for axis, place in enumerate((1.2, 2.4, 3.3)):
        tap = torch.arange(3).view([3 if i == axis else 1 for i in range(3)])
        shifts[..., axis] = place - axes[axis].view(1, 4, 5, 6, 1, 1, 1) - tap + 1
    offset = shifts.reshape(2, 4, 5, 6, 81).permute(0, 4, 1, 2, 3)
    assert_all_near(*gradients(runtime, replace(p, offset=offset.contiguous(memory_format=LAST))))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf, 1e30, -3e9, 2147483648.0])
def test_impossible_positions_contribute_nothing(make_problem, runtime, poison):
    p = channels_last(make_problem(**CUBE, channels=48, dtype=torch.float32, size=(4, 5, 6)))
    p.offset[:, ::7, ::2, 1:4] = poison
    actual, expected = gradients(runtime, p)
    assert_all_near(actual, expected)
    for name in ("input", "offset", "weight", "mask"):
        assert actual[name].isfinite().all(), name


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_unsampled_voxels_contribute_nothing(make_problem, runtime, poison):
    """Voxels without weight are NaN: no gradient may include them."""
    p = channels_last(make_problem(**CUBE, channels=48, dtype=torch.float32, size=(4, 6, 6)))
    p.offset[:, :, :, :3] = -20  # these rows sample nothing; the others sample no voxel before the third row
    p.offset.view(2, 27, 3, 4, 6, 6)[:, :, 1, :, 3:].abs_()
    p.input[:, :, :, :2] = 0
    _, expected = gradients(runtime, p)
    p.input[:, :, :, :2] = poison
    actual, _ = gradients(runtime, p)
    assert_all_near(actual, expected)


def test_each_gradient_at_a_time(make_problem, runtime):
    p = channels_last(make_problem(**CUBE, channels=48, dtype=torch.float32, size=(4, 5, 6)))
    _, expected = gradients(runtime, p)
    options = (p.options[name] for name in ("stride", "padding", "dilation"))
    g = check(p.input, p.offset, p.weight, p.bias, p.mask, *options)
    for number, (name, value) in enumerate(expected.items()):
        needs = [i == number for i in range(5)]
        actual = _launch.backward(
            runtime, direction_like(p.input), p.input, p.offset, p.weight, p.mask, g, needs
        )._asdict()
        assert_near(actual[name], value, name)
        assert all(other is None for key, other in actual.items() if key != name)
