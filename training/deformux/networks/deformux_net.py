"""DeformUX-Net: a 3D U-Net whose encoder mixes space with depthwise deformable convolution (arXiv 2310.00199)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch
from monai.networks.blocks import UnetrBasicBlock, UnetrUpBlock
from monai.networks.blocks.dynunet_block import UnetOutBlock
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from deform3d import deform_conv3d, deform_conv3d_fused_offset
from deformux.networks.fast_cpu_conv import Conv3d, adopt, conv3d

__all__ = ["PRESETS", "DeformUXNet", "DeformUXNetBlock", "DeformableMixer", "Preset", "used_channels"]

Convolution = Literal["depthwise", "dense"]
OffsetPlanes = Literal["xyz", "xy", "xz", "yz"]
Mlp = Literal["dense", "depthwise", "none"]

# The deepest stage sees 1/16 of the resolution.
_STRIDE = 16
_TAPS = 27


@dataclass(frozen=True)
class Preset:
    """Widths of a DeformUX-Net: channels of the four stages, channels of the bottleneck, blocks per stage."""

    channels: tuple[int, int, int, int]
    hidden: int
    depths: tuple[int, int, int, int] = (2, 2, 2, 2)


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "base": Preset((48, 96, 192, 384), 768),  # the published model
        "small": Preset((24, 48, 96, 192), 384),
        "tiny": Preset((16, 32, 64, 128), 256),  # trains on a CPU
    }
)


class _ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of ``(N, C, D, H, W)``; the result is in channels-last memory."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)


class DeformableMixer(nn.Module):
    """3×3×3 deformable convolution with offsets from a parallel, zero-initialised convolution (paper, section 3.2).

    ``(N, C, D, H, W)`` to the same shape. At initialisation it is an ordinary 3×3×3 convolution.

    Args:
        channels: C.
        convolution: ``depthwise`` (published) or ``dense``, the standard deformable convolution.
        offset_kernel: kernel size of the offset branch, 1 (published) or 3.
        offset_planes: axes along which taps may move; ``xyz`` is the published tri-planar form. x, y and z are the
            tensor's three spatial axes in order.
    """

    def __init__(
        self,
        channels: int,
        *,
        convolution: Convolution = "depthwise",
        offset_kernel: int = 1,
        offset_planes: OffsetPlanes = "xyz",
    ) -> None:
        super().__init__()
        self.groups = channels if convolution == "depthwise" else 1
        self.axes = tuple("xyz".index(axis) for axis in offset_planes)
        self.weight = nn.Parameter(torch.empty(channels, channels // self.groups, 3, 3, 3))
        self.bias = nn.Parameter(torch.zeros(channels))
        # Padding keeps the grid: the published code pads a 1×1×1 kernel too, which shifts every offset.
        self.offset = nn.Conv3d(channels, len(self.axes) * _TAPS, offset_kernel, padding=offset_kernel // 2)
        # The variance of torch's own convolution initialisation.
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        # Without gradients; torch.compile cannot trace the question for inference mode.
        inference = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if inference and len(self.axes) == 3 and self.offset.kernel_size == (1, 1, 1):
            # Spares the 81 channels of offsets where a kernel can compute them as it goes.
            return deform_conv3d_fused_offset(x, self.offset.weight, self.offset.bias, self.weight, self.bias)
        offset = self.offset(x)
        if len(self.axes) < 3:
            full = offset.new_zeros(offset.shape[0], _TAPS, 3, *offset.shape[2:])
            full[:, :, self.axes] = offset.unflatten(1, (_TAPS, len(self.axes)))
            offset = full.flatten(1, 2)
        return deform_conv3d(x, offset, self.weight, self.bias, padding=1)


class _DenseMlp(nn.Module):
    """Two 1×1×1 convolutions around a GELU, as matrix products over channels-last voxels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.expand = nn.Linear(channels, 4 * channels)
        self.reduce = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        voxels = x.permute(0, 2, 3, 4, 1)
        return self.reduce(F.gelu(self.expand(voxels))).permute(0, 4, 1, 2, 3)


