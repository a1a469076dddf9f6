"""A training step of a network on random patches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from deformux.fitting.losses import PartialDiceCELoss

__all__ = ["training_step"]


def training_step(network: nn.Module, batch: int, size: tuple[int, ...]) -> Callable[[], None]:
    """Return a function that takes one step on patches of ``size`` voxels: forward, loss, backward and AdamW."""
    image, label = torch.randn(batch, 1, *size), torch.randint(0, 3, (batch, 1, *size))
    annotated, loss = torch.ones(batch, 3), PartialDiceCELoss()
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)

    def run() -> None:
        network.train()
        optimizer.zero_grad()
        loss(network(image), label, annotated).backward()
        optimizer.step()

    return run
