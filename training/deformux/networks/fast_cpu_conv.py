"""3D convolution and instance norm in float32 on CPUs, faster than PyTorch's own choice.

PyTorch gives a single small volume to its own implementation, which oneDNN beats. With few channels, oneDNN's gradient
of the weights is faster over channels-last memory. PyTorch computes an instance norm as a batch norm of a view, several
times as slow as the same group norm; with gradients both take as long.
``benchmarks/operator/convolution.py`` measures all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

__all__ = ["Conv3d", "InstanceNorm3d", "adopt", "conv3d"]

# Up to this many elements per row of a single volume, PyTorch does not ask oneDNN (torch 2.15, use_mkldnn).
_SMALL = 20_480
# Up to this many channels, channels-last memory pays for the gradient of the weights, copies included.
_FEW_CHANNELS = 32


def conv3d(x: Tensor, weight: Tensor, bias: Tensor | None, *, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """Compute ``torch.nn.functional.conv3d`` of ``(N, C, D, H, W)``, equal up to rounding; differentiable once."""
    if not _applies(x, weight):
        return F.conv3d(x, weight, bias, stride, padding)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _Convolution.apply(x, weight, bias, tuple(stride), tuple(padding))
    return _forward(x, weight, bias, stride, padding)


class Conv3d(nn.Conv3d):
    """``nn.Conv3d`` by ``conv3d``, with the same state dict."""

    def forward(self, x: Tensor) -> Tensor:
        return conv3d(x, self.weight, self.bias, stride=self.stride, padding=self.padding)  # type: ignore[arg-type]


class InstanceNorm3d(nn.InstanceNorm3d):
    """``nn.InstanceNorm3d``, without gradients a group norm of one channel per group, equal up to rounding."""

    def forward(self, x: Tensor) -> Tensor:
        learns = torch.is_grad_enabled() and (self.affine or x.requires_grad)
        several_voxels = x.ndim == 5 and x.numel() > x.shape[0] * x.shape[1]
        if learns or self.track_running_stats or not several_voxels or not _is_float32_on_cpu(x):
            return super().forward(x)
        # Over channels-last memory PyTorch computes the variance as a difference of sums, which loses digits.
        return F.group_norm(x.contiguous(), self.num_features, self.weight, self.bias, self.eps)


def adopt(module: nn.Module) -> None:
    """Make every ordinary convolution and instance norm inside a module one of those above, in place."""
    # MONAI's blocks do not take a class for them. Their parameters stay the same.
    for inner in module.modules():
        if type(inner) is nn.Conv3d and inner.groups == 1 and set(inner.dilation) == {1}:
            inner.__class__ = Conv3d
        elif type(inner) is nn.InstanceNorm3d:
            inner.__class__ = InstanceNorm3d


def _applies(x: Tensor, weight: Tensor) -> bool:
    return (
        _is_float32_on_cpu(x)
        and weight.dtype == torch.float32
        # A 1×1×1 convolution is a matrix product already.
        and set(weight.shape[2:]) != {1}
        and torch.backends.mkldnn.is_available()
    )


def _is_float32_on_cpu(x: Tensor) -> bool:
    if torch.compiler.is_compiling():
        # The compiler chooses.
        return False
    return (
        # A fake tensor, used to count shapes and costs, has a device but no storage on it.
        x.untyped_storage().device.type == "cpu"
        and x.dtype == torch.float32
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
    )


def _is_small(x: Tensor) -> bool:
    return len(x) == 1 and x.numel() <= _SMALL * x.shape[-1]


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    if _is_small(x):
        # PyTorch passes a tensor in oneDNN's layout to oneDNN only.
        return F.conv3d(x.contiguous().to_mkldnn(), weight, bias, stride, padding).to_dense()
    return F.conv3d(x, weight, bias, stride, padding)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...], padding: tuple[int, ...]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding, ctx.has_bias = stride, padding, bias is not None
        return _forward(x, weight, bias, stride, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if _is_small(x):
            x, grad = (t.contiguous().to_mkldnn() for t in (x, grad))
        elif min(weight.shape[:2]) <= _FEW_CHANNELS:
            x, grad = (t.contiguous(memory_format=torch.channels_last_3d) for t in (x, grad))
        gradients = torch.ops.aten.convolution_backward(
            grad,
            x,
            weight,
            [len(weight)] if ctx.has_bias else None,
            ctx.stride,
            ctx.padding,
            (1, 1, 1),  # dilation
            False,  # not transposed
            (0, 0, 0),  # output padding
            1,  # groups
            ctx.needs_input_grad[:3],
        )
        # None if no gradient is needed.
        return *(t.to_dense() if t is not None and t.is_mkldnn else t for t in gradients), None, None
