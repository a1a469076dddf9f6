"""Offsets from a 1x1x1 convolution inside the operator: the same numbers as two separate convolutions."""

import pytest
import torch
from torch.nn import functional as F

from deform3d import deform_conv3d, deform_conv3d_fused_offset


def tensors(device, *, channels=6, groups=6, kernel=(3, 3, 3), dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    shifts = 3 * kernel[0] * kernel[1] * kernel[2]
    return (
        random(2, channels, 4, 5, 6),
        random(shifts, channels, 1, 1, 1),
        random(shifts),
        random(channels, channels // groups, *kernel),
        random(channels),
    )


@pytest.mark.parametrize(("groups", "kernel"), [(6, (3, 3, 3)), (6, (1, 5, 3)), (1, (3, 3, 3))])
@pytest.mark.parametrize("inference", [False, True])
def test_equals_two_convolutions(backend, device, groups, kernel, inference):
    x, offset_weight, offset_bias, weight, bias = tensors(device, groups=groups, kernel=kernel)
    padding = tuple(length // 2 for length in kernel)
    expected = deform_conv3d(
        x, F.conv3d(x, offset_weight, offset_bias), weight, bias, padding=padding, backend="reference"
    )
    with torch.inference_mode(inference):
        actual = deform_conv3d_fused_offset(x, offset_weight, offset_bias, weight, bias, backend=backend)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    plain = deform_conv3d_fused_offset(x, offset_weight, None, weight, backend=backend)
    expected = deform_conv3d(x, F.conv3d(x, offset_weight), weight, padding=padding, backend="reference")
    torch.testing.assert_close(plain, expected, rtol=1e-12, atol=1e-12)


def test_gradients_reach_every_input(backend, device):
    leaves = [t.requires_grad_() for t in tensors(device)]
    x, offset_weight, offset_bias, weight, bias = leaves
    expected = torch.autograd.grad(
        deform_conv3d(x, F.conv3d(x, offset_weight, offset_bias), weight, bias, padding=1, backend="reference").sum(),
        leaves,
    )
    actual = torch.autograd.grad(deform_conv3d_fused_offset(*leaves, backend=backend).sum(), leaves)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_network_infers_as_it_trains():
    """In inference mode the network uses the fused call; the segmentation must not change."""
    blocks = pytest.importorskip("deformux.networks.blocks", reason="the network needs monai", exc_type=ImportError)
    torch.manual_seed(0)
    mixer = blocks.DeformableMixer(6)
    torch.nn.init.normal_(mixer.offset.weight, std=0.3)
    x = torch.randn(1, 6, 4, 5, 6)
    with torch.no_grad():
        expected = mixer(x)
    with torch.inference_mode():
        assert torch.equal(mixer(x), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: torch.zeros(80, 6, 1, 1, 1)}, r"offset_weight: got shape \(80, 6, 1, 1, 1\), expected \(81, 6, 1, 1, 1\)"),
        ({1: torch.zeros(81, 6, 3, 3, 3)}, r"offset_weight: got shape .*expected \(81, 6, 1, 1, 1\)"),
        ({2: torch.zeros(6)}, r"offset_bias: got shape \(6,\), expected \(81,\)"),
        ({3: torch.zeros(6, 1, 3, 2, 3)}, r"weight: got kernel size \(3, 2, 3\), expected odd sizes"),
        ({3: torch.zeros(6, 4, 3, 3, 3)}, r"weight: got 4 input channels per group"),
        ({4: torch.zeros(5)}, r"bias: got shape \(5,\), expected \(6,\)"),
    ],
)
def test_wrong_shapes_say_what_was_expected(change, message):
    """Check through the operator's fake, which checks the same as the kernel."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    given = list(tensors("cpu", dtype=torch.float32))
    for position, tensor in change.items():
        given[position] = tensor
    with FakeTensorMode() as mode, pytest.raises(ValueError, match=message):
        torch.ops.deform3d.deform_conv3d_fused_offset(*(mode.from_tensor(t) for t in given))


def test_fake_has_the_layout_of_its_input():
    from torch._subclasses.fake_tensor import FakeTensorMode

    for layout in (torch.contiguous_format, torch.channels_last_3d):
        x, *others = tensors("cpu", dtype=torch.float32)
        x = x.contiguous(memory_format=layout)
        with FakeTensorMode() as mode:
            fake = torch.ops.deform3d.deform_conv3d_fused_offset(*(mode.from_tensor(t) for t in (x, *others)))
        assert fake.shape == x.shape
        assert fake.stride() == x.stride()
