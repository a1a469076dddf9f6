"""The layer of DeformUX-Net, 3×3×3 with padding 1, and its results on the GPU and by the oracle."""

from collections.abc import Sequence

import torch
from torch import Tensor

from deform3d import deform_conv3d
from tolerances import assert_near

Layer = dict[str, Tensor]


def off_the_kinks(offset: Tensor) -> Tensor:
    """Round in place to odd multiples of 1/32, which every dtype holds.

    At integer positions the sample has no derivative, and the rounding of positions close to them depends on the dtype.
    """
    return offset.mul_(16).floor_().add_(0.5).div_(16)


def make_layer(
    channels: int,
    size: Sequence[int],
    *,
    batch: int = 2,
    spread: float = 1.0,
    dtype: torch.dtype = torch.float32,
    layout: torch.memory_format = torch.channels_last_3d,
    dense: bool = False,
    seed: int = 0,
) -> Layer:
    """Return arguments on the CPU, rounded to `dtype`; offsets are normal with deviation `spread`."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "input": random(batch, channels, *size).to(dtype, memory_format=layout),
        "offset": off_the_kinks(spread * random(batch, 81, *size)).to(dtype, memory_format=layout),
        "weight": random(channels, channels if dense else 1, 3, 3, 3).to(dtype),
        "bias": random(channels).to(dtype),
    }


def make_grad(layer: Layer, seed: int = 1) -> Tensor:
    """Return a gradient of the layer's output."""
    grad = torch.randn(layer["input"].shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return grad.to(layer["input"]).contiguous(memory_format=torch.channels_last_3d)


def leaves_on(device: str | torch.device, layer: Layer) -> Layer:
    """Return copies that require gradients, in the same layout."""
    return {name: tensor.to(device, copy=True).requires_grad_() for name, tensor in layer.items()}


def run(leaves: Layer, grad: Tensor, backend: str = "cuda") -> Layer:
    """Return the output, and the gradients of sum(grad * output)."""
    output = deform_conv3d(*leaves.values(), padding=1, backend=backend)
    gradients = torch.autograd.grad(output, list(leaves.values()), grad)
    return {"output": output, **dict(zip(leaves, gradients, strict=True))}


def oracle(layer: Layer, grad: Tensor) -> Layer:
    """Return the same from the float64 reference on the CPU."""
    return run(
        leaves_on("cpu", {name: t.cpu().double() for name, t in layer.items()}), grad.cpu().double(), "reference"
    )


def assert_all_near(actual: Layer, expected: Layer) -> None:
    """Compare within the tolerances of the actual results' dtype."""
    for name, tensor in expected.items():
        assert_near(actual[name].detach(), tensor.detach(), name)