class _DepthwiseScaling(nn.Sequential):
    """The channel-wise expansion of 3D UX-Net (arXiv 2209.15076): no channel mixing."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            nn.Conv3d(channels, 4 * channels, 1, groups=channels),
            nn.GELU(),
            nn.Conv3d(4 * channels, channels, 1, groups=channels),
        )


class DeformUXNetBlock(nn.Module):
    """``z = DDC(LN(z)) + z; z = MLP(LN(z)) + z`` (paper, equation 3) on ``(N, C, D, H, W)``."""

    def __init__(
        self,
        channels: int,
        *,
        convolution: Convolution = "depthwise",
        offset_kernel: int = 1,
        offset_planes: OffsetPlanes = "xyz",
        mlp: Mlp = "dense",
    ) -> None:
        super().__init__()
        self.norm1 = _ChannelNorm(channels)
        self.mixer = DeformableMixer(
            channels, convolution=convolution, offset_kernel=offset_kernel, offset_planes=offset_planes
        )
        # "none" drops the second line whole, its normalisation included.
        self.norm2 = _ChannelNorm(channels) if mlp != "none" else None
        self.mlp: nn.Module | None = None
        if mlp == "dense":
            self.mlp = _DenseMlp(channels)
        elif mlp == "depthwise":
            self.mlp = _DepthwiseScaling(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mixer(self.norm1(x)) + x
        if self.norm2 is not None and self.mlp is not None:
            x = self.mlp(self.norm2(x)) + x
        return x


class GuidedConv3d(Conv3d):
    """A convolution of the scan, to which guidance adds through weights of its own, zero at first.

    The state dict has ``guidance`` (out, guidance channels, kernel) beside the names of ``nn.Conv3d``.
    """

    guidance: nn.Parameter

    @classmethod
    def of(cls, convolution: nn.Conv3d, guidance_channels: int) -> GuidedConv3d:
        """The same convolution, its weights shared, with room for guidance."""
        guided = cls(
            convolution.in_channels,
            convolution.out_channels,
            convolution.kernel_size,  # type: ignore[arg-type]
            stride=convolution.stride,  # type: ignore[arg-type]
            padding=convolution.padding,  # type: ignore[arg-type]
            bias=convolution.bias is not None,
            # Draws no random numbers: a network with guidance starts from the weights of one without.
            device="meta",
        )
        guided.weight, guided.bias = convolution.weight, convolution.bias
        weight = convolution.weight
        guided.guidance = nn.Parameter(weight.new_zeros(weight.shape[0], guidance_channels, *weight.shape[2:]))
        return guided.train(convolution.training)

    def forward(self, x: Tensor, guidance: Tensor | None = None, channels: Tensor | None = None) -> Tensor:
        """As ``nn.Conv3d``, plus the convolved ``guidance``, which holds the given ``channels`` out of all."""
        y = super().forward(x)
        if guidance is None or channels is None or not guidance.shape[1]:
            return y
        weight = self.guidance[:, channels]
        return y + conv3d(guidance, weight, None, stride=self.stride, padding=self.padding)  # type: ignore[arg-type]


class _Stem(nn.Sequential):
    def forward(self, x: Tensor, *guidance: Tensor) -> Tensor:
        convolution, norm = self
        return norm(convolution(x, *guidance))


class _InputBlock(UnetrBasicBlock):
    """MONAI's residual block; guidance, where there is any, goes into the two convolutions that read the scan."""

    def forward(self, x: Tensor, *guidance: Tensor) -> Tensor:
        if not guidance:
            return super().forward(x)
        block = self.layer
        y = block.conv2(block.lrelu(block.norm1(block.conv1.conv(x, *guidance))))
        # Without a change of width MONAI's block has no convolution beside its main path.
        residual = block.norm3(block.conv3.conv(x, *guidance)) if block.downsample else x
        return block.lrelu(block.norm2(y) + residual)


