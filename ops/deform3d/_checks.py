"""The checks of the operator's arguments: each error says what was given, what was expected and what to do."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

AXES = ("d", "h", "w")


def per_axis(value: int | Sequence[int], name: str) -> tuple[int, int, int]:
    """Return `value` as one integer per spatial axis (d, h, w); a single integer applies to all three."""
    if type(value) is int:
        return value, value, value
    values = tuple(value) if isinstance(value, Sequence) else (value,) * 3
    try:
        integers = tuple(operator.index(v) for v in values)
    except TypeError:
        integers = ()
    if len(integers) != 3:
        raise ValueError(f"{name}: got {value!r}, expected one integer or three integers (d, h, w).")
    return integers[0], integers[1], integers[2]


@dataclass(frozen=True)
class Geometry:
    """The checked sizes of one call; `out` and `kernel` are per axis (d, h, w)."""

    batch: int
    in_channels: int
    out_channels: int
    size: tuple[int, int, int]
    out: tuple[int, int, int]
    kernel: tuple[int, int, int]
    stride: tuple[int, int, int]
    padding: tuple[int, int, int]
    dilation: tuple[int, int, int]
    groups: int
    offset_groups: int

    def __hash__(self) -> int:
        # Plans are cached by geometry: hashing these fields at every call would cost more than the look-up.
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, entry.name) for entry in fields(self)))

    @functools.cached_property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1] * self.kernel[2]

    @functools.cached_property
    def sampled_together(self) -> int:
        """Return the number of channels that share their sampling positions: those of one offset group."""
        return self.in_channels // self.offset_groups

    @functools.cached_property
    def voxels(self) -> int:
        """Return the number of input voxels per sample."""
        return self.size[0] * self.size[1] * self.size[2]

    @functools.cached_property
    def out_voxels(self) -> int:
        """Return the number of output voxels per sample."""
        return self.out[0] * self.out[1] * self.out[2]

    @functools.cached_property
    def out_shape(self) -> tuple[int, int, int, int, int]:
        """Return (N, C_out, D_out, H_out, W_out)."""
        return self.batch, self.out_channels, *self.out

    @functools.cached_property
    def depthwise(self) -> bool:
        """Return whether each channel has its own weights and all share their sampling positions: the fast path."""
        return self.groups == self.in_channels == self.out_channels and self.offset_groups == 1


def check(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Geometry:
    """Check one call and return its sizes; raise ValueError (shapes, devices) or TypeError (dtypes)."""
    _check_tensors(input=input, offset=offset, weight=weight, bias=bias, mask=mask)
    shapes = (
        input.shape,
        offset.shape,
        weight.shape,
        None if bias is None else bias.shape,
        None if mask is None else mask.shape,
    )
    convolution = tuple(stride), tuple(padding), tuple(dilation)
    try:
        return _geometry(*shapes, *convolution)
    except TypeError:  # a compiler's symbolic sizes are not hashable
        return _geometry.__wrapped__(*shapes, *convolution)


@functools.lru_cache(maxsize=1024)
def _geometry(
    input: torch.Size,
    offset: torch.Size,
    weight: torch.Size,
    bias: torch.Size | None,
    mask: torch.Size | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Geometry:
    """Return the sizes of a call with tensors of these shapes; raise ValueError if they do not fit together."""
    batch, in_channels, *size = input
    out_channels, group_channels, *kernel = weight
    if in_channels < 1 or min(size) < 1:
        raise ValueError(f"input: got shape {tuple(input)}, expected at least one channel and one voxel per axis.")
    if min(weight) < 1:
        raise ValueError(f"weight: got shape {tuple(weight)}, expected no size of zero.")
    if in_channels % group_channels:
        raise ValueError(
            f"weight: got {group_channels} input channels per group, expected a divisor of the input's {in_channels}."
        )
    groups = in_channels // group_channels
    if out_channels % groups:
        raise ValueError(
            f"weight: got {out_channels} output channels, expected a multiple of the {groups} groups "
            f"({in_channels} input channels / {group_channels} per group)."
        )
    if bias is not None and bias[0] != out_channels:
        raise ValueError(f"bias: got shape {tuple(bias)}, expected ({out_channels},), one per output channel.")
    for name, values, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if len(values) != 3 or min(values) < least:
            raise ValueError(f"{name}: got {tuple(values)}, expected three integers of at least {least}.")

    out = _output_size(size, kernel, stride, padding, dilation)
    taps = kernel[0] * kernel[1] * kernel[2]
    offset_channels = offset[1]
    offset_groups = _offset_groups(offset_channels, taps, in_channels)
    if offset[0] != batch or offset[2:] != (*out,):
        raise ValueError(
            f"offset: got shape {tuple(offset)}, expected {(batch, offset_channels, *out)}: the input's batch size "
            f"and the output's spatial size."
        )
    if mask is not None and mask != (batch, offset_groups * taps, *out):
        raise ValueError(
            f"mask: got shape {tuple(mask)}, expected {(batch, offset_groups * taps, *out)}: one value per "
            f"offset group, tap and output voxel."
        )
    return Geometry(
        batch=batch,
        in_channels=in_channels,
        out_channels=out_channels,
        size=(size[0], size[1], size[2]),
        out=(out[0], out[1], out[2]),
        kernel=(kernel[0], kernel[1], kernel[2]),
        stride=(stride[0], stride[1], stride[2]),
        padding=(padding[0], padding[1], padding[2]),
        dilation=(dilation[0], dilation[1], dilation[2]),
        groups=groups,
        offset_groups=offset_groups,
    )


def _output_size(
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Return the spatial size of the output; raise ValueError if an axis of the input is too short."""
    out = [(size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(3)]
    for i, axis in enumerate(AXES):
        if out[i] < 1:
            raise ValueError(
                f"input: got size {size[i]} with padding {padding[i]} along {axis}, expected at least the kernel's "
                f"reach of {dilation[i] * (kernel[i] - 1) + 1}; enlarge the padding or the input."
            )
    return out


def _offset_groups(offset_channels: int, taps: int, in_channels: int) -> int:
    """Return the number of offset groups; raise ValueError if the offset's channels do not fit."""
    offset_groups = offset_channels // (3 * taps)
    if offset_groups < 1 or offset_channels % (3 * taps) or in_channels % offset_groups:
        raise ValueError(
            f"offset: got {offset_channels} channels, expected 3 * offset_groups * {taps} (three axes, "
            f"{taps} kernel taps) with offset_groups dividing the input's {in_channels} channels, such as {3 * taps}."
        )
    return offset_groups


def check_fused_offset(
    input: Tensor, offset_weight: Tensor, offset_bias: Tensor | None, weight: Tensor, bias: Tensor | None
) -> Geometry:
    """Check one call whose offsets come from a 1x1x1 convolution of the input; raise as `check` does."""
    _check_tensors(input=input, offset_weight=offset_weight, offset_bias=offset_bias, weight=weight, bias=bias)
    kernel = weight.shape[2:]
    if any(length % 2 == 0 for length in kernel):
        raise ValueError(f"weight: got kernel size {tuple(kernel)}, expected odd sizes, which keep the volume's size.")
    channels = 3 * kernel.numel()
    expected = (channels, input.shape[1], 1, 1, 1)
    if offset_weight.shape != expected:
        raise ValueError(
            f"offset_weight: got shape {_shape(offset_weight)}, expected {expected}: a 1x1x1 convolution with one "
            f"output channel per axis and tap."
        )
    if offset_bias is not None and offset_bias.shape[0] != channels:
        raise ValueError(f"offset_bias: got shape {_shape(offset_bias)}, expected ({channels},).")
    stand_in = input.new_empty(1).expand(input.shape[0], channels, *input.shape[2:])
    return check(input, stand_in, weight, bias, None, (1, 1, 1), tuple(length // 2 for length in kernel), (1, 1, 1))


def _check_tensors(**tensors: Tensor | None) -> None:
    """Raise if the device, dtype or number of dimensions of a tensor does not match; `input` comes first."""
    input = tensors["input"]
    assert input is not None
    dtype, device, floating = input.dtype, input.device, input.dtype.is_floating_point
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if floating and tensor.dtype == dtype and tensor.device == device and tensor.dim() == _dims(name):
            continue
        _refuse(name, tensor, input)


def _refuse(name: str, tensor: Tensor, input: Tensor) -> None:
    """Raise an error that says how a tensor does not match the input."""
    if tensor.device != input.device:
        raise ValueError(
            f"{name}: got device {tensor.device}, expected {input.device} as input; move all tensors to one device."
        )
    if not tensor.dtype.is_floating_point or tensor.dtype != input.dtype:
        expected = "a floating-point dtype" if tensor is input else f"{input.dtype} as input"
        raise TypeError(f"{name}: got dtype {tensor.dtype}, expected {expected}; convert it or use autocast.")
    raise ValueError(f"{name}: got {tensor.dim()} dimensions {_shape(tensor)}, expected {_dims(name)}{_LAYOUT[name]}.")


def _dims(name: str) -> int:
    return 1 if name.endswith("bias") else 5


_LAYOUT = {
    "input": " (N, C_in, D, H, W)",
    "offset": " (N, 3 * offset_groups * taps, D_out, H_out, W_out)",
    "weight": " (C_out, C_in / groups, kD, kH, kW)",
    "bias": " (C_out,)",
    "offset_weight": " (3 * taps, C_in, 1, 1, 1)",
    "offset_bias": " (3 * taps,)",
    "mask": " (N, offset_groups * taps, D_out, H_out, W_out)",
}


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
