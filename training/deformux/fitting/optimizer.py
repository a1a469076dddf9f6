"""Optimizer, learning rate schedule, moving average and precision of a recipe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from monai.optimizers import WarmupCosineSchedule
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from deformux.fitting.recipe import Recipe
from deformux.networks.precision import mixed_precision

__all__ = ["MixedPrecision", "make_average", "make_optimizer", "make_schedule"]

# The weights of the guidance begin at zero beside others that may be trained, and few steps update them.
_GUIDANCE_RATE = 5.0


class MixedPrecision(nn.Module):
    """The network under autocast with float32 logits: MONAI's own ``amp`` knows CUDA only."""

    def __init__(self, network: Callable[..., Tensor], enabled: bool) -> None:
        super().__init__()
        self.network = network
        self.enabled = enabled

    def forward(self, x: Tensor, *guidance: Tensor) -> Tensor:
        if not self.enabled:
            return self.network(x, *guidance)
        with mixed_precision(x.device):
            logits = self.network(x, *guidance)
        return logits.float()


def make_optimizer(network: nn.Module, recipe: Recipe) -> AdamW:
    """Return AdamW with the recipe's numbers; weights of guidance learn five times as fast as the others."""
    parts: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for name, value in network.named_parameters():
        parts[name.endswith(".guidance")].append(value)
    groups: list[dict[str, Any]] = [{"params": parts[False]}]
    if parts[True]:
        groups.append({"params": parts[True], "lr": _GUIDANCE_RATE * recipe.learning_rate})
    return AdamW(
        groups,
        lr=recipe.learning_rate,
        betas=recipe.betas,
        eps=recipe.eps,
        weight_decay=recipe.weight_decay,
        fused=True,
    )


def make_schedule(optimizer: Optimizer, recipe: Recipe, *, steps: int) -> LRScheduler | ReduceLROnPlateau | None:
    """Return the schedule of the learning rate over ``steps``; None if it is constant."""
    if recipe.schedule == "one_cycle":
        return OneCycleLR(optimizer, [group["lr"] for group in optimizer.param_groups], total_steps=steps)
    if recipe.schedule == "cosine":
        return WarmupCosineSchedule(optimizer, warmup_steps=max(1, steps // 20), t_total=steps)
    if recipe.schedule == "plateau":
        return ReduceLROnPlateau(optimizer, factor=0.9, patience=10)
    return None


def make_average(network: nn.Module, recipe: Recipe) -> AveragedModel | None:
    """Return the moving average of the weights, from the first step on; None if the recipe has none."""
    if recipe.ema_decay is None:
        return None
    # All tensors at once: two launches for each tensor would be a third of a step's launches on a GPU.
    return AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema_decay))
