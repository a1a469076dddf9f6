"""The CUDA kernels, run over every block and thread on the CPU through their launcher, in the tests of every backend.

The tests imported from `test_forward` and `test_backward` run here on this backend. The tests below cover what only
kernels have: instances, tiles, chunks, loops over a grid that is too small, and threads in any order.
"""

import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Any

import cuda_emulator
import pytest
import torch
from cuda_emulator import FORWARD, REVERSE, SHUFFLED, EmulatedRuntime
from test_backward import test_backward_matches_autograd_of_the_oracle as test_gradients_match_autograd  # noqa: F401
from test_backward import (  # noqa: F401
    test_borders_match_torchvision,
    test_every_finite_difference,
    test_finite_differences,
    test_layout_of_gradients,
    test_one_gradient_at_a_time,
    test_output_gradient_with_any_strides,
    test_same_bits_every_time_and_for_any_thread_count,
    test_tensor_subclass,
)
from test_backward import test_dtypes_and_channel_counts as test_gradients_of_dtypes_and_channel_counts  # noqa: F401
from test_forward import (  # noqa: F401
    test_agrees_with_the_oracle,
    test_channels_last_patch_of_a_volume,
    test_dtypes_and_channel_counts,
    test_empty_batch,
    test_expanded_offsets,
    test_impossible_positions_sample_nothing,
    test_integer_offsets_are_a_shift,
    test_memory_formats,
    test_more_than_two_to_the_31_elements,
    test_nothing_is_read_between_or_beyond_the_voxels,
    test_single_slice_matches_torchvision,
    test_zero_offset_is_a_convolution,
)
from torch.nn import functional as F

from deform3d import _autograd, _launch
from deform3d._checks import check
from tolerances import assert_near

BACKENDS = ["cuda"]


@dataclass(frozen=True)
class Emulated:
    """A stand-in for the module of a backend."""

    runtime: EmulatedRuntime

    def forward(self, *arguments: Any) -> Any:
        return _launch.forward(self.runtime, *arguments)

    def backward(self, *arguments: Any) -> Any:
        return _launch.backward(self.runtime, *arguments)


@pytest.fixture(autouse=True)
def runtime(monkeypatch, kernel_compiler):
    """Send CPU tensors for the backend "cuda" to its launcher, and run the launches in the emulator."""
    runtime = EmulatedRuntime(kernel_compiler, _launch.source, _launch.Tuning())
    module = _autograd._module

    def choose(input, backend):
        return Emulated(runtime) if backend == "cuda" else module(input, backend)

    monkeypatch.setattr(_autograd, "_module", choose)
    return runtime


CUBE = {"kernel": (3, 3, 3), "stride": (1, 1, 1), "padding": (1, 1, 1), "dilation": (1, 1, 1), "spread": 3}
MANY_TAPS = {"kernel": (4, 5, 4), "stride": (2, 1, 1), "padding": (1, 2, 2), "dilation": (1, 1, 2)}
# Sizes larger than a tile; every width of vector loads; `tuning` divides small problems into chunks and rounds.
CASES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "3x3x3, 48 channels, float16": (
        {**CUBE, "channels": 48, "dtype": torch.float16},
        {"fast_forward": False},
    ),
    "3x3x3, 36 channels, bfloat16": ({**CUBE, "channels": 36, "dtype": torch.bfloat16, "mask": False}, {}),
    "3x3x3, 20 channels, float32": ({**CUBE, "channels": 20, "dtype": torch.float32, "bias": False}, {}),
    "3x3x3, 6 channels, float64": ({**CUBE, "channels": 6, "size": (9, 4, 17)}, {}),
    "3x3x3, odd channels, few threads": (
        {**CUBE, "channels": 35, "dtype": torch.float32},
        {"forward_threads": 16, "gather_threads": 16, "samples_warps": 2, "samples_voxels": 8},
    ),
    "3x3x3, blocks that stay, float32": ({**CUBE, "channels": 48, "dtype": torch.float32}, {}),
    "3x3x3, blocks that stay, bfloat16": (
        {**CUBE, "channels": 24, "dtype": torch.bfloat16, "mask": False},
        {},
    ),
    "3x3x3, parts of a sample": ({**CUBE, "channels": 16, "dtype": torch.float32}, {"chunk_bytes": 20_000}),
    "3x3x3, whole samples": ({**CUBE, "channels": 8, "dtype": torch.bfloat16}, {"chunk_bytes": 400_000}),
    "many taps": ({**MANY_TAPS, "channels": 6}, {}),
    "many taps, few at once": ({**MANY_TAPS, "channels": 4, "dtype": torch.float32}, {"taps_at_once": 7}),
    "dense, offset groups": ({"channels": 12, "out_channels": 5, "groups": 1, "offset_groups": 3}, {}),
    "dense, parts of a sample": (
        {"channels": 8, "out_channels": 6, "groups": 1, "offset_groups": 2, "dtype": torch.float32},
        {"chunk_bytes": 4000},
    ),
    "grouped, float16": ({"channels": 16, "out_channels": 6, "groups": 2, "dtype": torch.float16}, {}),
    "grouped, whole samples": ({"channels": 6, "out_channels": 4, "groups": 2}, {"chunk_bytes": 60_000}),
    "multiplier, bfloat16": ({"channels": 16, "out_channels": 32, "dtype": torch.bfloat16}, {"chunk_bytes": 9000}),
}


