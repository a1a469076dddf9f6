"""The compared networks, in two sizes, and the cost of a forward pass."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from monai.networks.nets import UNETR, DynUNet, SegResNet, SwinUNETR, UNet
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from deformux.networks.blocks import DeformableMixer
from deformux.networks.deformux_net import DeformUXNet
from deformux.networks.fast_cpu_conv import Conv3d, adopt

__all__ = ["NETWORKS", "OURS", "SIZES", "adopt_fast_convolutions", "build", "gmac"]

OURS = "DeformUX-Net"
SIZES = ("tiny", "small")

Patch = tuple[int, int, int]
# Makes a network for a number of classes and a patch.
Maker = Callable[[int, Patch], nn.Module]


def _unet(channels: tuple[int, ...]) -> Maker:
    return lambda classes, _patch: UNet(3, 1, classes, channels, (2, 2, 2), num_res_units=2)


def _segresnet(filters: int) -> Maker:
    return lambda classes, _patch: SegResNet(3, filters, 1, classes)


def _dynunet(filters: tuple[int, ...]) -> Maker:
    return lambda classes, _patch: DynUNet(
        3, 1, classes, [3] * 4, [1, 2, 2, 2], [2, 2, 2], filters=filters, res_block=True
    )


def _unetr(features: int, hidden: int, mlp: int, heads: int) -> Maker:
    return lambda classes, patch: UNETR(
        1, classes, patch, feature_size=features, hidden_size=hidden, mlp_dim=mlp, num_heads=heads, proj_type="conv"
    )


def _swin_unetr(features: int) -> Maker:
    return lambda classes, _patch: SwinUNETR(1, classes, feature_size=features)


# As near to DeformUX-Net's 6.2 M and 14.0 M parameters as each design's rules for its widths allow.
_PEERS: Mapping[str, tuple[Maker, Maker]] = MappingProxyType(
    {
        "UNet": (_unet((36, 72, 144, 288)), _unet((56, 112, 224, 448))),
        "SegResNet": (_segresnet(16), _segresnet(24)),
        "DynUNet": (_dynunet((34, 68, 136, 272)), _dynunet((48, 96, 192, 384))),
        "UNETR": (_unetr(8, 144, 576, 6), _unetr(16, 240, 960, 12)),
        "SwinUNETR": (_swin_unetr(12), _swin_unetr(24)),
    }
)
# Divisor of the sides of an input; the sides of a patch suit the others.
_MULTIPLES = {"SwinUNETR": 32}

NETWORKS = (OURS, *_PEERS)


def build(
    name: str, size: str, *, classes: int, patch: Patch, options: Mapping[str, Any] = MappingProxyType({})
) -> nn.Module:
    """Build a network for one input channel; ``options`` are those of DeformUXNet.

    Raises:
        ValueError: the network or its size is unknown.
    """
    if name == OURS:
        return DeformUXNet(1, classes, size, **options)
    if name not in _PEERS or size not in SIZES:
        raise ValueError(
            f"network must be one of {', '.join(NETWORKS)}, of size {' or '.join(SIZES)}; got {name} {size}"
        )
    return _Peer(_PEERS[name][SIZES.index(size)](classes, patch), classes, _MULTIPLES.get(name, 1))


def adopt_fast_convolutions(network: nn.Module) -> None:
    """Make a network as fast on a CPU as DeformUX-Net: how a convolution is computed is not a merit of a network."""
    adopt(network)
    for module in network.modules():
        if type(module) is Conv3d:
            module.__class__ = _Conv3d


class _Peer(nn.Module):
    """One of MONAI's networks with the attributes that ``fit`` reads, on inputs of any size."""

    def __init__(self, network: nn.Module, classes: int, multiple: int) -> None:
        super().__init__()
        self.network = network
        self.out_channels = classes
        self.multiple = multiple
        adopt_fast_convolutions(network)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2:]
        margin = [-length % self.multiple for length in size]
        if any(margin):
            x = F.pad(x, (0, margin[2], 0, margin[1], 0, margin[0]), mode="replicate")
        return self.network(x)[:, :, : size[0], : size[1], : size[2]]


class _Conv3d(Conv3d):
    """In float32 on grids two voxels deep: there oneDNN's bfloat16 weight gradient is wrong (see DeformUXNet)."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.shape[2] <= 2:
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.float())
        return super().forward(x)


@torch.no_grad()
def gmac(network: nn.Module, shape: tuple[int, ...]) -> float:
    """Return billions of multiply-adds of one forward pass on an input of this shape.

    PyTorch counts convolutions and matrix products. It does not know the deformable convolution, which is added here:
    its taps, and 8 for each tap and channel to interpolate. Normalisation, activations and sums are not counted.
    """
    # Only shapes are needed, and a machine that trains on a GPU need not compile CPU kernels for them.
    network = copy.deepcopy(network).to("meta").eval()
    deformable = 0

    def add(mixer: DeformableMixer, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        nonlocal deformable
        samples = inputs[0].numel() * 27
        deformable += samples * mixer.weight.shape[1] + 8 * samples

    for module in network.modules():
        if isinstance(module, DeformableMixer):
            module.register_forward_hook(add)
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(shape, device="meta"))
    return (counter.get_total_flops() / 2 + deformable) / 1e9
