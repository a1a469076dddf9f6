"""The launches of the CUDA backend: instances, grids, copies and limits, recorded by a runtime that starts nothing.

`test_cuda_kernels` runs the launches, which shows that arguments arrive in the right order.
"""

from dataclasses import dataclass, field

import pytest
import torch
from cuda_emulator import MAX_SHARED_BYTES, Launch

from deform3d import _launch
from deform3d._checks import check
from deform3d._launch import backward_cells, backward_taps, walk
from deform3d._launch.plan import PRESET_CHANNELS, PRESET_DTYPES

ALL = (True,) * 5
LAST = torch.channels_last_3d


@dataclass
class Recorder:
    """A runtime of a large GPU that starts nothing."""

    tuning: _launch.Tuning = field(default_factory=_launch.Tuning)
    launches: list[Launch] = field(default_factory=list)

    def launch(self, device, kernel, grid, block, shared_bytes, args):
        self.launches.append(Launch(kernel, grid, block, shared_bytes, tuple(args)))

    def multiprocessors(self, device):
        return 132


CUBE = {"kernel": (3, 3, 3), "stride": (1, 1, 1), "padding": (1, 1, 1), "dilation": (1, 1, 1)}


def geometry_of(p):
    options = (p.options[name] for name in ("stride", "padding", "dilation"))
    return check(p.input, p.offset, p.weight, p.bias, p.mask, *options)


def launches(p, needs=ALL, **tuning):
    """Return the launches of forward and backward."""
    runtime, g = Recorder(_launch.Tuning(**tuning)), geometry_of(p)
    output = _launch.forward(runtime, p.input, p.offset, p.weight, p.bias, p.mask, g)
    _launch.backward(runtime, torch.zeros_like(output), p.input, p.offset, p.weight, p.mask, g, needs)
    return runtime.launches


def named(recorded, name):
    return [launch for launch in recorded if launch.kernel.name == name]


LAYERS = [
    {"channels": 48, **CUBE},
    {"channels": 6},
    {"channels": 8, "out_channels": 6, "groups": 2},
    {"channels": 6, "out_channels": 5, "groups": 1, "offset_groups": 3},
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("deterministic", [False, True])
def test_kernels_do_not_depend_on_shapes(make_problem, dtype, layer, deterministic):
    """Other sizes, batches, bias or mask compile nothing new, and `all_kernels` lists every kernel."""
    torch.use_deterministic_algorithms(deterministic)
    try:
        one = {x.kernel for x in launches(make_problem(**layer, dtype=dtype))}
        other = {x.kernel for x in launches(make_problem(**layer, dtype=dtype, size=(9, 6, 13), batch=2, mask=False))}
    finally:
        torch.use_deterministic_algorithms(False)
    assert one == other
    assert one <= set(_launch.all_kernels())
    assert len({hash(kernel) for kernel in one}) == len(one)


def test_instances_are_distinct():
    kernels = list(_launch.all_kernels())
    assert len(set(kernels)) == len(kernels)
    fast = {"forward_walk", "backward_taps", "backward_sums", "backward_sort", "backward_cells"}
    assert {kernel.unit for kernel in kernels} == {"forward", "backward_samples", "backward_input", "columns", *fast}
    for kernel in kernels:
        assert f" {kernel.name}(" in _launch.source(kernel.unit)
        assert kernel.options == tuple(f"-D{name}={value}" for name, value in kernel.defines)


@pytest.mark.parametrize(
    ("dtype", "channels", "vector"),
    [
        (torch.float16, 40, 8),
        (torch.bfloat16, 36, 4),
        (torch.bfloat16, 6, 1),
        (torch.float32, 40, 4),
        (torch.float32, 6, 2),
        (torch.float32, 35, 1),
        (torch.float64, 48, 2),
        (torch.float64, 1, 1),
    ],
)
def test_loads_are_as_wide_as_channels_allow(make_problem, dtype, channels, vector):
    (launch,) = named(launches(make_problem(channels=channels, dtype=dtype, **CUBE)), "deform_forward")
    assert dict(launch.kernel.defines)["VECTOR"] == vector
    assert dict(launch.kernel.defines)["CUBE"] == 1


@pytest.mark.parametrize(("shift", "vector"), [(0, 8), (8, 8), (4, 4), (2, 1), (1, 1)])
def test_loads_are_as_wide_as_memory_is_aligned(make_problem, shift, vector):
    """A view into a larger tensor may start anywhere: a misaligned load would be an error on a GPU."""
    p = make_problem(channels=16, dtype=torch.float16, **CUBE)
    memory = p.input.new_zeros(p.input.numel() + shift)[shift:]
    n, c, d, h, w = p.input.shape
    view = memory.view(n, d, h, w, c).permute(0, 4, 1, 2, 3)
    assert view.is_contiguous(memory_format=LAST)
    runtime, g = Recorder(), geometry_of(p)
    _launch.forward(runtime, view, p.offset, p.weight, p.bias, p.mask, g)
    assert dict(runtime.launches[0].kernel.defines)["VECTOR"] == vector
    assert runtime.launches[0].args[0] == view.data_ptr()
    assert runtime.launches[0].kernel.name == ("deform_forward_walk" if vector == 8 else "deform_forward")


@pytest.mark.parametrize(
    "change", [("kernel", (3, 3, 1)), ("stride", (1, 2, 1)), ("padding", (1, 1, 0)), ("dilation", (2, 1, 1))]
)
def test_general_instance_for_other_convolutions(make_problem, change):
    p = make_problem(channels=4, **{**CUBE, change[0]: change[1]})
    assert all(dict(launch.kernel.defines)["CUBE"] == 0 for launch in launches(p))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("channels", "name"), [(8, "deform_forward"), (16, "deform_forward_walk")])
