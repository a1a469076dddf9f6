"""`deform_conv3d`: the contract, argument normalisation and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _autograd  # noqa: F401  (registers the operators)
from ._checks import triple
from ._dispatch import check_backend

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

    Samples are trilinear and zero outside the volume. A sampling position that is not finite contributes nothing.
    Groups follow from the weight's shape and offset groups from the offset's. Depthwise convolution
    (``groups == C_in == C_out``, one offset group) is the fast path; channels-last input
    (``torch.channels_last_3d``) is read without a copy and gives channels-last output.

    Args:
        input: (N, C_in, D, H, W), any floating dtype; half types accumulate in float32.
        offset: (N, 3 * offset_groups * kD*kH*kW, D_out, H_out, W_out), in input voxels: per offset group, per tap in
            raster order, the shift along (d, h, w).
        weight: (C_out, C_in / groups, kD, kH, kW).
        bias: (C_out,).
        stride: voxels between output positions, one integer or (d, h, w).
        padding: voxels of zeros around the volume, one integer or (d, h, w).
        dilation: voxels between kernel taps, one integer or (d, h, w).
        mask: (N, offset_groups * kD*kH*kW, D_out, H_out, W_out), a factor for each sample (modulation).
        backend: "cpu" (Numba), "cuda" or "reference" (plain PyTorch); None takes the environment variable
            DEFORM3D_BACKEND or else the fastest that can run.

    Returns:
        (N, C_out, D_out, H_out, W_out) in the input's dtype.

    Raises:
        ValueError: shapes, devices or the offset's size do not fit; the message has got and expected.
        TypeError: the dtypes differ or are not floating point.
        RuntimeError: the backend asked for cannot run here, or a gradient is differentiated a second time.

    Source: Dai et al., Deformable Convolutional Networks, ICCV 2017, section 2.1; the mask is Zhu et al., Deformable
    ConvNets v2, CVPR 2019, section 3.2; depthwise in 3D is Lee et al., DeformUX-Net, arXiv 2310.00199, section 3.
    """
    check_backend(backend, "backend")
    return torch.ops.deform3d.deform_conv3d(
        input,
        offset,
        weight,
        bias,
        mask,
        triple(stride, "stride"),
        triple(padding, "padding"),
        triple(dilation, "dilation"),
        backend,
    )
