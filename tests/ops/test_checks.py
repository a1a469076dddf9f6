"""Wrong arguments: the errors say what was got and what was expected."""

from dataclasses import replace

import pytest
import torch

from deform3d import DeformConv3d, deform_conv3d

WRONG = {
    "input without batch": ("input", lambda t: t[0], r"input: got 4 dimensions .*expected 5 \(N, C_in, D, H, W\)"),
    "input without voxels": ("input", lambda t: t[:, :, :0], "input: got shape .*at least one channel and one voxel"),
    "offset of four dimensions": ("offset", lambda t: t[..., 0], "offset: got 4 dimensions .*expected 5"),
    "offset of another output": ("offset", lambda t: t[..., :-1], r"offset: got shape .*expected \(3, 18, 5, 5, 3\)"),
    "offset of the input's size": (
        "offset",
        lambda t: t.new_zeros(3, 18, 5, 11, 7),
        r"offset: got shape \(3, 18, 5, 11, 7\), expected \(3, 18, 5, 5, 3\)",
    ),
    "offset of another batch": ("offset", lambda t: t[:2], r"offset: got shape .*expected \(3, 18, 5, 5, 3\)"),
    "offset with two axes": (
        "offset",
        lambda t: t[:, :12],
        r"offset: got 12 channels, expected 3 \* offset_groups \* 6",
    ),
    "offset without channels": ("offset", lambda t: t[:, :0], "offset: got 0 channels, expected 3"),
    "five offset groups": ("offset", lambda t: t.repeat(1, 5, 1, 1, 1), "offset: got 90 channels.*dividing"),
    "weight of four dimensions": ("weight", lambda t: t[0], "weight: got 4 dimensions .*expected 5"),
    "weight of five channels": ("weight", lambda t: t.repeat(1, 5, 1, 1, 1), "weight: got 5 input channels.*divisor"),
    "weight of seven outputs": ("weight", lambda t: torch.cat([t, t[:1]]), "weight: got 7 output channels.*6 groups"),
    "weight without taps": ("weight", lambda t: t[:, :, :0], "weight: got shape .*no size of zero"),
    "bias of five": ("bias", lambda t: t[:5], r"bias: got shape \(5,\), expected \(6,\)"),
    "bias of two dimensions": ("bias", lambda t: t[None], r"bias: got 2 dimensions .*expected 1 \(C_out,\)"),
    "mask of the offset's channels": ("mask", lambda t: t.repeat(1, 3, 1, 1, 1), r"mask: got shape .*expected \(3, 6,"),
    "mask of another output": ("mask", lambda t: t[:, :, 1:], r"mask: got shape .*expected \(3, 6, 5, 5, 3\)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_shapes(make_problem, case):
    name, change, message = WRONG[case]
    p = make_problem()
    with pytest.raises(ValueError, match=message):
        replace(p, **{name: change(getattr(p, name))}).run()


@pytest.mark.parametrize("name", ["offset", "weight", "bias", "mask"])
def test_dtypes_differ(make_problem, name):
    p = make_problem()
    with pytest.raises(TypeError, match=f"{name}: got dtype torch.float32, expected torch.float64 as input"):
        replace(p, **{name: getattr(p, name).float()}).run()


def test_integer_dtype(make_problem):
    with pytest.raises(TypeError, match=r"input: got dtype torch.int64, expected a floating-point dtype"):
        make_problem().map(lambda t: t.long()).run()


@pytest.mark.parametrize("name", ["offset", "weight", "bias", "mask"])
def test_devices_differ(make_problem, name):
    p = make_problem()
    with pytest.raises(ValueError, match=f"{name}: got device meta, expected {p.input.device} as input"):
        replace(p, **{name: getattr(p, name).to("meta")}).run()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("stride", (1, 2), "stride: got .*expected one integer or three"),
        ("stride", 0, r"stride: got \(0, 0, 0\), expected three integers of at least 1"),
        ("padding", -1, r"padding: got \(-1, -1, -1\), expected three integers of at least 0"),
        ("padding", "same", "padding: got 'same', expected one integer or three"),
        ("padding", 0.5, "padding: got 0.5, expected one integer or three"),
        ("dilation", (1, 1, 0), "dilation: got .*at least 1"),
        ("dilation", 9, "input: got size 5 with padding 2 along d, expected at least the kernel's reach of 19"),
        ("backend", "numba", "backend: got 'numba', expected one of 'cpu', 'cuda', 'reference'"),
    ],
)
def test_options(make_problem, option, value, message):
    with pytest.raises(ValueError, match=message):
        make_problem().run(**{option: value})


def test_registered_operator_checks_its_arguments(make_problem):
    """The registered operator, called without the public function, does not read out of bounds."""
    p = make_problem()
    with pytest.raises(ValueError, match="offset: got shape"):
        torch.ops.deform3d.deform_conv3d(
            p.input, p.offset[..., :1], p.weight, None, None, [1, 2, 3], [2, 1, 0], [2, 3, 1], None
        )
    with pytest.raises(ValueError, match="grad: got shape"):
        torch.ops.deform3d.deform_conv3d_backward(
            p.input, p.input, p.offset, p.weight, None, [1, 2, 3], [2, 1, 0], [2, 3, 1], None, [True] * 5
        )


@pytest.mark.parametrize("options", [{"groups": 4}, {"groups": 0}, {"kernel_size": 0}, {"kernel_size": (3, 3)}])
def test_layer(options):
    with pytest.raises(ValueError, match=r"got .*expected"):
        DeformConv3d(**{"in_channels": 6, "out_channels": 6, "kernel_size": 3, **options})


def test_options_are_keywords():
    with pytest.raises(TypeError):
        deform_conv3d(*(torch.zeros(1) for _ in range(8)))
