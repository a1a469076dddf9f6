"""Registration with PyTorch: forward, backward and fused operators with fakes, autograd and autocast."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._checks import Geometry, check, check_fused_offset
from ._dispatch import choose_backend

# `Library.define` and `impl` rather than `custom_op`, whose wrapper takes longer than the smallest kernels.
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

OPERATOR = torch.ops.deform3d.deform_conv3d.default
BACKWARD = torch.ops.deform3d.deform_conv3d_backward.default
FUSED_OFFSET = torch.ops.deform3d.deform_conv3d_fused_offset.default

_Key = torch._C.DispatchKey
_BACKEND_KEYS = (_Key.CPU, _Key.CUDA)

_Triple = Sequence[int]


def _format_of(tensor: Tensor) -> torch.memory_format:
    """Return the layout of an output for `tensor`: channels-last stays channels-last, anything else is contiguous."""
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
    return _convolve(input, offset, weight, bias, mask, geometry, backend)


def _convolve(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    geometry: Geometry,
    backend: str | None,
) -> Tensor:
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
    backend: str | None,  # noqa: ARG001 - part of the operator's signature
) -> Tensor:
    geometry = check(input, offset, weight, bias, mask, stride, padding, dilation)
    return torch.empty(geometry.out_shape, dtype=input.dtype, device=input.device, memory_format=_format_of(input))


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
    geometry = check(input, offset, weight, None, mask, stride, padding, dilation)
    _check_grad(grad, input, geometry)
    gradients = _gradients(grad, input, offset, weight, mask, geometry, backend, needs)
    # An operator cannot return None for a gradient that is not needed.
    return tuple(input.new_empty((0,)) if gradient is None else gradient for gradient in gradients)


def _gradients(
    grad: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    geometry: Geometry,
    backend: str | None,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    gradients = _module(input, backend).backward(grad, input, offset, weight, mask, geometry, needs)
    formats = _gradient_formats(input, offset, mask)
    return [
        None if gradient is None else gradient.contiguous(memory_format=layout)
        for gradient, layout in zip(gradients, formats, strict=True)
    ]


def _backward_fake(
    grad: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    stride: _Triple,
    padding: _Triple,
    dilation: _Triple,
    backend: str | None,  # noqa: ARG001 - part of the operator's signature
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    geometry = check(input, offset, weight, None, mask, stride, padding, dilation)
    _check_grad(grad, input, geometry)
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


def _check_grad(grad: Tensor, input: Tensor, geometry: Geometry) -> None:
    shape = geometry.out_shape
    if grad.shape != shape or grad.dtype != input.dtype or grad.device != input.device:
        raise ValueError(
            f"grad: got shape {tuple(grad.shape)}, {grad.dtype} on {grad.device}, "
            f"expected {shape}, {input.dtype} on {input.device}."
        )


def _gradient_formats(input: Tensor, offset: Tensor, mask: Tensor | None) -> tuple[torch.memory_format, ...]:
    plain = torch.contiguous_format
    return _format_of(input), _format_of(offset), plain, plain, plain if mask is None else _format_of(mask)


def _module(input: Tensor, backend: str | None) -> Any:
    return _imported(choose_backend(input.device, input.dtype, backend))


@functools.cache
def _imported(backend: str) -> Any:
    # The libraries of the backends are large, or missing: a module is imported when it is first used.
    return reference if backend == "reference" else importlib.import_module(f"deform3d.{backend}")


def _with_autograd(keys: torch._C.DispatchKeySet, *arguments: Any) -> Tensor:
    """Run the forward pass, and record it if a gradient may be needed.

    `torch.library.register_autograd` does the same for any operator, but takes longer than the smallest kernels. If the
    next in line is a backend, and not a mode or a subclass, this calls it directly.
    """
    below = keys & torch._C._after_autograd_keyset
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in arguments[:5]):
        return _Convolution.apply(below, *arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return _forward(*arguments) if _is_direct(below) else OPERATOR.redispatch(below, *arguments)


def _is_direct(keys: torch._C.DispatchKeySet) -> bool:
    """Return whether the dispatcher would choose `_forward` next."""
    return keys.highestPriorityTypeId() in _BACKEND_KEYS


class _Convolution(torch.autograd.Function):
    """The operator in a recorded graph."""

    @staticmethod
    def forward(ctx: Any, keys: torch._C.DispatchKeySet, *arguments: Any) -> Tensor:
        input, offset, weight, bias, mask, *options = arguments
        ctx.save_for_backward(input, offset, weight, mask)
        ctx.options = options
        with torch._C._AutoDispatchBelowAutograd():
            if not _is_direct(keys):
                ctx.geometry = None
                return OPERATOR.redispatch(keys, *arguments)
            *convolution, backend = options
            ctx.geometry = check(input, offset, weight, bias, mask, *convolution)
            return _convolve(input, offset, weight, bias, mask, ctx.geometry, backend)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[1:6]
        # Treat subclasses with behaviour of their own, such as MONAI's MetaTensor, as plain tensors.
        with torch._C.DisableTorchFunctionSubclass():
            input, offset, weight, mask = ctx.saved_tensors
            gradients: Sequence[Tensor | None]
            if ctx.geometry is not None and _is_plain(grad):
                _check_grad(grad, input, ctx.geometry)
                gradients = _gradients(grad, input, offset, weight, mask, ctx.geometry, ctx.options[-1], needs)
            else:
                gradients = BACKWARD(grad, input, offset, weight, mask, *ctx.options, list(needs))
                gradients = [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]
        return None, *gradients, None, None, None, None


def _is_plain(grad: Tensor) -> bool:
    """Return whether nothing observes the call of the backward operator: no mode, profiler or second backward."""
    keys = (torch._C._dispatch_keys(grad) & torch._C._after_autograd_keyset).remove(_Key.ADInplaceOrView)
    return _is_direct(keys) and not (
        torch.is_grad_enabled()
        or torch._C._len_torch_dispatch_stack()
        or torch.is_autocast_enabled(grad.device.type)
        or torch.autograd._profiler_enabled()
    )


def _refuse_second_backward(_ctx: Any, *_grads: Tensor) -> tuple[None, ...]:
    raise RuntimeError(
        "deform_conv3d: got a second backward, expected at most one: its gradients cannot be differentiated again; "
        "drop create_graph=True, or use deform3d.reference.forward, which autograd can differentiate any number of "
        "times."
    )


def _autocast(device_type: str, operator: Any) -> Callable[..., Tensor]:
    """Return a version that computes in float32 and returns the input's dtype, like torchvision's deform_conv2d."""
    casts = _autocast_keys(device_type)

    def run(input: Tensor, *others: Any) -> Tensor:
        dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
        arguments = [a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in (input, *others)]
        with torch._C._ExcludeDispatchKeyGuard(casts):
            return operator(*arguments).to(input.dtype)

    return run


def _autocast_backward(device_type: str) -> Callable[..., tuple[Tensor, ...]]:
    """Return a version without autocast: the forward has already cast, and the reference must not cast again."""
    casts = _autocast_keys(device_type)

    def run(*arguments: Any) -> tuple[Tensor, ...]:
        with torch._C._ExcludeDispatchKeyGuard(casts):
            return BACKWARD(*arguments)

    return run


def _autocast_keys(device_type: str) -> torch._C.DispatchKeySet:
    """Return what `torch.autocast(device_type, enabled=False)` excludes; entering that takes longer than a kernel."""
    return torch._C.DispatchKeySet(getattr(_Key, f"Autocast{device_type.upper()}"))


for _name in ("CPU", "CUDA"):
    _LIBRARY.impl("deform_conv3d", _forward, _name)
    _LIBRARY.impl("deform_conv3d_backward", _backward, _name)
    _LIBRARY.impl("deform_conv3d", _autocast(_name.lower(), OPERATOR), f"Autocast{_name}")
    _LIBRARY.impl("deform_conv3d_backward", _autocast_backward(_name.lower()), f"Autocast{_name}")
_LIBRARY.impl("deform_conv3d_fused_offset", _fused, "CUDA")
_LIBRARY.impl("deform_conv3d_fused_offset", _autocast("cuda", FUSED_OFFSET), "AutocastCUDA")
_LIBRARY.impl("deform_conv3d", _with_autograd, "Autograd", with_keyset=True)
torch.library.register_fake("deform3d::deform_conv3d_fused_offset", _fused_fake, lib=_LIBRARY)
torch.library.register_fake("deform3d::deform_conv3d", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("deform3d::deform_conv3d_backward", _backward_fake, lib=_LIBRARY)
torch.library.register_autograd("deform3d::deform_conv3d_backward", _refuse_second_backward, lib=_LIBRARY)
