"""The arithmetic of the kernels on a GPU: instances, tiles, borders, determinism, free memory."""

import pytest
import torch
from gpu_layers import assert_all_near, leaves_on, make_grad, make_layer, oracle, run
from torch.nn import functional as F

from deform3d import _dispatch, deform_conv3d, deform_conv3d_fused_offset
from deform3d._launch import plan
from tolerances import assert_near

LAST = torch.channels_last_3d
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 2, 12, 40, 48, 192])
@pytest.mark.parametrize("layout", [LAST, torch.contiguous_format])
def test_agrees_with_the_oracle(device, dtype, channels, layout):
    """Check every vector width of the 3×3×3 instance, on a volume that no tile divides."""
    layer = make_layer(channels, (7, 9, 13), dtype=dtype, layout=layout)
    grad = make_grad(layer)
    assert_all_near(run(leaves_on(device, layer), grad.to(device)), oracle(layer, grad))


@pytest.mark.parametrize("dtype", plan.PRESET_DTYPES)
@pytest.mark.parametrize("channels", plan.PRESET_CHANNELS)
@pytest.mark.parametrize("layout", [LAST, torch.contiguous_format])
def test_persistent_blocks(device, dtype, channels, layout):
    """Check every forward instance for the presets' channels, with some non-finite positions and voxels."""
    layer = make_layer(channels, (9, 14, 19), spread=2, dtype=dtype, layout=layout)
    layer["offset"][0, 3, :2] = torch.nan
    layer["offset"][1, 40, 3] = torch.tensor(1e30).to(dtype)
    expected = deform_conv3d(*(t.double() for t in layer.values()), padding=1, backend="reference")
    given = [t.to(device) for t in layer.values()]
    output = deform_conv3d(*given, padding=1, backend="cuda")
    assert_near(output, expected)
    given[0][0, 5, 4, 7, 9] = torch.inf
    hit = ~deform_conv3d(*given, padding=1, backend="cuda").isfinite()
    assert hit[0, 5].any()
    assert hit.sum() == hit[0, 5].sum()


@pytest.mark.parametrize("size", [(1, 1, 1), (1, 40, 3), (33, 2, 5), (20, 21, 22)])
@pytest.mark.parametrize("spread", [0.0, 0.1, 8.0])
def test_shapes_and_spreads(device, size, spread):
    layer = make_layer(24, size, spread=spread, dtype=torch.float64)
    grad = make_grad(layer)
    assert_all_near(run(leaves_on(device, layer), grad.to(device)), oracle(layer, grad))


def test_all_samples_in_one_cell(device):
    """Thousands of gradients are added to eight voxels."""
    layer = make_layer(16, (12, 12, 12), dtype=torch.float64)
    tap = torch.cartesian_prod(*[torch.arange(-1.0, 2)] * 3)
    voxel = torch.stack(torch.meshgrid(*[torch.arange(12.0)] * 3, indexing="ij"))
    offset = 5.3 - voxel - tap[:, :, None, None, None]
    layer["offset"] = offset.reshape(1, 81, 12, 12, 12).repeat(2, 1, 1, 1, 1).double()
    grad = make_grad(layer)
    assert_all_near(run(leaves_on(device, layer), grad.to(device)), oracle(layer, grad))


def test_finite_differences_of_the_network_layer(device):
    layer = make_layer(8, (3, 4, 3), dtype=torch.float64, batch=1)
    leaves = leaves_on(device, layer)

    def call(*arguments):
        return deform_conv3d(*arguments, padding=1, backend="cuda")

    assert torch.autograd.gradcheck(call, tuple(leaves.values()), fast_mode=True, nondet_tol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dense", [False, True])
def test_same_bits_five_times(device, deterministic, dtype, dense):
    layer = make_layer(16, (15, 17, 19), dtype=dtype, dense=dense)
    grad = make_grad(layer)
    leaves, first = leaves_on(device, layer), None
    for _ in range(5):
        results = run(leaves, grad.to(device))
        first = first or results
        for name, result in results.items():
            assert torch.equal(result, first[name]), name
    assert_all_near(first, oracle(layer, grad))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [7, 20, 48, 384])
@pytest.mark.parametrize("biased", [False, True])
def test_fused_offset_is_convolution_then_operator(device, dtype, channels, biased):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    x = random(2, channels, 7, 6, 9).contiguous(memory_format=LAST)
    offset_weight = random(81, channels, 1, 1, 1) / channels**0.5
    offset_bias = random(81) if biased else None
    weight, bias = random(channels, 1, 3, 3, 3), random(channels) if biased else None
    exact = [None if t is None else t.double() for t in (x, offset_weight, offset_bias, weight, bias)]
    offset = F.conv3d(*exact[:3])
    expected = deform_conv3d(exact[0], offset, *exact[3:], padding=1, backend="reference")

    arguments = [None if t is None else t.to(device) for t in (x, offset_weight, offset_bias, weight, bias)]
    with torch.inference_mode():
        actual = torch.ops.deform3d.deform_conv3d_fused_offset(*arguments)
    assert actual.is_contiguous(memory_format=LAST)
    assert_near(actual, expected)
    torch.library.opcheck(torch.ops.deform3d.deform_conv3d_fused_offset.default, tuple(arguments))


@pytest.mark.parametrize("short", [False, True])
def test_offsets_are_fused_where_memory_is_short(device, monkeypatch, short):
    """The two faster steps run if their offsets fit; otherwise nothing is allocated for offsets."""
    x = torch.randn(2, 48, 96, 96, 96, device=device).contiguous(memory_format=LAST)
    weight, bias = torch.randn(48, 1, 3, 3, 3).to(x), torch.randn(48).to(x)
    offset_weight = torch.randn(81, 48, 1, 1, 1).to(x) / 48**0.5
    offsets = x.shape[0] * 81 * 96**3 * 4
    monkeypatch.setattr(_dispatch, "free_memory", lambda _device: 2 * offsets - 2 * short)

    def call():
        return deform_conv3d_fused_offset(x, offset_weight, torch.zeros(81).to(x), weight, bias, backend="cuda")

    with torch.inference_mode():
        call()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
    peak = torch.cuda.max_memory_allocated(device) - before
    assert peak < x.nbytes + offsets // 10 if short else peak > offsets


def test_free_memory_counts_what_pytorch_holds(device):
    before = _dispatch.free_memory(device)
    kept = torch.empty(2**30, dtype=torch.uint8, device=device)
    assert before - 2**31 < _dispatch.free_memory(device) < before - 2**29
    del kept  # PyTorch keeps the memory, and the next tensor can use it
    assert _dispatch.free_memory(device) > before - 2**29
