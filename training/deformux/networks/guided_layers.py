"""Layers that read the scan, and guidance beside it if there is any."""

from __future__ import annotations

from monai.networks.blocks import UnetrBasicBlock
from torch import Tensor, nn

from deformux.networks.fast_cpu_conv import Conv3d, conv3d

__all__ = ["GuidedConv3d", "InputBlock", "Stem"]


class GuidedConv3d(Conv3d):
    """A convolution of the scan; guidance adds to it through its own weights, zero at first.

    The state dict has ``guidance`` (out, guidance channels, kernel) besides the names of ``nn.Conv3d``.
    """

    guidance: nn.Parameter

    @classmethod
    def of(cls, convolution: nn.Conv3d, guidance_channels: int) -> GuidedConv3d:
        """Return the same convolution, sharing its weights, with room for guidance."""
        guided = cls(
            convolution.in_channels,
            convolution.out_channels,
            convolution.kernel_size,  # type: ignore[arg-type]
            stride=convolution.stride,  # type: ignore[arg-type]
            padding=convolution.padding,  # type: ignore[arg-type]
            bias=convolution.bias is not None,
            # Draw no random numbers: a network with guidance starts from the weights of one without.
            device="meta",
        )
        guided.weight, guided.bias = convolution.weight, convolution.bias
        weight = convolution.weight
        guided.guidance = nn.Parameter(weight.new_zeros(weight.shape[0], guidance_channels, *weight.shape[2:]))
        return guided.train(convolution.training)

    def forward(self, x: Tensor, guidance: Tensor | None = None, channels: Tensor | None = None) -> Tensor:
        """Convolve as ``nn.Conv3d``, and add the convolved ``guidance``, which holds the given ``channels`` of all."""
        y = super().forward(x)
        if guidance is None or channels is None or not guidance.shape[1]:
            return y
        weight = self.guidance[:, channels]
        return y + conv3d(guidance, weight, None, stride=self.stride, padding=self.padding)  # type: ignore[arg-type]


class Stem(nn.Sequential):
    """The first convolution and its normalisation."""

    def forward(self, x: Tensor, *guidance: Tensor) -> Tensor:
        convolution, norm = self
        return norm(convolution(x, *guidance))


class InputBlock(UnetrBasicBlock):
    """MONAI's residual block; guidance, if any, goes into the two convolutions that read the scan."""

    def forward(self, x: Tensor, *guidance: Tensor) -> Tensor:
        if not guidance:
            return super().forward(x)
        block = self.layer
        y = block.conv2(block.lrelu(block.norm1(block.conv1.conv(x, *guidance))))
        # If the width stays the same, MONAI's block has no convolution beside its main path.
        residual = block.norm3(block.conv3.conv(x, *guidance)) if block.downsample else x
        return block.lrelu(block.norm2(y) + residual)
