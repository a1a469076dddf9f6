"""The forward by persistent blocks in the emulator: every preset's channels, both layouts, non-finite values.

Sums and samples against the float64 reference; where the input is not finite, against the reference on the same volume
with a margin of zeros, which never multiplies a voxel that a sample does not touch.
"""

from dataclasses import replace

import pytest
import torch
from cuda_emulator import FORWARD, REVERSE, SHUFFLED, EmulatedRuntime
from torch.nn import functional as F

from deform3d import _launch, deform_conv3d
from deform3d._checks import check
from deform3d._launch import plan
from tolerances import assert_near

CUBE = {"kernel": (3, 3, 3), "stride": (1, 1, 1), "padding": (1, 1, 1), "dilation": (1, 1, 1)}
LAST = torch.channels_last_3d
NOT_FINITE = (torch.nan, torch.inf, -torch.inf)


@pytest.fixture
def runtime(kernel_compiler):
    """Fill new tensors with NaN until they are written."""
    torch.use_deterministic_algorithms(True)
    yield EmulatedRuntime(kernel_compiler, _launch.source, _launch.Tuning())
    torch.use_deterministic_algorithms(False)


def forward(runtime, p):
    g = check(
        *(p.input, p.offset, p.weight, p.bias, p.mask), *(p.options[n] for n in ("stride", "padding", "dilation"))
    )
    output = _launch.forward(runtime, p.input, p.offset, p.weight, p.bias, p.mask, g)
    assert runtime.launches[-1].kernel.name == "deform_forward_walk"
    return output


def expected_of(p):
    """Return the float64 reference with a margin of two zeros: it reads the first cell for positions outside."""
    q = p.oracle()
    fields = (F.pad(q.input, (2,) * 6), F.pad(q.offset, (1,) * 6))
    mask = None if q.mask is None else F.pad(q.mask, (1,) * 6)
    output = deform_conv3d(*fields, q.weight, q.bias, mask=mask, backend="reference")
    return output[:, :, 1:-1, 1:-1, 1:-1]


def assert_same(actual, expected):
    """Check like `assert_near`, and require non-finite values to be equal."""
    expected = expected.to(actual.dtype).double()
    for name in ("isnan", "isposinf", "isneginf"):
        assert torch.equal(getattr(actual, name)(), getattr(expected, name)()), name
    finite = expected.isfinite()
    assert finite.any()
    assert not finite.all()
    assert_near(actual[finite], expected[finite])


@pytest.mark.parametrize("dtype", plan.PRESET_DTYPES)
@pytest.mark.parametrize("channels", plan.PRESET_CHANNELS)
def test_every_channel_count(make_problem, runtime, channels, dtype):
    # No side is a multiple of a tile's, except the last.
    size = (5, 7, 10) if channels < 64 else (3, 4, 5) if channels < 100 else (3, 2, 3)
    p = make_problem(**CUBE, channels=channels, dtype=dtype, batch=2, size=size, spread=2)
    expected = p.oracle().run(backend="reference")
    for runtime.order in (FORWARD, SHUFFLED):
        assert_near(forward(runtime, p), expected)


@pytest.mark.parametrize("dtype", plan.PRESET_DTYPES)
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_layouts(make_problem, runtime, dtype, mask, bias):
    channels = 32 if dtype == torch.float16 else 48
    p = make_problem(**CUBE, channels=channels, dtype=dtype, batch=2, size=(4, 5, 9), mask=mask, bias=bias)
    last = p.map(lambda t: t.contiguous(memory_format=LAST) if t.dim() == 5 and t.shape[1] > 1 else t)
    first = forward(runtime, p)
    assert_near(first, p.oracle().run(backend="reference"))
    for runtime.order in (REVERSE, SHUFFLED):
        assert torch.equal(forward(runtime, last), first)


