"""Gradients: finite differences, the oracle, autograd through the oracle, determinism."""

from dataclasses import replace

import pytest
import torch
from deform_problems import direction_like
from test_forward import LAYERS

from deform3d import deform_conv3d, reference
from deform3d._checks import check
from tolerances import assert_near


def not_whole(offset: torch.Tensor) -> torch.Tensor:
    """Move offsets away from integers, where the trilinear sample has a kink and no derivative."""
    fraction = offset - offset.floor()
    return offset.floor() + 0.1 + 0.8 * fraction


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("mask", [False, True])
def test_finite_differences(make_problem, backend, layer, mask):
    """Check every input along random directions."""
    p = make_problem(**LAYERS[layer], batch=2, size=(3, 4, 5), kernel=(2, 1, 2), dilation=(1, 1, 2), mask=mask)
    check_gradients(p, backend, fast_mode=True)


@pytest.mark.parametrize("layer", [{"channels": 2}, {"channels": 2, "groups": 1, "offset_groups": 2}])
def test_every_finite_difference(make_problem, backend, layer):
    p = make_problem(
        **layer, batch=1, size=(3, 2, 4), kernel=(2, 1, 2), stride=(2, 1, 1), padding=(1, 0, 1), dilation=(1, 1, 2)
    )
    check_gradients(p, backend, fast_mode=False)


def check_gradients(p, backend, *, fast_mode):
    p.offset.copy_(not_whole(p.offset))

    def run(input, offset, weight, bias, mask=None):
        return deform_conv3d(input, offset, weight, bias, mask=mask, **p.options, backend=backend)

    leaves = p.map(lambda t: t.requires_grad_()).tensors()
    # Atomic additions on a GPU happen in any order.
    apart = 0.0 if p.input.device.type == "cpu" else 1e-12
    assert torch.autograd.gradcheck(run, tuple(leaves.values()), fast_mode=fast_mode, nondet_tol=apart)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("mask", [False, True])
def test_backward_matches_autograd_of_the_oracle(make_problem, backend, layer, mask):
    p = make_problem(**LAYERS[layer], mask=mask)
    leaves = p.map(lambda t: t.detach().requires_grad_())
    convolution = [p.options[name] for name in ("stride", "padding", "dilation")]
    arguments = (leaves.input, leaves.offset, leaves.weight, leaves.bias, leaves.mask)
    output = reference.forward(*arguments, check(*arguments, *convolution))
    wanted = leaves.tensors()
    expected = torch.autograd.grad(output, list(wanted.values()), direction_like(output))
    actual = p.run_with_gradients(backend=backend)
    for name, gradient in zip(wanted, expected, strict=True):
        assert_near(actual[name], gradient, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [1, 16, 35, 115])
def test_dtypes_and_channel_counts(make_problem, backend, dtype, channels):
    p = make_problem(channels=channels, dtype=dtype)
    actual = p.run_with_gradients(backend=backend)
    for name, expected in p.oracle().run_with_gradients(backend="reference").items():
        assert actual[name].dtype == dtype
        assert_near(actual[name], expected, name)


def test_borders_match_torchvision(make_problem, backend):
    """Check samples on and past the border, including integer positions, where conventions differ."""
    torchvision = pytest.importorskip("torchvision")
    p = make_problem(
        size=(1, 6, 5), kernel=(1, 3, 3), stride=(1, 1, 1), padding=(0, 1, 1), dilation=(1, 1, 1), spread=3
    )
    p.offset.copy_((2 * p.offset).round() / 2)
    split = p.offset.view(3, 9, 3, 1, 6, 5)
    split[:, :, 0] = 0
    leaves = p.map(lambda t: t.detach().requires_grad_())
    planar = split[:, :, 1:].reshape(3, 18, 6, 5).detach().requires_grad_()
    flat = (leaves.input.squeeze(2), planar, leaves.weight.squeeze(2), leaves.bias)
    output = torchvision.ops.deform_conv2d(*flat, padding=1, mask=leaves.mask.squeeze(2))
    wanted = [leaves.input, planar, leaves.weight, leaves.bias, leaves.mask]
    expected = torch.autograd.grad(output, wanted, direction_like(output))

    actual = p.run_with_gradients(backend=backend)
    actual["offset"] = actual["offset"].view(3, 9, 3, 6, 5)[:, :, 1:].reshape(3, 18, 6, 5)
    for name, gradient in zip(("input", "offset", "weight", "bias", "mask"), expected, strict=True):
        assert_near(actual[name], gradient, name)