def test_offsets_are_read_without_a_copy(make_problem, last, channels, name):
    """Neither contiguous nor channels-last offsets and masks are copied; null stands for a missing tensor."""
    layer = {**CUBE, "channels": channels, "dtype": torch.float32}
    p = make_problem(**layer)
    if last:
        p = p.map(lambda t: t.contiguous(memory_format=LAST) if t.dim() == 5 and t.shape[1] > 1 else t)
    (launch,) = named(launches(p), name)
    assert p.offset.data_ptr() in launch.args
    assert p.mask.data_ptr() in launch.args
    (launch,) = named(launches(make_problem(mask=False, bias=False, **layer)), name)
    assert launch.args[:6].count(0) == 2


SORTED = {"deform_cell_starts", "deform_cell_place", "deform_cell_gather", "deform_add_edges"}


@pytest.mark.parametrize(
    ("needs", "names"),
    [
        ((False, False, False, True, False), set()),
        ((True, False, False, False, False), {"deform_cell_keys", *SORTED}),
        ((False, True, False, False, False), {"deform_backward_taps"}),
        ((False, False, True, True, True), {"deform_backward_taps", "deform_sum_rows"}),
        ((True, True, True, True, True), {"deform_backward_taps", "deform_sum_rows", *SORTED}),
    ],
)
def test_only_needed_gradients_are_launched(make_problem, needs, names):
    recorded = launches(make_problem(channels=48, dtype=torch.float32, **CUBE), needs)
    assert {launch.kernel.name for launch in recorded} == {"deform_forward_walk", *names}


@pytest.mark.parametrize(
    ("change", "names"),
    [
        # Few lanes do not divide this number of channels evenly: only the sums over them need another kernel.
        ({**CUBE, "channels": 35}, {"deform_backward_samples", "deform_cell_keys", *SORTED}),
        ({"channels": 48}, {"deform_backward_samples", "deform_count", "deform_place", "deform_gather"}),
    ],
)
def test_general_kernels_of_the_backward(make_problem, change, names):
    recorded = launches(make_problem(dtype=torch.float32, **change))
    assert {launch.kernel.name for launch in recorded} == {"deform_forward", *names}


@pytest.mark.parametrize("channels", [16, 24, 32, 48, 64, 96, 128, 192, 384])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_presets_use_the_fast_kernels(make_problem, channels, dtype):
    recorded = launches(make_problem(channels=channels, dtype=dtype, **CUBE))
    (launch,) = named(recorded, "deform_forward_walk")
    assert dict(launch.kernel.defines)["CHANNELS"] == channels
    (launch,) = named(recorded, "deform_backward_taps")
    defines = dict(launch.kernel.defines)
    assert defines["LANES"] * defines["ROUNDS"] * defines["VECTOR"] == channels
    assert defines["LANES"] in (1, 2, 4, 8, 16, 32)