@pytest.mark.parametrize("dtype", plan.PRESET_DTYPES)
@pytest.mark.parametrize("value", [*NOT_FINITE, 1e30, -3e9])
def test_impossible_positions_sample_nothing(make_problem, runtime, dtype, value):
    p = make_problem(**CUBE, channels=16, dtype=dtype, batch=2, size=(4, 5, 6))
    hit = torch.rand(p.offset.shape, generator=torch.Generator().manual_seed(2)) < 0.2
    masked = p.oracle()
    masked.offset[hit] = 0
    masked.mask[hit.view(2, 27, 3, 4, 5, 6).any(2)] = 0
    p.offset[hit] = torch.tensor(value).to(dtype)
    p.input[:, :, 0, 0, 0] = torch.nan  # the first voxel is not sampled either
    masked.input[:, :, 0, 0, 0] = torch.nan
    missed = (masked.mask == 0).repeat_interleave(3, 1)
    expected = expected_of(replace(masked, offset=masked.offset.masked_fill(missed, 100.0)))
    assert_same(forward(runtime, p), expected)


@pytest.mark.parametrize("dtype", plan.PRESET_DTYPES)
@pytest.mark.parametrize("spread", [0, 0.4, 3])
def test_non_finite_input(make_problem, runtime, dtype, spread):
    """It affects, in its own channel, the samples whose cells have it as a corner, and no others."""
    p = make_problem(**CUBE, channels=48, dtype=dtype, batch=2, size=(7, 8, 9), spread=spread, mask=False)
    for i, value in enumerate(NOT_FINITE):
        for n, c, at in ((0, 5 + i, (0, 0, 0)), (1, 20 + i, (6, 7, 8)), (1, 30 + i, (3, i, 4)), (0, 47, (i, 7, 0))):
            p.input[(n, c, *at)] = value
    assert_same(forward(runtime, p), expected_of(p))


@pytest.mark.parametrize("name", ["weight", "bias", "mask"])
def test_non_finite_factors(make_problem, runtime, name):
    p = make_problem(**CUBE, channels=16, dtype=torch.float32, batch=1, size=(4, 5, 6), spread=0.5)
    flat = getattr(p, name).view(-1)
    flat[torch.arange(3) * (flat.numel() // 4)] = flat.new_tensor(NOT_FINITE)
    assert_same(forward(runtime, p), p.oracle().run(backend="reference"))


def test_float16_beyond_its_range(make_problem, runtime):
    """A sum of corners exceeds float16, but the output does not."""
    p = make_problem(**CUBE, channels=48, dtype=torch.float16, batch=1, size=(4, 5, 6), spread=0.5)
    p = replace(p, input=p.input * 1e4, weight=p.weight * 1e-3, mask=p.mask.abs() * 9 + 1)
    expected = p.oracle().run(backend="reference")
    assert expected.abs().max() < 6e4
    assert_near(forward(runtime, p), expected)


@pytest.mark.parametrize("dtype", plan.PRESET_DTYPES)
@pytest.mark.parametrize("size", [(1, 1, 1), (1, 9, 2), (5, 1, 1)])
def test_volumes_smaller_than_a_tile(make_problem, runtime, dtype, size):
    p = make_problem(**CUBE, channels=24, dtype=dtype, batch=1, size=size, spread=1)
    assert_near(forward(runtime, p), p.oracle().run(backend="reference"))


def test_other_convolutions_use_another_kernel(make_problem, runtime):
    walked = {**CUBE, "channels": 48, "dtype": torch.float32, "size": (4, 4, 4), "batch": 1}
    for change in (
        {"channels": 40},
        {"dtype": torch.float64},
        {"padding": (1, 1, 0)},
        {"stride": (2, 1, 1)},
        {"out_channels": 96},
    ):
        options = {**walked, **change}
        p = make_problem(**options)
        geometry = (p.options[n] for n in ("stride", "padding", "dilation"))
        tensors = (p.input, p.offset, p.weight, p.bias, p.mask)
        runtime.launches.clear()
        _launch.forward(runtime, *tensors, check(*tensors, *geometry))
        assert "deform_forward_walk" not in {launch.kernel.name for launch in runtime.launches}, change
    forward(runtime, make_problem(**walked))
