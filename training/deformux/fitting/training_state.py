"""State that a training carries from one step to the next, and writes into checkpoints."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from deformux.fitting.checkpoint import Checkpoint
from deformux.fitting.optimizer import make_average, make_optimizer, make_schedule
from deformux.fitting.recipe import Recipe
from deformux.inference.metrics import mean_dice

__all__ = ["TrainingState"]

logger = logging.getLogger(__name__)

# Values in a checkpoint besides tensors and the states of optimizer and schedule.
_PLAIN = ("epoch_loss", "losses", "loss", "dice", "best_dice", "best_scores", "stale_epochs", "done")


class TrainingState:
    """Weights, optimizer, schedule, moving average and scores of a training, after a number of steps.

    Args:
        network: in training, on its device.
        recipe: how it is trained; the number of steps is rounded up to whole epochs.
    """

    def __init__(self, network: nn.Module, recipe: Recipe) -> None:
        self.network, self.patience = network, recipe.patience
        self.epoch_length = math.ceil(recipe.steps / recipe.epochs)
        self.epochs = math.ceil(recipe.steps / self.epoch_length)
        self.steps = self.epochs * self.epoch_length
        self.optimizer = make_optimizer(network, recipe)
        self.schedule = make_schedule(self.optimizer, recipe, steps=self.steps)
        self.average = make_average(network, recipe)
        self.step = 0
        self.seconds_before = 0.0
        self.loss = math.nan
        self.epoch_loss = 0.0
        self.losses: list[float] = []
        self.dice: float | None = None
        self.best_dice: float | None = None
        self.best_scores: dict[str, list[float]] = {}
        self.best_weights: dict[str, Tensor] | None = None
        self.stale_epochs = 0
        self.done = self.diverged = False

    @property
    def epoch(self) -> int:
        """Return the epoch of the last step, from 1."""
        return math.ceil(self.step / self.epoch_length)

    @property
    def epoch_is_over(self) -> bool:
        """Return whether the last step was the last of its epoch."""
        return self.step % self.epoch_length == 0

    @property
    def candidate(self) -> nn.Module:
        """Return the network to validate and to keep: the moving average if there is one."""
        return self.average.module if self.average is not None else self.network

    def count(self, losses: Iterable[float]) -> None:
        """Add the losses of steps to the mean of their epoch."""
        for self.loss in losses:
            self.epoch_loss += self.loss / self.epoch_length
            self.diverged = self.diverged or not math.isfinite(self.loss)

    def end_step(self) -> None:
        """Set the learning rate of the next step."""
        if self.schedule is not None and not isinstance(self.schedule, ReduceLROnPlateau):
            self.schedule.step()

    def end_epoch(self, scores: Mapping[str, list[float]]) -> None:
        """Note the epoch's mean loss and its validation Dice by case, and decide whether the training is done."""
        self.losses.append(self.epoch_loss)
        self.epoch_loss = 0.0
        if scores:
            self._judge(scores)
        logger.info("epoch %d of %d: loss %.4f, Dice %s", self.epoch, self.epochs, self.losses[-1], self.dice)
        self.done = self.step >= self.steps
        if self.patience is not None and self.stale_epochs >= self.patience and not self.done:
            logger.info("stopping early: no better validation Dice in %d epochs", self.stale_epochs)
            self.done = True
        if isinstance(self.schedule, ReduceLROnPlateau):
            self.schedule.step(self.losses[-1])

    def _judge(self, scores: Mapping[str, list[float]]) -> None:
        """Keep the weights where their mean Dice is the best so far."""
        self.dice = mean_dice(list(scores.values()))
        self.stale_epochs += 1
        # The first counts even if it is NaN, because validation volumes hold none of the labels.
        if self.best_weights is None or self.best_dice is None or self.dice > self.best_dice:
            self.best_dice = self.dice if math.isfinite(self.dice) else None
            self.best_scores = dict(scores)
            self.best_weights = {name: value.clone() for name, value in self.candidate.state_dict().items()}
            self.stale_epochs = 0

    def load_best(self) -> None:
        """Give the network the best weights by validation, or the last ones, and set it to evaluation mode."""
        self.network.load_state_dict(self.best_weights or self.candidate.state_dict())
        self.network.eval()

    def checkpoint(self, *, seconds: float) -> Checkpoint:
        """Return all that ``restore`` needs, with the seconds of training so far."""
        optimizer = self.optimizer.state_dict()
        tensors: dict[str, Mapping[str, Tensor]] = {
            "network": self.network.state_dict(),
            "optimizer": {
                f"{index}/{name}": value for index, entry in optimizer["state"].items() for name, value in entry.items()
            },
            "average": self.average.module.state_dict() if self.average is not None else {},
            "best": self.best_weights or {},
        }
        values: dict[str, Any] = {
            "engine": {"epoch_length": self.epoch_length, "max_epochs": self.epochs, "iteration": self.step},
            "optimizer": optimizer["param_groups"],
            "schedule": self.schedule.state_dict() if self.schedule is not None else None,
            "seconds": seconds,
        }
        return Checkpoint(tensors, values | {name: getattr(self, name) for name in _PLAIN})

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to where a checkpoint was made."""
        tensors, values = checkpoint.tensors, checkpoint.values
        self.step = values["engine"]["iteration"]
        self.seconds_before = values["seconds"]
        self.network.load_state_dict(tensors["network"])
        if self.average is not None:
            self.average.module.load_state_dict(tensors["average"])
            self.average.n_averaged.fill_(self.step)
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.get("optimizer", {}).items():
            index, _, name = key.partition("/")
            state.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": values["optimizer"]})
        if self.schedule is not None:
            self.schedule.load_state_dict(values["schedule"])
        if "best" in tensors:
            device = next(self.network.parameters()).device
            self.best_weights = {name: value.to(device) for name, value in tensors["best"].items()}
        for name in _PLAIN:
            setattr(self, name, values[name])
        logger.info("resuming after %d of %d steps", self.step, self.steps)
