"""DeformUX-Net: a 3D U-Net whose encoder mixes space with depthwise deformable convolution (arXiv 2310.00199)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias, get_args

import torch
from monai.networks.blocks import UnetrBasicBlock, UnetrUpBlock
from monai.networks.blocks.dynunet_block import UnetOutBlock
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from deformux.networks.blocks import ChannelNorm, Convolution, DeformUXNetBlock, Mlp, OffsetPlanes
from deformux.networks.fast_cpu_conv import adopt
from deformux.networks.guided_layers import GuidedConv3d, InputBlock, Stem
from deformux.networks.presets import PRESETS, Preset

__all__ = ["PUBLISHED_STRIDES", "DeformUXNet", "Strides", "used_channels"]

# One triple for each stage of the encoder.
Strides: TypeAlias = tuple[tuple[int, int, int], ...]

PUBLISHED_STRIDES: Strides = ((2, 2, 2),) * 4


class DeformUXNet(nn.Module):
    """DeformUX-Net for volumetric segmentation (Lee et al., arXiv 2310.00199, figure 2 and equation 3).

    The encoder has four stages at 1/2 … 1/16 of the resolution, the decoder is UNETR's. Each row of the paper's
    ablation (table 3) is one of the keyword arguments.

    Along an axis that a stage does not halve (``strides``), its reduction has kernel size 1, as in nnU-Net (Isensee et
    al., Nature Methods 2021): where slices are several times as thick as pixels, seven pixels span about one slice. The
    deformable convolutions still see three.

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
        guidance: take an annotator's clicks and a mask to start from, see ``forward``. Without them the output equals
            that of a network without guidance, bit for bit.
        strides: one triple for each of the four stages, 1 or 2 along each axis; published is 2 everywhere.

    Attributes:
        multiple: product of the strides along each axis; an input is padded to a multiple of it.
        guidance_channels: 2 · out_channels - 1 with guidance, else 0.

    Raises:
        ValueError: an argument is not one of those named above.

    Examples:
        >>> import torch
        >>> from deformux import DeformUXNet
        >>> network = DeformUXNet(in_channels=1, out_channels=3, preset="tiny").eval()
        >>> with torch.inference_mode():
        ...     logits = network(torch.randn(1, 1, 20, 32, 16))
        >>> logits.shape
        torch.Size([1, 3, 20, 32, 16])
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
        strides: Sequence[Sequence[int]] = PUBLISHED_STRIDES,
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
        self.strides = _checked_strides(strides)
        self.multiple = tuple(math.prod(along) for along in zip(*self.strides, strict=True))
        block = partial(
            DeformUXNetBlock,
            convolution=convolution,
            offset_kernel=offset_kernel,
            offset_planes=offset_planes,
            mlp=mlp,
        )
        self.downsample = nn.ModuleList()
        self.stages = nn.ModuleList()
        self.stage_norms = nn.ModuleList()
        self._add_encoder(PRESETS[preset], block)
        self.skips = nn.ModuleList()
        self.ups = nn.ModuleList()
        self._add_decoder(PRESETS[preset])
        adopt(self)
        self.guidance_channels = 0
        if guidance:
            self.add_guidance()

    def _add_encoder(self, sizes: Preset, block: Callable[[int], DeformUXNetBlock]) -> None:
        widths = sizes.channels
        for level, (width, depth, stride) in enumerate(zip(widths, sizes.depths, self.strides, strict=True)):
            if level == 0:
                d, h, w = (7 if step == 2 else 1 for step in stride)
                convolution = nn.Conv3d(
                    self.in_channels, width, (d, h, w), stride=stride, padding=(d // 2, h // 2, w // 2)
                )
                reduce: nn.Sequential = Stem(convolution, ChannelNorm(width))
            else:
                before = widths[level - 1]
                reduce = nn.Sequential(ChannelNorm(before), nn.Conv3d(before, width, stride, stride=stride))
            self.downsample.append(reduce)
            self.stages.append(nn.ModuleList(block(width) for _ in range(depth)))
            self.stage_norms.append(ChannelNorm(width))

    def _add_decoder(self, sizes: Preset) -> None:
        # Skip connection k follows k reductions; the raw image is the first.
        sources = (self.in_channels, *sizes.channels)
        targets = (*sizes.channels, sizes.hidden)
        options: dict[str, Any] = {"kernel_size": 3, "norm_name": "instance", "res_block": True}
        for kind, source, target in zip((InputBlock, *(UnetrBasicBlock,) * 4), sources, targets, strict=True):
            self.skips.append(kind(3, source, target, stride=1, **options))
        for k in reversed(range(4)):
            up = UnetrUpBlock(3, targets[k + 1], targets[k], upsample_kernel_size=self.strides[k], **options)
            self.ups.append(up)
        width = targets[0]
        self.fuse = UnetrBasicBlock(3, width, width, stride=1, **options)
        self.head = UnetOutBlock(3, width, self.out_channels)

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
        """Return logits ``(N, out_channels, D, H, W)`` of a scan ``(N, in_channels, D, H, W)`` of any spatial size.

        Args:
            x: the scan.
            guidance: ``(N, guidance_channels, D, H, W)``: a map of clicks for each class, then the mask to start from
                as one channel for each class but the background (``deformux.networks.guidance.encode_guidance``).
            channels: numbers of the channels that ``guidance`` holds if it holds only some; all others are zero.

        Raises:
            ValueError: an input is not 5-dimensional or has another number of channels or voxels, or the network takes
                no guidance.
        """
        size = x.shape[2:]
        features = self.encode(x, guidance, channels)
        return self.decode(features, guidance, channels)[:, :, : size[0], : size[1], : size[2]]

    def encode(self, x: Tensor, guidance: Tensor | None = None, channels: Tensor | None = None) -> list[Tensor]:
        """Return the scan, padded to a multiple of ``multiple``, and the normalised output of each of the four stages.

        Raises:
            ValueError: as for ``forward``.
        """
        if x.ndim != 5 or x.shape[1] != self.in_channels:
            raise ValueError(f"expected input (N, {self.in_channels}, D, H, W), got shape {tuple(x.shape)}")
        if guidance is not None and (guidance.ndim != 5 or guidance.shape[2:] != x.shape[2:]):
            raise ValueError(f"expected guidance of {tuple(x.shape[2:])} voxels, got shape {tuple(guidance.shape)}")
        x = self._pad(x)
        features = [x]
        z = x
        used = self._used(guidance, channels)
        for downsample, stage, norm in zip(self.downsample, self.stages, self.stage_norms, strict=True):
            z = downsample(z, *used)
            used = ()
            for block in stage:  # type: ignore[attr-defined]
                z = self._run(block, z, grid=z)
            features.append(norm(z))
        return features

    def decode(self, features: list[Tensor], guidance: Tensor | None = None, channels: Tensor | None = None) -> Tensor:
        """Return logits, at the padded size, of the features that ``encode`` returned for the same guidance."""
        skips = [self._run(self.skips[0], features[0], *self._used(guidance, channels), grid=features[0])]
        skips += [
            self._run(skip, feature, grid=feature) for skip, feature in zip(self.skips[1:], features[1:], strict=True)
        ]
        z = skips.pop()
        for up in self.ups:
            skip = skips.pop()
            z = self._run(up, z, skip, grid=skip)
        return self.head(self._run(self.fuse, z, grid=z))

    def _used(self, guidance: Tensor | None, channels: Tensor | None) -> tuple[Tensor, ...]:
        """Return the non-empty channels of guidance, padded with zeros to the scan's size, and their numbers."""
        if guidance is None:
            return ()
        if not self.guidance_channels:
            raise ValueError("this network takes no guidance; build it with guidance=True")
        if channels is not None:
            return self._pad(guidance, "constant"), channels
        if guidance.shape[1] != self.guidance_channels:
            raise ValueError(f"expected {self.guidance_channels} channels of guidance, got {guidance.shape[1]}")
        # Most labels have no click: with 40 of them, convolving zeros would cost more than everything else.
        channels = used_channels(guidance)
        return self._pad(guidance[:, channels], "constant"), channels

    def _pad(self, x: Tensor, mode: str = "replicate") -> Tensor:
        """Pad each axis at its end to a multiple of ``multiple``, so that the coarsest grid has several voxels."""
        size, multiple = x.shape[2:], self.multiple
        padded = [-(-length // step) * step for length, step in zip(size, multiple, strict=True)]
        if tuple(padded) == multiple:
            # Instance normalisation has no variance over a single voxel. A second slice would be foreign to a network
            # for single slices.
            axis = max(range(3), key=lambda axis: (multiple[axis], axis))
            padded[axis] *= 2
        missing = [target - length for target, length in zip(padded, size, strict=True)]
        if not any(missing):
            return x
        return F.pad(x, (0, missing[2], 0, missing[1], 0, missing[0]), mode=mode)

    def _run(self, module: nn.Module, *inputs: Tensor, grid: Tensor) -> Tensor:
        """Call a module whose convolutions work on the voxels of ``grid``."""
        size = grid.shape[2:]
        # Only the first axis was seen to be concerned, on a processor with AVX-512; without gradients, none can be.
        thin = size[0] == 2 or (torch.is_grad_enabled() and 2 in size)
        if grid.device.type == "cpu" and thin and torch.is_autocast_enabled("cpu"):
            # oneDNN's bfloat16 weight gradient of a 3×3×3 convolution reads memory it never wrote where the grid is
            # two voxels deep (seen with torch 2.15): wrong at best, NaN at worst. Such grids are small.
            with torch.autocast("cpu", enabled=False):
                return self._call(module, *(x.float() if x.is_floating_point() else x for x in inputs))
        return self._call(module, *inputs)

    def _call(self, module: nn.Module, *inputs: Tensor) -> Tensor:
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(module, *inputs, use_reentrant=False)
        return module(*inputs)


def used_channels(guidance: Tensor) -> Tensor:
    """Return the numbers of non-empty channels of guidance ``(N, channels, D, H, W)``; the host waits for a GPU."""
    return guidance.flatten(2).any(2).any(0).nonzero()[:, 0]


def _check_one_of(name: str, value: object, valid: tuple[object, ...]) -> None:
    if value not in valid:
        raise ValueError(f"{name} must be one of {', '.join(map(str, valid))}; got {value!r}")


def _checked_strides(strides: Sequence[Sequence[int]]) -> Strides:
    """Return strides, which may be lists, as tuples; raise ValueError unless they are four triples of 1 or 2."""
    try:
        checked = tuple((d, h, w) for d, h, w in strides)
    except (TypeError, ValueError):
        checked = ()
    steps = [step for stride in checked for step in stride]
    if len(steps) != 3 * len(PUBLISHED_STRIDES) or not all(type(step) is int and step in (1, 2) for step in steps):
        raise ValueError(
            "strides must be four triples of 1 or 2, one for each stage, such as "
            f"((2, 2, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2)); got {strides!r}"
        )
    return checked
