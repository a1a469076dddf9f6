"""The output against convolutions, shifts, torchvision and the oracle."""

import pytest
import torch
from torch.nn import functional as F

from deform3d import DeformConv3d, deform_conv3d
from tolerances import assert_near

LAYERS = {
    "depthwise": {"channels": 6},
    "depthwise vectors": {"channels": 19},
    "depthwise multiplier": {"channels": 4, "out_channels": 8},
    "depthwise, offset groups": {"channels": 6, "offset_groups": 3},
    "grouped": {"channels": 6, "out_channels": 4, "groups": 2},
    "dense": {"channels": 5, "out_channels": 7, "groups": 1},
    "dense, offset groups": {"channels": 6, "out_channels": 5, "groups": 1, "offset_groups": 2},
}
GEOMETRIES = {
    "plain": {"stride": (1, 1, 1), "padding": (0, 0, 0), "dilation": (1, 1, 1)},
    "strides": {"stride": (2, 1, 3), "padding": (0, 0, 0), "dilation": (1, 1, 1)},
    "paddings": {"stride": (1, 1, 1), "padding": (1, 3, 2), "dilation": (1, 1, 1)},
    "dilations": {"stride": (1, 1, 1), "padding": (0, 0, 0), "dilation": (2, 1, 3)},
    "all": {"stride": (1, 2, 3), "padding": (2, 1, 0), "dilation": (2, 3, 1)},
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_zero_offset_is_a_convolution(make_problem, backend, layer, geometry):
    p = make_problem(**LAYERS[layer], **GEOMETRIES[geometry], kernel=(2, 3, 2), spread=0, mask=False)
    groups = p.input.shape[1] // p.weight.shape[1]
    expected = F.conv3d(p.input, p.weight, p.bias, **p.options, groups=groups)
    assert_near(p.run(backend=backend), expected)


@pytest.mark.parametrize("shift", [(1, 0, 0), (0, -2, 0), (0, 0, 3), (-1, 2, -3), (9, 0, 0)])
def test_integer_offsets_are_a_shift(make_problem, backend, shift):
    p = make_problem(kernel=(1, 1, 1), stride=(1, 1, 1), padding=(0, 0, 0), dilation=(1, 1, 1), mask=False, bias=False)
    offset = p.offset.new_tensor(shift).view(1, 3, 1, 1, 1).expand(p.offset.shape)
    expected = torch.zeros_like(p.input)
    place = [slice(max(-s, 0), max(n - max(s, 0), 0)) for s, n in zip(shift, p.input.shape[2:], strict=True)]
    source = [slice(max(s, 0), max(n - max(-s, 0), 0)) for s, n in zip(shift, p.input.shape[2:], strict=True)]
    expected[(..., *place)] = p.input[(..., *source)]
    ones = torch.ones_like(p.weight)
    assert torch.equal(deform_conv3d(p.input, offset, ones, backend=backend), expected)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("layer", LAYERS)
def test_single_slice_matches_torchvision(make_problem, backend, axis, layer):
    """A volume one voxel thick along an axis is sampled within it; offsets reach well past the borders."""
    torchvision = pytest.importorskip("torchvision")
    planar = {"size": (7, 5), "kernel": (3, 2), "stride": (1, 2), "padding": (2, 1), "dilation": (1, 2)}
    thick = {"size": 1, "kernel": 1, "stride": 1, "padding": 0, "dilation": 1}
    p = make_problem(
        **LAYERS[layer],
        **{name: (*planar[name][:axis], thick[name], *planar[name][axis:]) for name in planar},
        spread=3,
    )
    others = [i for i in range(3) if i != axis]
    shape = p.offset.shape
    split = p.offset.view(shape[0], -1, 3, *shape[2:])
    split[:, :, axis] = 0

    expected = torchvision.ops.deform_conv2d(
        p.input.squeeze(axis + 2),
        split[:, :, others].reshape(shape[0], -1, *shape[2:]).squeeze(axis + 2),
        p.weight.squeeze(axis + 2),
        p.bias,
        planar["stride"],
        planar["padding"],
        planar["dilation"],
        mask=p.mask.squeeze(axis + 2),
    )
    assert_near(p.run(backend=backend).squeeze(axis + 2), expected)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_agrees_with_the_oracle(make_problem, backend, layer, mask, bias):
    p = make_problem(**LAYERS[layer], mask=mask, bias=bias)
    assert_near(p.run(backend=backend), p.oracle().run(backend="reference"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [1, 15, 16, 35, 64, 115])
def test_dtypes_and_channel_counts(make_problem, backend, dtype, channels):
    p = make_problem(channels=channels, dtype=dtype)
    output = p.run(backend=backend)
    assert output.dtype == dtype
    assert_near(output, p.oracle().run(backend="reference"))


@pytest.mark.parametrize("layer", ["depthwise vectors", "dense, offset groups"])
def test_memory_formats(make_problem, backend, layer):
    p = make_problem(**LAYERS[layer])
    expected = p.run(backend=backend)
    assert expected.is_contiguous()

    last = p.map(lambda t: t.contiguous(memory_format=torch.channels_last_3d) if t.dim() == 5 else t)
    output = last.run(backend=backend)
    assert output.is_contiguous(memory_format=torch.channels_last_3d)
    assert torch.equal(output, expected)

    def scatter(tensor: torch.Tensor) -> torch.Tensor:
        """Return the same values as every second element of a larger tensor with reversed axes."""
        big = tensor.new_full([2 * n + 1 for n in reversed(tensor.shape)], torch.nan)
        view = big[tuple(slice(1, None, 2) for _ in tensor.shape)].permute(*reversed(range(tensor.dim())))
        view.copy_(tensor)
        assert not view.is_contiguous()
        return view

    assert torch.equal(p.map(scatter).run(backend=backend), expected)


def test_channels_last_patch_of_a_volume(make_problem, backend):
    p = make_problem(size=(5, 7, 6), stride=(1, 1, 1))
    volume = (
        torch.randn(3, 6, 9, 12, 11, dtype=torch.float64).to(p.input).contiguous(memory_format=torch.channels_last_3d)
    )
    patch = volume[:, :, 2:7, 3:10, 4:10]
    patch.copy_(p.input)
    view = torch.equal(
        deform_conv3d(patch, p.offset, p.weight, p.bias, mask=p.mask, **p.options, backend=backend),
        p.run(backend=backend),
    )
    assert view


def test_expanded_offsets(make_problem, backend):
    """All voxels share one offset, without memory for each."""
    p = make_problem()
    one = p.offset[:1, :, :1, :1, :1]
    expected = deform_conv3d(
        p.input, one.repeat(p.offset.shape[0], 1, *p.offset.shape[2:]), p.weight, **p.options, backend=backend
    )
    assert torch.equal(
        deform_conv3d(p.input, one.expand(p.offset.shape), p.weight, **p.options, backend=backend), expected
    )


@pytest.mark.parametrize("layer", LAYERS)
def test_empty_batch(make_problem, backend, layer):
    p = make_problem(**LAYERS[layer], batch=0)
    results = p.run_with_gradients(backend=backend)
    assert results["output"].shape == (0, p.weight.shape[0], *p.offset.shape[2:])
    assert results["input"].shape == p.input.shape
    assert results["offset"].shape == p.offset.shape
    assert not results["weight"].any()
    assert not results["bias"].any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30, -1e30, 2.0**31, -(2.0**63)])
