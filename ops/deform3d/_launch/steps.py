"""A launch that is planned once for a kind of call and started with the addresses of each call."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .plan import Kernel, Runtime


class Step(NamedTuple):
    """A launch without the addresses, which precede all other arguments."""

    kernel: Kernel
    grid: int
    block: tuple[int, int]
    shared_bytes: int
    numbers: tuple[int, ...]

    def start(self, runtime: Runtime, device: torch.device, *addresses: int) -> None:
        """Start the launch; 0 is the address of a missing tensor."""
        runtime.launch(device, self.kernel, self.grid, self.block, self.shared_bytes, (*addresses, *self.numbers))