def test_launches_are_planned_once(make_problem):
    """Later calls of the same kind only fill in addresses."""
    p = make_problem(channels=48, dtype=torch.float32, **CUBE)
    launches(p)
    plans = backward_taps.plan_taps, backward_cells.plan_cells
    before = [plan.cache_info() for plan in plans]
    launches(p)
    for plan, info in zip(plans, before, strict=True):
        assert plan.cache_info().misses == info.misses
        assert plan.cache_info().hits == info.hits + 1


def test_nothing_is_launched_for_an_empty_batch(make_problem):
    for layer in LAYERS:
        assert not launches(make_problem(**layer, batch=0))


@pytest.mark.parametrize("channels", [1, 16, 48, 384, 1500])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_sizes_of_launches(make_problem, channels, dtype):
    """Blocks fit every GPU; the tiles of the forward cover the output and little more."""
    p = make_problem(channels=channels, size=(12, 12, 12), batch=1, dtype=dtype, **CUBE)
    recorded = launches(p, fast_forward=False)
    for launch in recorded:
        threads = launch.block[0] * launch.block[1]
        assert 0 < threads <= 640
        assert 0 < launch.grid < 2**31
        assert launch.shared_bytes <= MAX_SHARED_BYTES
    (forward,) = named(recorded, "deform_forward")
    assert 12**3 <= forward.grid * forward.block[1] < 3 * 12**3
    assert forward.grid >= 2 * 132  # enough for every multiprocessor


@pytest.mark.parametrize("channels", PRESET_CHANNELS)
@pytest.mark.parametrize("dtype", PRESET_DTYPES)
@pytest.mark.parametrize("length", [1, 12, 29])
def test_sizes_of_walks(make_problem, channels, dtype, length):
    """There is one block per multiprocessor, given enough tiles; the tiles cover the output."""
    p = make_problem(channels=channels, size=(length, 9, 7), batch=2, dtype=dtype, **CUBE)
    (launch,) = named(launches(p), "deform_forward_walk")
    tiles, lanes = launch.args[-1], channels // dict(launch.kernel.defines)["VECTOR"]
    group = 128 if lanes % 3 else 192  # threads that work on one tile
    assert launch.grid == min(tiles, 132)
    assert launch.block == (768, 1)
    assert launch.shared_bytes <= MAX_SHARED_BYTES
    assert tiles * (group // lanes) >= 2 * length * 9 * 7


def test_samples_over_4_gib_do_not_walk():
    """Check 16 channels in float32, on tensors that take no memory."""
    one = torch.zeros(1, 1, 1, 1, 1)
    for depth, walks in ((1023, True), (1024, False)):
        size = (depth, 256, 256)
        input, offset, weight = one.expand(1, 16, *size), one.expand(1, 81, *size), one.expand(16, 1, 3, 3, 3)
        g = check(input, offset, weight, None, None, (1, 1, 1), (1, 1, 1), (1, 1, 1))
        assert (walk.walk_of(g, torch.float32, 4, _launch.Tuning()) is not None) == walks


def test_too_many_voxels_for_32_bits():
    """They raise an error instead of wrapping; the tensors take no memory."""
    one = torch.zeros(1, 1, 1, 1, 1)
    size = (2048, 1024, 1025)
    input, offset = one.expand(1, 1, *size), one.expand(1, 3, *size)
    g = check(input, offset, one, None, None, (1, 1, 1), (0, 0, 0), (1, 1, 1))
    with pytest.raises(ValueError, match=r"input: got 2149580800 voxels in a sample, expected at most 2147483647"):
        _launch.forward(Recorder(), input, offset, one, None, None, g)


def test_chunks_are_bounded(make_problem):
    """Columns of dense convolutions stay within their memory limit."""
    p = make_problem(channels=8, groups=1, size=(8, 9, 10))
    runtime = Recorder(_launch.Tuning(chunk_bytes=50_000))
    _launch.forward(runtime, p.input, p.offset, p.weight, p.bias, p.mask, geometry_of(p))
    assert len(runtime.launches) > 1
    assert len({launch.kernel for launch in runtime.launches}) == 1
