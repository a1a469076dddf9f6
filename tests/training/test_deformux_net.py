"""DeformUXNet against published numbers, hand counts and an ordinary convolutional twin."""

import math
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from deformux.networks import blocks
from deformux.networks.deformux_net import PUBLISHED_STRIDES, DeformUXNet
from deformux.networks.precision import computes_bfloat16
from deformux.networks.presets import PRESETS

CHANNELS = (48, 96, 192, 384)
# Slices four times as thick as pixels, a single slice, and a thick first axis.
STRIDES = {
    "thick": ((2, 2, 1), (2, 2, 1), (2, 2, 2), (2, 2, 2)),
    "slice": ((2, 2, 1),) * 4,
    "thick first": ((1, 2, 2), (1, 2, 2), (1, 2, 2), (2, 2, 2)),
    "mixed": ((1, 2, 2), (2, 1, 2), (2, 2, 1), (1, 1, 1)),
}


def parameters(net: torch.nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def test_base_has_the_papers_parameter_count() -> None:
    assert parameters(DeformUXNet(1, 14)) == 55_792_118


def test_ablations_change_the_count_as_counted_by_hand() -> None:
    base = 55_792_118
    blocks = 2
    dense_mlp = sum(8 * c * c + 5 * c for c in CHANNELS) * blocks
    scaling = sum(13 * c for c in CHANNELS) * blocks
    norm = sum(2 * c for c in CHANNELS) * blocks
    assert parameters(DeformUXNet(1, 14, mlp="depthwise")) == base - dense_mlp + scaling
    assert parameters(DeformUXNet(1, 14, mlp="none")) == base - dense_mlp - norm
    dense = sum(27 * c * c - 27 * c for c in CHANNELS) * blocks
    assert parameters(DeformUXNet(1, 14, convolution="dense")) == base + dense
    assert parameters(DeformUXNet(1, 14, offset_kernel=3)) == base + sum(26 * 81 * c for c in CHANNELS) * blocks
    for planes in ("xy", "xz", "yz"):
        one_plane = sum(27 * (c + 1) for c in CHANNELS) * blocks
        assert parameters(DeformUXNet(1, 14, offset_planes=planes)) == base - one_plane
    assert parameters(DeformUXNet(1, 15)) == base + 49


def test_tiny_is_about_six_million_and_presets_grow() -> None:
    sizes = [parameters(DeformUXNet(1, 3, name)) for name in ("tiny", "small", "base")]
    assert 5.5e6 < sizes[0] < 6.5e6
    assert all(small < large for small, large in pairwise(sizes))
    assert set(PRESETS) == {"tiny", "small", "base"}


@pytest.mark.parametrize("convolution", ["depthwise", "dense"])
def test_at_initialisation_it_is_an_ordinary_convolutional_network(
    convolution: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    net = DeformUXNet(1, 3, "tiny", convolution=convolution).eval()
    x = torch.randn(1, 1, 32, 32, 32)
    with torch.no_grad():
        deformable = net(x)

        def plain(x, offset, weight, bias, padding):
            return F.conv3d(x, weight, bias, padding=padding, groups=x.shape[1] // weight.shape[1])

        monkeypatch.setattr(blocks, "deform_conv3d", plain)
        ordinary = net(x)
    torch.testing.assert_close(deformable, ordinary, rtol=1e-4, atol=1e-4)


def test_one_plane_moves_taps_along_its_two_axes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def record(x, offset, weight, bias, padding):
        seen.append(offset.unflatten(1, (27, 3)))
        return x

    monkeypatch.setattr(blocks, "deform_conv3d", record)
    mixer = blocks.DeformableMixer(4, offset_planes="xz")
    torch.nn.init.normal_(mixer.offset.weight)
    mixer(torch.randn(1, 4, 5, 6, 7))
    moved = seen[0].abs().amax(dim=(0, 1, 3, 4, 5))
    assert moved[0] > 0
    assert moved[1] == 0
    assert moved[2] > 0


@pytest.mark.parametrize("size", [(17, 30, 41), (1, 33, 20), (16, 16, 16), (5, 5, 5), (48, 32, 16)])
@pytest.mark.parametrize("training", [True, False])
def test_logits_have_the_size_of_any_input(size: tuple[int, int, int], training: bool) -> None:
    net = DeformUXNet(2, 4, "tiny").train(training)
    logits = net(torch.randn(1, 2, *size))
    assert logits.shape == (1, 4, *size)
    assert torch.isfinite(logits).all()


def test_published_strides_are_the_default() -> None:
    twins = []
    for options in ({}, {"strides": [[2, 2, 2]] * 4}):
        torch.manual_seed(0)
        twins.append(DeformUXNet(1, 3, "tiny", guidance=True, **options).eval())
    default, named = twins
    assert named.strides == default.strides == PUBLISHED_STRIDES
    assert named.multiple == (16, 16, 16)
    assert default.state_dict().keys() == named.state_dict().keys()
    assert all(torch.equal(value, named.state_dict()[name]) for name, value in default.state_dict().items())
    x = torch.randn(1, 1, 20, 17, 32)
    with torch.no_grad():
        assert torch.equal(default(x), named(x))


@pytest.mark.parametrize("strides", STRIDES.values(), ids=STRIDES)
def test_logits_have_the_size_of_any_input_with_any_strides(strides) -> None:
    net = DeformUXNet(1, 3, "tiny", strides=strides, guidance=True)
    for size in ((33, 20, 10), (17, 19, 1), (3, 21, 15), (1, 1, 1)):
        logits = net(torch.randn(1, 1, *size), torch.ones(1, 5, *size))
        assert logits.shape == (1, 3, *size)
        assert torch.isfinite(logits).all()


@pytest.mark.parametrize("strides", STRIDES.values(), ids=STRIDES)
def test_each_stage_halves_the_axes_that_its_strides_name(strides) -> None:
    net = DeformUXNet(1, 3, "tiny", strides=strides).eval()
    grids = {}

    def record(name: str):
        return lambda _module, _inputs, output: grids.__setitem__(name, tuple(output.shape[2:]))

    for level in range(4):
        net.downsample[level].register_forward_hook(record(f"down {level}"))
        net.ups[level].register_forward_hook(record(f"up {level}"))
        for number, block in enumerate(net.stages[level]):
            block.register_forward_hook(record(f"block {level}.{number}"))
    for level, skip in enumerate(net.skips):
        skip.register_forward_hook(record(f"skip {level}"))
    with torch.no_grad():
        net(torch.randn(1, 1, 29, 27, 13))
    # Rounded up to what can be halved as often as the axis is.
    halvings = [sum(stride[axis] == 2 for stride in strides) for axis in range(3)]
    full = [math.ceil(n / 2**count) * 2**count for n, count in zip((29, 27, 13), halvings, strict=True)]
    assert grids["skip 0"] == tuple(full)
    for level in range(4):
        halved = [2 ** sum(stride[axis] == 2 for stride in strides[: level + 1]) for axis in range(3)]
        expected = tuple(n // factor for n, factor in zip(full, halved, strict=True))
        names = (f"down {level}", f"skip {level + 1}", f"block {level}.0", f"block {level}.1")
        assert {grids[name] for name in names} == {expected}
        assert grids[f"up {3 - level}"] == grids[f"skip {level}"]


def test_the_decoder_sees_along_an_axis_once_it_is_halved() -> None:
    net = DeformUXNet(1, 2, "tiny", strides=((2, 2, 1), (2, 2, 1), (2, 2, 2), (2, 2, 2)))
    skips = [tuple(skip.layer.conv1.conv.kernel_size) for skip in net.skips]
    ups = [tuple(up.conv_block.conv1.conv.kernel_size) for up in net.ups]
    assert skips == [(3, 3, 1), (3, 3, 1), (3, 3, 3), (3, 3, 3), (3, 3, 3)]
    assert ups == [(3, 3, 3), (3, 3, 3), (3, 3, 1), (3, 3, 1)]
    assert tuple(net.fuse.layer.conv1.conv.kernel_size) == (3, 3, 1)
    # The encoder's deformable kernels keep their size.
    assert all(block.mixer.weight.shape[2:] == (3, 3, 3) for stage in net.stages for block in stage)


def test_a_thick_axis_that_is_not_halved_is_not_padded() -> None:
    torch.manual_seed(0)
    net = DeformUXNet(1, 2, "tiny", strides=STRIDES["thick"]).eval()
    assert net.multiple == (16, 16, 4)
    x = torch.randn(1, 1, 32, 30, 10)
    padded = torch.nn.ReplicationPad3d((0, 2, 0, 2, 0, 0))(x)
    with torch.no_grad():
        torch.testing.assert_close(net(x), net(padded)[:, :, :, :30, :10])


@pytest.mark.parametrize("strides", STRIDES.values(), ids=STRIDES)
def test_gradients_reach_every_kernel_with_any_strides(strides) -> None:
    torch.manual_seed(0)
    net = DeformUXNet(1, 2, "tiny", strides=strides, activation_checkpointing=True)
    for name, value in net.named_parameters():
        if ".offset." in name:
            torch.nn.init.normal_(value, std=0.1)
    net(torch.randn(1, 1, 16, 32, 12)).square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())
    assert all(p.grad.abs().max() > 0 for p in net.parameters() if p.ndim > 1)


def test_padding_repeats_the_border() -> None:
    torch.manual_seed(0)
    net = DeformUXNet(1, 2, "tiny").eval()
    x = torch.randn(1, 1, 20, 32, 30)
    padded = torch.nn.ReplicationPad3d((0, 2, 0, 0, 0, 12))(x)
    with torch.no_grad():
        torch.testing.assert_close(net(x), net(padded)[:, :, :20, :, :30])


def test_gradients_reach_every_parameter_once_offsets_are_not_zero() -> None:
    torch.manual_seed(0)
    net = DeformUXNet(1, 2, "tiny")
    for name, value in net.named_parameters():
        if ".offset." in name:
            torch.nn.init.normal_(value, std=0.1)
    net(torch.randn(1, 1, 32, 32, 32)).square().mean().backward()
    without = [name for name, p in net.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert without == []
    # A convolution's bias in front of an instance normalisation has no effect, so its gradient is rounding.
    assert all(p.grad.abs().max() > 0 for name, p in net.named_parameters() if p.ndim > 1)


def test_activation_checkpointing_changes_no_gradient() -> None:
    x = torch.randn(1, 1, 32, 32, 16)
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        net = DeformUXNet(1, 2, "tiny", activation_checkpointing=checkpointing)
        net(x).square().mean().backward()
        gradients.append([p.grad for p in net.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "size", [(32, 32, 32), *(pytest.param(size, marks=pytest.mark.slow) for size in ((48, 32, 16), (48, 16, 32)))]
)
def test_bfloat16_gradients_are_right_where_the_coarsest_grid_is_two_voxels_deep(size: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    net = DeformUXNet(1, 2, "tiny")
    # A CPU without the instructions emulates bfloat16, forty times as slowly as float32.
    patches = 2 if computes_bfloat16("cpu") else 1
    x = torch.randn(patches, 1, *size)
    gradients = []
    for enabled in (False, True):
        net.zero_grad()
        # A later allocation may find this in freed memory.
        del [torch.full((256 * 256 * 27,), float("nan")) for _ in range(4)][:]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            logits = net(x)
        logits.float().square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in net.skips[-1].named_parameters()})
    for name, exact in gradients[0].items():
        # Rounding turns a gradient by a few degrees; unwritten memory, by any angle.
        assert F.cosine_similarity(gradients[1][name].flatten(), exact.flatten(), dim=0) > 0.9, name


def guided_twins(in_channels: int = 1, out_channels: int = 3) -> tuple[DeformUXNet, DeformUXNet]:
    """Return an automatic network and one with guidance, from the same seed."""
    twins = []
    for guidance in (False, True):
        torch.manual_seed(0)
        twins.append(DeformUXNet(in_channels, out_channels, "tiny", guidance=guidance).eval())
    return twins[0], twins[1]


def test_guidance_adds_weights_that_change_nothing_at_first() -> None:
    automatic, guided = guided_twins()
    missing, unexpected = guided.load_state_dict(automatic.state_dict(), strict=False)
    assert not unexpected
    assert len(missing) == 3
    assert all(name.endswith(".guidance") for name in missing)
    for name, value in automatic.state_dict().items():
        assert torch.equal(value, guided.state_dict()[name]), name
    assert (automatic.guidance_channels, guided.guidance_channels) == (0, 5)
    x = torch.randn(2, 1, 20, 32, 33)
    with torch.no_grad():
        expected = automatic(x)
        assert torch.equal(guided(x), expected)
        assert torch.equal(guided(x, torch.rand(2, 5, 20, 32, 33)), expected)
        for name in missing:
            torch.nn.init.normal_(guided.get_parameter(name))
        assert torch.equal(guided(x), expected)
        assert not torch.allclose(guided(x, torch.rand(2, 5, 20, 32, 33)), expected)


@pytest.mark.parametrize("in_channels", [1, 16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_guidance_is_more_channels_of_the_scan(in_channels: int, checkpointing: bool) -> None:
    torch.manual_seed(0)
    channels = 5
    guided = DeformUXNet(in_channels, 3, "tiny", guidance=True, activation_checkpointing=checkpointing)
    twin = DeformUXNet(in_channels + channels, 3, "tiny")
    for name, value in guided.named_parameters():
        if name.endswith(".guidance"):
            torch.nn.init.normal_(value, std=0.1)
    state = guided.state_dict()
    merged = {name: value for name, value in state.items() if not name.endswith(".guidance")}
    for name in [name for name in state if name.endswith(".guidance")]:
        scan = name.replace(".guidance", ".weight")
        merged[scan] = torch.cat([state[scan], state[name]], 1)
    if in_channels == 16:
        # A block that keeps its width adds the scan itself; the twin needs a convolution that passes it on.
        side = twin.skips[0].layer
        merged["skips.0.layer.conv3.conv.weight"] = torch.eye(16, 16 + channels)[:, :, None, None, None]
        merged |= {f"skips.0.layer.norm3.{name}": value for name, value in side.norm3.state_dict().items()}
        side.norm3 = torch.nn.Identity()
        merged = {name: value for name, value in merged.items() if ".0.layer.norm3" not in name}
    twin.load_state_dict(merged)
    # One channel is empty in the whole batch, another in half of it, and padding to 32 voxels meets zeros.
    guidance = torch.rand(2, channels, 32, 27, 32)
    guidance[:, 2] = guidance[0, 1] = guidance[..., -1, :] = 0
    x = torch.randn(2, in_channels, 32, 27, 32)
    found, expected = guided(x, guidance), twin(torch.cat([x, guidance], 1))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    found.square().mean().backward()
    expected.square().mean().backward()
    for name in ("downsample.0.0", "skips.0.layer.conv1.conv"):
        both = guided.get_parameter(f"{name}.weight").grad, guided.get_parameter(f"{name}.guidance").grad
        torch.testing.assert_close(torch.cat(both, 1), twin.get_parameter(f"{name}.weight").grad, rtol=1e-3, atol=1e-5)


def test_guidance_that_does_not_fit_is_refused() -> None:
    automatic, guided = guided_twins()
    x = torch.zeros(1, 1, 16, 16, 16)
    with pytest.raises(ValueError, match="takes no guidance; build it with guidance=True"):
        automatic(x, torch.zeros(1, 5, 16, 16, 16))
    with pytest.raises(ValueError, match="expected 5 channels of guidance, got 3"):
        guided(x, torch.zeros(1, 3, 16, 16, 16))
    with pytest.raises(ValueError, match=r"expected guidance of \(16, 16, 16\) voxels, got shape \(1, 5, 8, 16, 16\)"):
        guided(x, torch.zeros(1, 5, 8, 16, 16))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"preset": "huge"}, ["preset", "base, small, tiny", "huge"]),
        ({"mlp": "big"}, ["mlp", "dense, depthwise, none", "big"]),
        ({"convolution": "grouped"}, ["convolution", "depthwise, dense"]),
        ({"offset_planes": "zz"}, ["offset_planes", "xyz, xy, xz, yz"]),
        ({"offset_kernel": 5}, ["offset_kernel", "1, 3", "5"]),
        ({"out_channels": 0}, ["out_channels", "0"]),
        ({"strides": 2}, ["strides", "four triples of 1 or 2", "got 2"]),
        ({"strides": [[2, 2, 1]] * 3}, ["strides", "four triples of 1 or 2"]),
        ({"strides": [[2, 2, 4]] * 4}, ["strides", "four triples of 1 or 2", "4"]),
        ({"strides": [[2, 2]] * 6}, ["strides", "four triples of 1 or 2"]),
    ],
)
def test_a_bad_argument_names_the_valid_ones(arguments: dict, words: list[str]) -> None:
    with pytest.raises(ValueError, match=r".+") as error:
        DeformUXNet(**{"in_channels": 1, "out_channels": 2, **arguments})
    assert all(word in str(error.value) for word in words)


def test_a_wrong_input_says_what_was_expected() -> None:
    with pytest.raises(ValueError, match=r"expected input \(N, 1, D, H, W\), got shape \(1, 2, 16, 16, 16\)"):
        DeformUXNet(1, 2, "tiny")(torch.zeros(1, 2, 16, 16, 16))


@pytest.mark.parametrize("strides", [PUBLISHED_STRIDES, STRIDES["thick"]], ids=["published", "thick"])
def test_training_compiles_without_a_break(strides) -> None:
    """Use double precision, so that every convolution is PyTorch's own on a CPU too."""
    torch.manual_seed(0)
    net = DeformUXNet(1, 3, "tiny", strides=strides).double()
    x = torch.randn(1, 1, 16, 16, 32, dtype=torch.float64)
    expected = net(x)
    compiled = torch.compile(net, fullgraph=True, backend="eager", dynamic=False)(x)
    torch.testing.assert_close(compiled, expected)
    (gradient,) = torch.autograd.grad(compiled.square().mean(), [net.stages[0][0].mixer.weight])
    (wanted,) = torch.autograd.grad(expected.square().mean(), [net.stages[0][0].mixer.weight])
    torch.testing.assert_close(gradient, wanted)
