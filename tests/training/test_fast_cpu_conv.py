"""The CPU convolution and instance norm against PyTorch's in float64."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from deformux.networks.fast_cpu_conv import Conv3d, InstanceNorm3d, adopt, conv3d
from tolerances import assert_near

# input, output channels, kernel, stride, padding: both sides of every choice, and very thin grids.
PROBLEMS = [
    ((1, 16, 32, 24, 32), 8, 3, 1, 1),
    ((1, 64, 20, 20, 20), 48, 3, 1, 1),
    ((1, 64, 6, 8, 6), 64, 3, 1, 1),
    ((1, 24, 2, 3, 2), 40, 3, 1, 1),
    ((1, 8, 1, 4, 4), 8, 3, 1, 1),
    ((2, 8, 6, 8, 6), 8, 3, 1, 1),
    ((2, 40, 6, 8, 6), 40, 3, 1, 1),
    ((1, 1, 32, 32, 32), 16, 7, 2, 3),
    ((1, 16, 9, 8, 7), 32, 2, 2, 0),
    ((1, 16, 4, 8, 6), 32, 1, 1, 0),
    # A thick axis that is not halved, and a single slice.
    ((1, 1, 48, 48, 12), 16, (7, 7, 1), (2, 2, 1), (3, 3, 0)),
    ((2, 1, 32, 32, 1), 16, (7, 7, 1), (2, 2, 1), (3, 3, 0)),
    ((1, 16, 24, 24, 12), 32, (2, 2, 1), (2, 2, 1), 0),
    ((2, 40, 1, 8, 6), 48, (1, 2, 2), (1, 2, 2), 0),
    ((1, 16, 48, 48, 1), 16, 3, 1, 1),
]


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize(("shape", "channels", "kernel", "stride", "padding"), PROBLEMS)
def test_values_and_gradients_equal_float64(shape, channels, kernel, stride, padding, memory) -> None:
    torch.manual_seed(0)
    kernel, stride, padding = ((v,) * 3 if isinstance(v, int) else v for v in (kernel, stride, padding))
    x = torch.randn(shape).contiguous(memory_format=memory)
    weight, bias = torch.randn(channels, shape[1], *kernel), torch.randn(channels)
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = F.conv3d(*exact, stride, padding)
    upstream = torch.randn(expected.shape)

    result = conv3d(*inputs, stride=stride, padding=padding)
    result.backward(upstream)
    expected.backward(upstream.double())

    assert_near(result, expected)
    for name, own, true in zip(("input", "weight", "bias"), inputs, exact, strict=True):
        assert own.grad is not None
        assert_near(own.grad, true.grad, name)
    with torch.no_grad():
        assert torch.equal(conv3d(*inputs, stride=stride, padding=padding), result)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("shape", [(1, 5, 4, 6, 7), (3, 16, 9, 8, 10), (2, 8, 1, 1, 2)])
def test_a_norm_equals_float64(shape, affine, memory) -> None:
    torch.manual_seed(0)
    layer = InstanceNorm3d(shape[1], affine=affine)
    exact = nn.InstanceNorm3d(shape[1], affine=affine).double()
    for own, other in zip(layer.parameters(), exact.parameters(), strict=True):
        other.data = own.data.normal_().double()
    x = (3 + 2 * torch.randn(shape)).contiguous(memory_format=memory)
    expected = exact(x.double())
    torch.testing.assert_close(layer(x.requires_grad_()).double(), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_other_norms_are_left_to_pytorch() -> None:
    x = torch.randn(2, 4, 3, 4, 5)
    layer, other = InstanceNorm3d(4), nn.InstanceNorm3d(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x.bfloat16()), other(x.bfloat16()))
    assert torch.equal(layer(x.double()), other(x.double()))
    assert torch.equal(layer(x[0]), other(x[0]))
    tracking = InstanceNorm3d(4, track_running_stats=True)
    tracking(x)
    assert tracking.running_mean.any()
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        layer(x[..., :1, :1, :1])


def test_only_tensors_that_need_a_gradient_get_one() -> None:
    x, weight = torch.randn(1, 4, 6, 6, 6), torch.randn(4, 4, 3, 3, 3, requires_grad=True)
    conv3d(x, weight, None, stride=(1, 1, 1), padding=(1, 1, 1)).sum().backward()
    assert x.grad is None
    assert weight.grad is not None


def test_autocast_and_other_types_are_left_to_pytorch() -> None:
    x, weight = torch.randn(1, 4, 6, 6, 6), torch.randn(4, 4, 3, 3, 3)
    own = {"stride": (1, 1, 1), "padding": (1, 1, 1)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(conv3d(x, weight, None, **own), F.conv3d(x, weight, padding=1))
    double = x.double(), weight.double()
    assert torch.equal(conv3d(*double, None, **own), F.conv3d(*double, padding=1))


def test_fake_tensors_and_compilers_are_left_to_pytorch() -> None:
    own = {"stride": (1, 1, 1), "padding": (1, 1, 1)}
    with FakeTensorMode():
        x, weight = torch.zeros(1, 4, 6, 6, 6), torch.zeros(8, 4, 3, 3, 3)
        assert conv3d(x, weight, None, **own).shape == (1, 8, 6, 6, 6)
    layer = Conv3d(4, 8, 3, padding=1)
    x = torch.randn(1, 4, 6, 6, 6)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


def test_adopting_keeps_state_and_leaves_other_convolutions() -> None:
    module = nn.Sequential(
        nn.Conv3d(4, 8, 3), nn.Conv3d(8, 8, 3, groups=8), nn.Conv3d(8, 8, 3, dilation=2), nn.InstanceNorm3d(8)
    )
    before = module.state_dict()
    adopt(module)
    assert [type(layer) for layer in module] == [Conv3d, nn.Conv3d, nn.Conv3d, InstanceNorm3d]
    assert module.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
