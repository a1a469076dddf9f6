"""One call of the operator as a value, of which tests change a part before they run it."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from deform3d import deform_conv3d

NAMES = ("input", "offset", "weight", "bias", "mask")


@dataclass(frozen=True)
class Problem:
    """Arguments of one call."""

    input: Tensor
    offset: Tensor
    weight: Tensor
    bias: Tensor | None
    mask: Tensor | None
    options: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in NAMES if getattr(self, name) is not None}

    def map(self, change: Callable[[Tensor], Tensor]) -> "Problem":
        return replace(self, **{name: change(tensor) for name, tensor in self.tensors().items()})

    def oracle(self) -> "Problem":
        """Return the same numbers for the float64 reference on the CPU, wherever the test runs."""
        return self.map(lambda tensor: tensor.detach().double().cpu())

    def run(self, **more: Any) -> Tensor:
        options = {"mask": self.mask, **self.options, **more}
        return deform_conv3d(self.input, self.offset, self.weight, self.bias, **options)

    def run_with_gradients(self, **more: Any) -> dict[str, Tensor]:
        """Return the output and the gradients of a fixed random projection of it, by name."""
        leaves = self.map(lambda tensor: tensor.detach().requires_grad_())
        output = leaves.run(**more)
        wanted = leaves.tensors()
        gradients = torch.autograd.grad(output, list(wanted.values()), direction_like(output))
        return {"output": output.detach(), **dict(zip(wanted, gradients, strict=True))}


def direction_like(output: Tensor) -> Tensor:
    """Return fixed random numbers that every dtype can hold."""
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    return direction.bfloat16().half().to(output)
