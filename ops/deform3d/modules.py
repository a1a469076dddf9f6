"""`DeformConv3d`: a deformable convolution layer with its parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ._checks import per_axis
from .functional import deform_conv3d


class DeformConv3d(nn.Module):
    """3D deformable convolution layer: `deform_conv3d` with learned weight and bias; the caller supplies the offsets.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: taps along one axis, or along (d, h, w).
        stride: voxels between output positions.
        padding: voxels of zeros around the volume.
        dilation: voxels between kernel taps.
        groups: channel groups; ``groups == in_channels == out_channels`` is the fast depthwise path.
        bias: whether to add a learned bias.
        backend: as in `deform_conv3d`.

    Raises:
        ValueError: the channels are not divisible by the groups, or a size is not positive.

    Initialised as `torch.nn.Conv3d`: uniform within 1 / sqrt(fan in).

    Examples:
        A depthwise layer, with offsets from a 1x1x1 convolution of its input:

        >>> import torch
        >>> from deform3d import DeformConv3d
        >>> layer = DeformConv3d(8, 8, kernel_size=3, padding=1, groups=8)
        >>> make_offset = torch.nn.Conv3d(8, 3 * 27, kernel_size=1)
        >>> x = torch.randn(2, 8, 4, 5, 6)
        >>> layer(x, make_offset(x)).shape
        torch.Size([2, 8, 4, 5, 6])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        *,
        groups: int = 1,
        bias: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.kernel_size = per_axis(kernel_size, "kernel_size")
        if min(in_channels, out_channels, groups, *self.kernel_size) < 1:
            raise ValueError(
                f"DeformConv3d: got in_channels {in_channels}, out_channels {out_channels}, groups {groups}, "
                f"kernel_size {self.kernel_size}, expected positive numbers."
            )
        if in_channels % groups or out_channels % groups:
            raise ValueError(
                f"groups: got {groups}, expected a common divisor of in_channels {in_channels} and "
                f"out_channels {out_channels}."
            )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.stride = per_axis(stride, "stride")
        self.padding = per_axis(padding, "padding")
        self.dilation = per_axis(dilation, "dilation")
        self.groups = groups
        self.backend = backend
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias again."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return (N, out_channels, D_out, H_out, W_out); shapes of `offset` and `mask` as in `deform_conv3d`."""
        return deform_conv3d(
            input,
            offset,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            mask=mask,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}"
        )
