"""Blocks of DeformUX-Net's encoder: deformable mixing of space, then mixing of channels."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deform3d import deform_conv3d, deform_conv3d_fused_offset

__all__ = ["ChannelNorm", "Convolution", "DeformUXNetBlock", "DeformableMixer", "Mlp", "OffsetPlanes"]

Convolution: TypeAlias = Literal["depthwise", "dense"]
OffsetPlanes: TypeAlias = Literal["xyz", "xy", "xz", "yz"]
Mlp: TypeAlias = Literal["dense", "depthwise", "none"]

_TAPS = 27


class ChannelNorm(nn.LayerNorm):
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
        # torch.compile cannot trace a check for inference mode.
        inference = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if inference and len(self.axes) == 3 and self.offset.kernel_size == (1, 1, 1):
            # Saves the 81 channels of offsets where a kernel can compute them on the fly.
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
        self.norm1 = ChannelNorm(channels)
        self.mixer = DeformableMixer(
            channels, convolution=convolution, offset_kernel=offset_kernel, offset_planes=offset_planes
        )
        # "none" drops the whole second equation, with its normalisation.
        self.norm2 = ChannelNorm(channels) if mlp != "none" else None
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