@pytest.mark.parametrize("layer", ["depthwise vectors", "dense, offset groups"])
def test_impossible_positions_sample_nothing(make_problem, backend, value, layer):
    """NaN, infinite and distant positions contribute zero to the output and to every gradient."""
    p = make_problem(**LAYERS[layer], dtype=torch.float32)
    hit = torch.rand(p.offset.shape, generator=torch.Generator().manual_seed(2)) < 0.2
    p.offset[hit.to(p.offset.device)] = value
    taps = hit.view(hit.shape[0], -1, 3, *hit.shape[2:]).any(2)
    masked = p.oracle()
    masked.offset[hit] = 0
    masked.mask[taps] = 0

    actual = {name: result.cpu() for name, result in p.run_with_gradients(backend=backend).items()}
    expected = masked.run_with_gradients(backend="reference")
    for name in ("output", "input", "weight", "bias"):
        assert_near(actual[name], expected[name], name)
    missed = taps.repeat_interleave(3, 1)
    assert not actual["offset"][missed].any()
    assert not actual["mask"][taps].any()
    assert_near(actual["offset"][~missed], expected["offset"][~missed], "offset")


def test_nothing_is_read_between_or_beyond_the_voxels(make_problem, backend):
    """Memory around and between the input's elements is NaN: no sample may read it."""
    p = make_problem(channels=19, spread=4, size=(4, 5, 6), stride=(1, 1, 1))
    surrounded = p.input.new_full((5, 6, 8, 9, 23), torch.nan)
    view = surrounded[1:4, 1:5, 1:6, 1:7, 1:20].permute(0, 4, 1, 2, 3)
    view.copy_(p.input)
    output = deform_conv3d(view, p.offset, p.weight, p.bias, mask=p.mask, **p.options, backend=backend)
    assert torch.equal(output, p.run(backend=backend))


def test_more_than_two_to_the_31_elements(backend, device):
    """Two slices are 2**31 elements apart: an index of 32 bits would wrap."""
    apart = 2**31 + 64
    try:
        memory = torch.empty(apart + 9 * 16, device=device)  # not touched, and so not in RAM, except at its two ends
    except RuntimeError as error:
        pytest.skip(f"cannot reserve the address space: {error}")
    near = torch.randn(1, 16, 2, 3, 3, device=device)
    far = memory.as_strided(near.shape, (0, 1, apart, 48, 16))
    far.copy_(near)
    offset = torch.randn(1, 81, 2, 3, 3, device=device)
    weight = torch.randn(16, 1, 3, 3, 3, device=device)
    expected = deform_conv3d(near, offset, weight, padding=1, backend=backend)
    assert torch.equal(deform_conv3d(far, offset, weight, padding=1, backend=backend), expected)


def test_layer_equals_the_function(backend, device):
    layer = DeformConv3d(4, 6, (3, 1, 2), (1, 2, 1), (1, 0, 1), 1, groups=2, backend=backend).to(device)
    assert layer.weight.shape == (6, 2, 3, 1, 2)
    input = torch.randn(2, 4, 5, 6, 7, device=device)
    offset = torch.randn(2, 18, 5, 3, 8, device=device)
    mask = torch.rand(2, 6, 5, 3, 8, device=device)
    expected = deform_conv3d(input, offset, layer.weight, layer.bias, (1, 2, 1), (1, 0, 1), mask=mask, backend=backend)
    assert torch.equal(layer(input, offset, mask), expected)
    assert "kernel_size=(3, 1, 2)" in repr(layer)
    assert DeformConv3d(4, 4, 3, bias=False).bias is None


def test_layer_is_initialised_like_conv3d():
    torch.manual_seed(3)
    ours = DeformConv3d(8, 8, 3, groups=4)
    torch.manual_seed(3)
    theirs = torch.nn.Conv3d(8, 8, 3, groups=4)
    assert torch.equal(ours.weight, theirs.weight)
    assert torch.equal(ours.bias, theirs.bias)
