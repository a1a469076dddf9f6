"""A launch that is chosen once for a kind of call and started with the addresses of each."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .plan import Kernel, Runtime, _vectors


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


def loaded_at_once(channels: int, dtype: torch.dtype, addresses: int, most: int) -> int:
    """Return how many channels of tensors can be loaded at once, at most `most`: a divisor of them.

    Args:
        channels: of a voxel.
        dtype: of the tensors.
        addresses: of their first elements, or-ed together; the last four bits are enough.
        most: what the kernel has registers for.
    """
    return next(n for n in _vectors(dtype) if n <= most and channels % n == 0 and addresses % (n * dtype.itemsize) == 0)