@pytest.mark.parametrize("layer", ["depthwise vectors", "dense, offset groups"])
def test_layout_of_gradients(make_problem, backend, layer):
    p = make_problem(**LAYERS[layer])
    expected = p.run_with_gradients(backend=backend)
    last = p.map(lambda t: t.contiguous(memory_format=torch.channels_last_3d) if t.dim() == 5 else t)
    actual = last.run_with_gradients(backend=backend)
    for name in expected:
        assert_near(actual[name], expected[name], name)
    for name in ("input", "offset", "mask"):
        assert expected[name].is_contiguous()
        assert actual[name].is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("name", ["input", "offset", "weight", "bias", "mask"])
def test_one_gradient_at_a_time(make_problem, backend, name):
    p = make_problem()
    expected = p.run_with_gradients(backend=backend)[name]
    leaf = getattr(p, name).requires_grad_()
    output = p.run(backend=backend)
    output.backward(direction_like(output))
    assert_near(leaf.grad, expected, name)
    assert all(t.grad is None for other, t in p.tensors().items() if other != name)


def test_same_bits_every_time_and_for_any_thread_count(make_problem, backend):
    p = make_problem(channels=67, size=(9, 11, 8), stride=(1, 1, 1), padding=(2, 2, 1), dtype=torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        expected = p.run_with_gradients(backend=backend)
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            # The reference uses PyTorch's sums and products, which promise equal bits only for equal settings.
            if backend == "reference":
                expected = p.run_with_gradients(backend=backend)
            for name, value in p.run_with_gradients(backend=backend).items():
                assert torch.equal(value, expected[name]), f"{name}, {threads} threads"
    finally:
        torch.use_deterministic_algorithms(False)


def test_second_backward_is_a_clear_error(make_problem, backend):
    p = make_problem().map(lambda t: t.requires_grad_())
    (gradient,) = torch.autograd.grad(p.run(backend=backend).sum(), p.input, create_graph=True)
    with pytest.raises(RuntimeError, match=r"second backward.*expected at most one"):
        gradient.sum().backward()


def test_output_gradient_with_any_strides(make_problem, backend):
    """The gradient of the output may have any strides, as after a crop or an expand."""
    p = make_problem(channels=19)
    expected = p.run_with_gradients(backend=backend)
    leaves = p.map(lambda t: t.detach().requires_grad_())
    output = leaves.run(backend=backend)
    direction = direction_like(output)
    big = direction.new_full((*(n + 2 for n in output.shape[:1] + output.shape[2:]), 25), torch.nan)
    part = big[1:-1, 1:-1, 1:-1, 1:-1, 3:22].permute(0, 4, 1, 2, 3)
    part.copy_(direction)
    gradients = torch.autograd.grad(output, list(leaves.tensors().values()), part)
    for name, gradient in zip(leaves.tensors(), gradients, strict=True):
        assert_near(gradient, expected[name], name)


def test_tensor_subclass(make_problem, backend):
    """MONAI's tensors carry metadata and their own rules through every operation."""
    data = pytest.importorskip("monai.data")
    p = make_problem(dtype=torch.float32)
    expected = p.run_with_gradients(backend=backend)
    leaf = data.MetaTensor(p.input).requires_grad_()
    output = replace(p, input=leaf).run(backend=backend)
    output.backward(direction_like(expected["output"]))
    assert torch.equal(output.as_tensor(), expected["output"])
    assert_near(leaf.grad.as_subclass(torch.Tensor), expected["input"].double(), "input")
