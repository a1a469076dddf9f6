"""A launch that is chosen once for a kind of call and started with the addresses of each."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .plan import Kernel, Runtime


class Step(NamedTuple):
    """A launch without its addresses, which come before all other arguments."""

    kernel: Kernel
    grid: int
    block: tuple[int, int]
    shared_bytes: int
    numbers: tuple[int, ...]

    def start(self, runtime: Runtime, device: torch.device, *addresses: int) -> None:
        """Start it; 0 is the address of a tensor that is not there."""
        runtime.launch(device, self.kernel, self.grid, self.block, self.shared_bytes, (*addresses, *self.numbers))