class DeformUXNet(nn.Module):
    """DeformUX-Net for volumetric segmentation (Lee et al., arXiv 2310.00199, figure 2 and equation 3).

    Four encoder stages at 1/2 … 1/16 of the resolution, and the convolutional decoder of UNETR. Each row of the
    paper's ablation (table 3) is one of the keyword arguments.

    Args:
        in_channels: channels of the scan.
        out_channels: classes, background included.
        preset: ``base`` (published, 55.8 M parameters), ``small`` or ``tiny`` (for CPUs).
        convolution: ``depthwise`` (published) or ``dense`` deformable convolution.
        offset_kernel: kernel size of the offset branch, 1 (published) or 3.
        offset_planes: ``xyz`` (published, tri-planar), or ``xy``, ``xz``, ``yz`` for one plane only.
        mlp: ``dense`` (published), ``depthwise`` scaling, or ``none``.
        activation_checkpointing: recompute encoder blocks and decoder stages in the backward pass instead of keeping
            their activations.
        guidance: take an annotator's clicks and a mask to start from, see ``forward``. Without them the output is that
            of the network without guidance, bit for bit.

    Attributes:
        guidance_channels: 2 · out_channels - 1 with guidance, else 0.

    Raises:
        ValueError: an argument is not one of those named above.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        preset: str = "base",
        *,
        convolution: Convolution = "depthwise",
        offset_kernel: int = 1,
        offset_planes: OffsetPlanes = "xyz",
        mlp: Mlp = "dense",
        activation_checkpointing: bool = False,
        guidance: bool = False,
    ) -> None:
        super().__init__()
        _check_one_of("preset", preset, tuple(PRESETS))
        _check_one_of("convolution", convolution, get_args(Convolution))
        _check_one_of("offset_kernel", offset_kernel, (1, 3))
        _check_one_of("offset_planes", offset_planes, get_args(OffsetPlanes))
        _check_one_of("mlp", mlp, get_args(Mlp))
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.in_channels, self.out_channels, self.preset = in_channels, out_channels, preset
        self.activation_checkpointing = activation_checkpointing
        widths = PRESETS[preset].channels
        hidden = PRESETS[preset].hidden

        self.downsample = nn.ModuleList()
        self.stages = nn.ModuleList()
        self.stage_norms = nn.ModuleList()
        for level, width in enumerate(widths):
            if level == 0:
                reduce: nn.Sequential = _Stem(
                    nn.Conv3d(in_channels, width, 7, stride=2, padding=3), _ChannelNorm(width)
                )
            else:
                reduce = nn.Sequential(
                    _ChannelNorm(widths[level - 1]), nn.Conv3d(widths[level - 1], width, 2, stride=2)
                )
            self.downsample.append(reduce)
            self.stages.append(
                nn.ModuleList(
                    DeformUXNetBlock(
                        width,
                        convolution=convolution,
                        offset_kernel=offset_kernel,
                        offset_planes=offset_planes,
                        mlp=mlp,
                    )
                    for _ in range(PRESETS[preset].depths[level])
                )
            )
            self.stage_norms.append(_ChannelNorm(width))

        # Skip connection k has resolution 1/2^k; the raw image is the first.
        sources = (in_channels, *widths)
        targets = (*widths, hidden)
        self.skips = nn.ModuleList(
            block(3, source, target, kernel_size=3, stride=1, norm_name="instance", res_block=True)
            for block, source, target in zip((_InputBlock, *(UnetrBasicBlock,) * 4), sources, targets, strict=True)
        )
        self.ups = nn.ModuleList(
            UnetrUpBlock(
                3,
                targets[k + 1],
                targets[k],
                kernel_size=3,
                upsample_kernel_size=2,
                norm_name="instance",
                res_block=True,
            )
            for k in reversed(range(4))
        )
        self.fuse = UnetrBasicBlock(
            3, widths[0], widths[0], kernel_size=3, stride=1, norm_name="instance", res_block=True
        )
        self.head = UnetOutBlock(3, widths[0], out_channels)
        adopt(self)
        self.guidance_channels = 0
        if guidance:
            self.add_guidance()

    def add_guidance(self) -> None:
        """Make the network take guidance, in place; its output without guidance stays the same, bit for bit."""
        if self.guidance_channels:
            return
        self.guidance_channels = 2 * self.out_channels - 1
        stem: Any = self.downsample[0]
        block: Any = self.skips[0].layer
        stem[0] = GuidedConv3d.of(stem[0], self.guidance_channels)
        for layer in (block.conv1, block.conv3) if block.downsample else (block.conv1,):
            layer.conv = GuidedConv3d.of(layer.conv, self.guidance_channels)

    def forward(self, x: Tensor, guidance: Tensor | None = None, channels: Tensor | None = None) -> Tensor:
        """Logits ``(N, out_channels, D, H, W)`` of a scan ``(N, in_channels, D, H, W)`` of any spatial size.

        Args:
            x: the scan.
            guidance: ``(N, guidance_channels, D, H, W)``: a map of clicks for each class, then the mask to start from
                as one channel for each class but the background (``deformux.networks.guidance.encode_guidance``).
            channels: numbers of the channels that ``guidance`` holds, where it holds only some: all others are zero.

        Raises:
            ValueError: an input is not 5-dimensional or has another number of channels or voxels, or the network takes
                no guidance.
        """
        size = x.shape[2:]
        features = self.encode(x, guidance, channels)
        return self.decode(features, guidance, channels)[:, :, : size[0], : size[1], : size[2]]

    def encode(self, x: Tensor, guidance: Tensor | None = None, channels: Tensor | None = None) -> list[Tensor]:
        """The scan, padded to a size that divides by 16, and the normalised output of each of the four stages.

        Raises:
            ValueError: as for ``forward``.
        """
        if x.ndim != 5 or x.shape[1] != self.in_channels:
            raise ValueError(f"expected input (N, {self.in_channels}, D, H, W), got shape {tuple(x.shape)}")
        if guidance is not None and (guidance.ndim != 5 or guidance.shape[2:] != x.shape[2:]):
            raise ValueError(f"expected guidance of {tuple(x.shape[2:])} voxels, got shape {tuple(guidance.shape)}")
        x = _pad(x)
        features = [x]
        z = x
        used = self._used(guidance, channels)
        for downsample, stage, norm in zip(self.downsample, self.stages, self.stage_norms, strict=True):
            z = downsample(z, *used)
            used = ()
            for block in stage:  # type: ignore[attr-defined]
                z = self._run(block, z)
            features.append(norm(z))
        return features

    def decode(self, features: list[Tensor], guidance: Tensor | None = None, channels: Tensor | None = None) -> Tensor:
        """Logits, at the padded size, of what ``encode`` gave for the same guidance."""
        skips = [self._call(self.skips[0], features[0], *self._used(guidance, channels))]
        skips += [self._run(skip, feature) for skip, feature in zip(self.skips[1:], features[1:], strict=True)]
        z = skips.pop()
        for up in self.ups:
            z = self._run(up, z, skips.pop())
        return self.head(self._run(self.fuse, z))

    def _used(self, guidance: Tensor | None, channels: Tensor | None) -> tuple[Tensor, ...]:
        """The channels of the guidance that hold anything, padded as the scan is but with zeros, and their numbers."""
        if guidance is None:
            return ()
        if not self.guidance_channels:
            raise ValueError("this network takes no guidance; build it with guidance=True")
        if channels is not None:
            return _pad(guidance, "constant"), channels
        if guidance.shape[1] != self.guidance_channels:
            raise ValueError(f"expected {self.guidance_channels} channels of guidance, got {guidance.shape[1]}")
        # Most labels have no click: with 40 of them, convolving zeros would cost more than everything else.
        channels = used_channels(guidance)
        return _pad(guidance[:, channels], "constant"), channels

    def _run(self, module: nn.Module, *inputs: Tensor) -> Tensor:
        grid = inputs[-1]
        if grid.device.type == "cpu" and grid.shape[2] == 2 and torch.is_autocast_enabled("cpu"):
            # oneDNN's bfloat16 weight gradient of a 3×3×3 convolution reads memory it never wrote where the grid is
            # two voxels deep (seen with torch 2.15): wrong at best, NaN at worst. Such grids are small.
            with torch.autocast("cpu", enabled=False):
                return self._call(module, *(x.float() for x in inputs))
        return self._call(module, *inputs)

    def _call(self, module: nn.Module, *inputs: Tensor) -> Tensor:
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(module, *inputs, use_reentrant=False)
        return module(*inputs)


def used_channels(guidance: Tensor) -> Tensor:
    """Numbers of the channels of guidance ``(N, channels, D, H, W)`` that hold anything; a GPU makes the host wait."""
    return guidance.flatten(2).any(2).any(0).nonzero()[:, 0]


def _check_one_of(name: str, value: object, valid: tuple[object, ...]) -> None:
    if value not in valid:
        raise ValueError(f"{name} must be one of {', '.join(map(str, valid))}; got {value!r}")


def _pad(x: Tensor, mode: str = "replicate") -> Tensor:
    """Add zeros, or repeat the far border, until each axis divides by 16 and the coarsest grid has several voxels."""
    padded = [-(-length // _STRIDE) * _STRIDE for length in x.shape[2:]]
    if max(padded) == _STRIDE:
        # Instance normalisation has no variance over a single voxel.
        padded[-1] = 2 * _STRIDE
    missing = [target - length for target, length in zip(padded, x.shape[2:], strict=True)]
    if not any(missing):
        return x
    return F.pad(x, (0, missing[2], 0, missing[1], 0, missing[0]), mode=mode)
