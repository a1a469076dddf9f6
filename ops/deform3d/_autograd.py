"""The operator as PyTorch sees it: forward, backward and fused ops with fakes, autograd and autocast."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._checks import Geometry, check, check_fused_offset
from ._dispatch import choose_backend

# `Library.define` and `impl` rather than `custom_op`: the wrapper of the latter costs more than the smallest kernels.
_LIBRARY = torch.library.Library("deform3d", "DEF")
_COMMON = "int[3] stride, int[3] padding, int[3] dilation, str? backend"
_LIBRARY.define(
    f"deform_conv3d(Tensor input, Tensor offset, Tensor weight, Tensor? bias, Tensor? mask, {_COMMON}) -> Tensor"
)
_LIBRARY.define(
    "deform_conv3d_backward(Tensor grad, Tensor input, Tensor offset, Tensor weight, Tensor? mask, "
    f"{_COMMON}, bool[5] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "deform_conv3d_fused_offset(Tensor input, Tensor offset_weight, Tensor? offset_bias, Tensor weight, Tensor? bias) "
    "-> Tensor"
)

_Triple = Sequence[int]


def _format_of(tensor: Tensor) -> torch.memory_format:
    """The layout of an output like `tensor`: channels-last stays channels-last, all else is contiguous."""
    if tensor.is_contiguous() or not tensor.is_contiguous(memory_format=torch.channels_last_3d):
        return torch.contiguous_format
    return torch.channels_last_3d


def _forward(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    stride: _Triple,
    padding: _Triple,
    dilation: _Triple,
    backend: str | None,
) -> Tensor:
    geometry = check(input, offset, weight, bias, mask, stride, padding, dilation)
    output = _module(input, backend).forward(input, offset, weight, bias, mask, geometry)
    return output.contiguous(memory_format=_format_of(input))


def _forward_fake(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    stride: _Triple,
    padding: _Triple,
    dilation: _Triple,
    backend: str | None,  # noqa: ARG001 - the operator's own signature
) -> Tensor:
    geometry = check(input, offset, weight, bias, mask, stride, padding, dilation)
    shape = (geometry.batch, geometry.out_channels, *geometry.out)
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=_format_of(input))


def _backward(
    grad: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    stride: _Triple,
    padding: _Triple,
    dilation: _Triple,
    backend: str | None,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    geometry = _check_grad(grad, input, offset, weight, mask, stride, padding, dilation)
    gradients = _module(input, backend).backward(grad, input, offset, weight, mask, geometry, needs)
    formats = _gradient_formats(input, offset, mask)
    return tuple(
        input.new_empty((0,)) if gradient is None else gradient.contiguous(memory_format=layout)
        for gradient, layout in zip(gradients, formats, strict=True)
    )


def _backward_fake(
    grad: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    stride: _Triple,
    padding: _Triple,
    dilation: _Triple,
    backend: str | None,  # noqa: ARG001 - the operator's own signature
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    geometry = _check_grad(grad, input, offset, weight, mask, stride, padding, dilation)
    mask_shape = (0,) if mask is None else mask.shape
    shapes = (input.shape, offset.shape, weight.shape, (geometry.out_channels,), mask_shape)
    formats = _gradient_formats(input, offset, mask)
    return tuple(
        torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=layout)
        if need
        else input.new_empty((0,))
        for need, shape, layout in zip(needs, shapes, formats, strict=True)
    )


def _fused(
    input: Tensor, offset_weight: Tensor, offset_bias: Tensor | None, weight: Tensor, bias: Tensor | None
) -> Tensor:
    geometry = check_fused_offset(input, offset_weight, offset_bias, weight, bias)
    cuda = importlib.import_module("deform3d.cuda")
    output = cuda.forward_fused_offset(input, offset_weight, offset_bias, weight, bias, geometry)
    return output.contiguous(memory_format=_format_of(input))


def _fused_fake(
    input: Tensor, offset_weight: Tensor, offset_bias: Tensor | None, weight: Tensor, bias: Tensor | None
) -> Tensor:
    check_fused_offset(input, offset_weight, offset_bias, weight, bias)
    return torch.empty(input.shape, dtype=input.dtype, device=input.device, memory_format=_format_of(input))


def _check_grad(
    grad: Tensor, input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None, *convolution: _Triple
) -> Geometry:
    geometry = check(input, offset, weight, None, mask, *convolution)
    shape = (geometry.batch, geometry.out_channels, *geometry.out)
    if grad.shape != shape or grad.dtype != input.dtype or grad.device != input.device:
        raise ValueError(
            f"grad: got shape {tuple(grad.shape)}, {grad.dtype} on {grad.device}, "
            f"expected {shape}, {input.dtype} on {input.device}."
        )
    return geometry


def _none_like(input: Tensor) -> Tensor:
    """Stands for a gradient that is not needed: an operator cannot return None."""
    return torch.empty((0,), dtype=input.dtype, device=input.device)


def _gradient_formats(input: Tensor, offset: Tensor, mask: Tensor | None) -> tuple[torch.memory_format, ...]:
    plain = torch.contiguous_format
    return _format_of(input), _format_of(offset), plain, plain, plain if mask is None else _format_of(mask)


def _module(input: Tensor, backend: str | None) -> Any:
    chosen = choose_backend(input.device, input.dtype, backend)
    # The backends' libraries are large, or missing: a module is imported when it is first used.
    return reference if chosen == "reference" else importlib.import_module(f"deform3d.{chosen}")


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001 - called by these names
    input, offset, weight, bias, mask, *ctx.options = inputs
    ctx.save_for_backward(input, offset, weight, mask)
    ctx.has_bias = bias is not None


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:5])
    # Subclasses with behaviour of their own, such as MONAI's MetaTensor, are tensors like any other here.
    with torch._C.DisableTorchFunctionSubclass():
        input, offset, weight, mask = ctx.saved_tensors
        gradients = torch.ops.deform3d.deform_conv3d_backward(grad, input, offset, weight, mask, *ctx.options, needs)
    return *(gradient if need else None for gradient, need in zip(gradients, needs, strict=True)), *(None,) * 4


def _refuse_second_backward(_ctx: Any, *_grads: Tensor) -> tuple[None, ...]:
    raise RuntimeError(
        "deform_conv3d: got a second backward, expected at most one: its gradients cannot be differentiated again; "
        "drop create_graph=True, or use deform3d.reference.forward, which autograd can differentiate any number of "
        "times."
    )


def _autocast(device_type: str, name: str) -> Callable[..., Tensor]:
    """Compute in float32 and answer in the input's dtype, as torchvision's deform_conv2d does under autocast."""

    def run(input: Tensor, *others: Any) -> Tensor:
        dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
        arguments = [a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in (input, *others)]
        with torch.autocast(device_type, enabled=False):
            return getattr(torch.ops.deform3d, name)(*arguments).to(input.dtype)

    return run


def _autocast_backward(device_type: str) -> Callable[..., tuple[Tensor, ...]]:
    """The forward has cast already; keep autocast out of what the reference calls."""

    def run(*arguments: Any) -> tuple[Tensor, ...]:
        with torch.autocast(device_type, enabled=False):
            return torch.ops.deform3d.deform_conv3d_backward(*arguments)

    return run


for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("deform_conv3d", _forward, _key)
    _LIBRARY.impl("deform_conv3d_backward", _backward, _key)
    _LIBRARY.impl("deform_conv3d", _autocast(_key.lower(), "deform_conv3d"), f"Autocast{_key}")
    _LIBRARY.impl("deform_conv3d_backward", _autocast_backward(_key.lower()), f"Autocast{_key}")
_LIBRARY.impl("deform_conv3d_fused_offset", _fused, "CUDA")
_LIBRARY.impl("deform_conv3d_fused_offset", _autocast("cuda", "deform_conv3d_fused_offset"), "AutocastCUDA")
torch.library.register_fake("deform3d::deform_conv3d_fused_offset", _fused_fake, lib=_LIBRARY)
torch.library.register_fake("deform3d::deform_conv3d", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("deform3d::deform_conv3d_backward", _backward_fake, lib=_LIBRARY)
torch.library.register_autograd("deform3d::deform_conv3d", _differentiate, setup_context=_save, lib=_LIBRARY)
torch.library.register_autograd("deform3d::deform_conv3d_backward", _refuse_second_backward, lib=_LIBRARY)