@pytest.fixture(params=CASES)
def case(request, make_problem, runtime):
    """A problem, and its output and gradients by the oracle."""
    problem, tuning = CASES[request.param]
    runtime.tuning = replace(_launch.Tuning(), **tuning)
    p = make_problem(**{"batch": 2, "size": (4, 9, 7), **problem})
    return p, p.oracle().run_with_gradients(backend="reference")


def test_grid_smaller_than_the_work(case, runtime):
    p, expected = case
    for runtime.order, runtime.most_blocks in ((FORWARD, 2**31 - 1), (SHUFFLED, 3)):
        for name, value in p.run_with_gradients(backend="cuda").items():
            assert_near(value, expected[name], name)


def test_same_bits_in_any_order_of_threads(case, runtime):
    p, expected = case
    first = None
    torch.use_deterministic_algorithms(True)  # also fills new tensors with NaN
    try:
        for runtime.order in (FORWARD, REVERSE, SHUFFLED):
            actual = p.run_with_gradients(backend="cuda")
            first = first or actual
            for name, value in actual.items():
                assert_near(value, expected[name], name)
                assert torch.equal(value, first[name]), name
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("channels", "dtype"),
    [
        (48, torch.float16),
        (20, torch.bfloat16),
        (16, torch.float32),
        (115, torch.float32),
        (384, torch.float32),
        (3, torch.float64),
    ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_offsets_computed_in_the_kernel(make_problem, runtime, channels, dtype, bias):
    """The result equals a 1x1x1 convolution followed by a deformable one, in float64."""
    p = make_problem(**CUBE, channels=channels, dtype=dtype, mask=False, bias=bias, size=(4, 5, 6), batch=2)
    generator = torch.Generator().manual_seed(3)
    weight = (torch.randn(81, channels, 1, 1, 1, generator=generator) / channels**0.5).to(dtype)
    offset_bias = torch.randn(81, generator=generator).to(dtype) if bias else None
    q = p.oracle()
    offset = F.conv3d(q.input, weight.double(), offset_bias.double() if bias else None)
    expected = replace(q, offset=offset).run(backend="reference")
    geometry = check(
        p.input, p.offset, p.weight, p.bias, None, *(p.options[n] for n in ("stride", "padding", "dilation"))
    )
    assert _launch.can_fuse_offset(dtype, p.input.shape, p.weight.shape)
    for runtime.order in (FORWARD, REVERSE, SHUFFLED):
        actual = _launch.forward_fused_offset(runtime, p.input, weight, offset_bias, p.weight, p.bias, geometry)
        assert_near(actual, expected)


# Parts of the names of tests; `computed` is that of offsets computed in the kernel.
HEART = "smaller or (computed and True) or (impossible and (nan or 2147483648))"
HEART += " or (finite and 0.4 and (dtype0 or dtype2))"  # float16, in pairs, and float32
# One test of each: every kernel, but not every instance of it.
ONE_EACH = "(smaller and (few or float16 and not bfloat16)) or (computed and True and dtype0)"
ONE_EACH += " or (impossible and nan) or (finite and 0.4 and dtype0)"


@pytest.mark.parametrize("heart", [ONE_EACH, pytest.param(HEART, marks=pytest.mark.slow)], ids=["one each", "all"])
def test_under_sanitizers(heart):
    """No read or write is out of bounds, no vector misaligned, no arithmetic undefined."""
    environment = cuda_emulator.sanitizer_environment()
    if environment is None:
        pytest.skip("g++ has no address sanitizer to preload")
    files = [__file__, __file__.replace("kernels", "walk")]
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-x", "-p", "no:cacheprovider", *files, "-k", heart]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    assert not done.returncode, done.stdout[-4000:] + done.stderr[-8000:]
