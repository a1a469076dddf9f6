"""The public functions: their contract and the normalisation of their arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ._autograd import FUSED_OFFSET, OPERATOR
from ._checks import per_axis
from ._dispatch import can_fuse, check_backend

_Size = int | Sequence[int]


def deform_conv3d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Size = 1,
    padding: _Size = 0,
    dilation: _Size = 1,
    *,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Convolve a volume, sampling each kernel tap at its own shifted position: the 3D `torchvision.ops.deform_conv2d`.

    Samples are trilinear and zero outside the volume; a position that is not finite contributes nothing. Groups follow
    from the weight's shape, offset groups from the offset's. Depthwise convolution (``groups == C_in == C_out``, one
    offset group) is the fast path. Channels-last input is read without a copy and gives channels-last output.

    Args:
        input: (N, C_in, D, H, W), any floating dtype; half types accumulate in float32, except the eight corners of a
            float16 sample on CUDA.
        offset: (N, 3 * offset_groups * kD*kH*kW, D_out, H_out, W_out), in input voxels: per offset group, per tap in
            raster order, the shift along (d, h, w).
        weight: (C_out, C_in / groups, kD, kH, kW).
        bias: (C_out,).
        stride, padding, dilation: voxels, one integer or (d, h, w), as in `torch.nn.functional.conv3d`.
        mask: (N, offset_groups * kD*kH*kW, D_out, H_out, W_out), a factor for each sample (modulation).
        backend: "cpu" (Numba), "cuda" or "reference" (plain PyTorch); by default the environment variable
            DEFORM3D_BACKEND or else the fastest that can run.

    Returns:
        (N, C_out, D_out, H_out, W_out) in the input's dtype.

    Raises:
        ValueError: shapes, devices or the offset's size do not match; the message says what was got and expected.
        TypeError: the dtypes differ or are not floating point.
        RuntimeError: the requested backend cannot run here, or a gradient is differentiated a second time.

    Examples:
        >>> import torch
        >>> from deform3d import deform_conv3d
        >>> volume = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 1, 4)
        >>> offset = torch.tensor([0.0, 0.0, 0.5]).reshape(1, 3, 1, 1, 1).expand(1, 3, 1, 1, 4)  # along w
        >>> deform_conv3d(volume, offset, torch.ones(1, 1, 1, 1, 1)).flatten()
        tensor([1.5000, 2.5000, 3.5000, 2.0000])

    Source: Dai et al., Deformable Convolutional Networks, ICCV 2017, section 2.1; the mask is Zhu et al., Deformable
    ConvNets v2, CVPR 2019, section 3.2; depthwise in 3D is Lee et al., DeformUX-Net, arXiv 2310.00199, section 3.
    """
    check_backend(backend, "backend")
    return OPERATOR(
        input,
        offset,
        weight,
        bias,
        mask,
        per_axis(stride, "stride"),
        per_axis(padding, "padding"),
        per_axis(dilation, "dilation"),
        backend,
    )


def deform_conv3d_fused_offset(
    input: Tensor,
    offset_weight: Tensor,
    offset_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Convolve a volume with offsets from a 1x1x1 convolution of itself, without storing them where memory is short.

    Equals ``deform_conv3d(input, conv3d(input, offset_weight, offset_bias), weight, bias, padding=kernel // 2)``. The
    two convolutions run one after the other if there is memory for the offsets, because that is faster. On a GPU,
    outside of training and for a depthwise 3x3x3 weight, if the offsets would take more than half of the free memory,
    the kernel computes them for a few voxels at a time instead, which saves 81 channels.

    Args:
        input: (N, C, D, H, W), any floating dtype.
        offset_weight: (3 * kD*kH*kW, C, 1, 1, 1), in the order of `deform_conv3d`'s offsets.
        offset_bias: (3 * kD*kH*kW,), or None.
        weight: (C_out, C / groups, kD, kH, kW) with odd sizes.
        bias: (C_out,), or None.
        backend: as in `deform_conv3d`.

    Returns:
        (N, C_out, D, H, W) in the input's dtype.

    Raises:
        ValueError, TypeError, RuntimeError: as `deform_conv3d`.

    Source: the offset branch of Lee et al., DeformUX-Net, arXiv 2310.00199, section 3.2.
    """
    check_backend(backend, "backend")
    tensors = (input, offset_weight, offset_bias, weight, bias)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if not needs_grad and can_fuse(input, weight, backend):
        return FUSED_OFFSET(*tensors)
    padding = tuple(length // 2 for length in weight.shape[2:])
    return deform_conv3d(
        input, F.conv3d(input, offset_weight, offset_bias), weight, bias, padding=padding, backend=backend
    )
