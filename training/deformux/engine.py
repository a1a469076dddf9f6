"""Training: ``fit()`` on MONAI's engines and handlers."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from ignite.engine import Engine, Events
from ignite.handlers import EMAHandler, TerminateOnNan
from monai.data import CacheDataset, DataLoader
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.handlers import LrScheduleHandler
from monai.losses import DiceCELoss
from monai.utils import set_determinism
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau
from torch.utils.data import RandomSampler

from deformux.augmentation import training_augmentation
from deformux.cases import Case
from deformux.inference import evaluate, mixed_precision
from deformux.metrics import mean_dice
from deformux.network import DeformUXNet
from deformux.recipe import Recipe
from deformux.transforms import InvalidVolume, Preprocessing, labelled_transforms

__all__ = ["Case", "FitResult", "Progress", "TrainingError", "fit"]

logger = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """Training cannot start or go on; the message is one sentence for the user."""


@dataclass(frozen=True)
class Progress:
    """Where a run is: steps and epochs done, last loss, validation Dice so far, seconds since start and to the end."""

    step: int
    total_steps: int
    epoch: int
    total_epochs: int
    loss: float
    mean_dice: float | None
    best_dice: float | None
    seconds: float
    eta_s: float


@dataclass(frozen=True)
class FitResult:
    """What a run gave: validation Dice (``per_case``, ``mean_dice``), training seconds, and the mean loss per epoch."""

    seconds: float
    best_dice: float | None
    losses: list[float]
    per_case: dict[str, list[float]] = field(default_factory=dict)


class _MixedPrecision(nn.Module):
    """The network under autocast with float32 logits: MONAI's own ``amp`` knows CUDA only."""

    def __init__(self, network: nn.Module, enabled: bool) -> None:
        super().__init__()
        self.network = network
        self.enabled = enabled

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return self.network(x)
        with mixed_precision(x.device):
            logits = self.network(x)
        return logits.float()


def fit(
    network: DeformUXNet,
    cases: Sequence[Case],
    *,
    recipe: Recipe,
    prep: Preprocessing,
    labels: Sequence[str],
    val_cases: Sequence[Case] = (),
    device: str | torch.device = "cpu",
    on_progress: Callable[[Progress], None] | None = None,
    seed: int = 0,
) -> FitResult:
    """Train a network on labelled volumes; afterwards it holds the best weights by validation, else the last ones.

    Args:
        network: its output channels are background and ``labels``.
        cases: volumes to learn from.
        recipe: every number of the run.
        prep: how volumes become network input.
        labels: names of labels 1..N.
        val_cases: volumes to validate on after each epoch; none keeps the weights of the last step.
        device: where to compute.
        on_progress: called about once a second and after each epoch.
        seed: of every random choice; a run in float32 repeats bit for bit, bfloat16 gradients differ by rounding.

    Raises:
        TrainingError: no cases, an unusable scan or label, or a loss that is no longer finite.
    """
    if not cases:
        raise TrainingError("there are no labelled volumes to train on")
    if network.out_channels != len(labels) + 1:
        raise TrainingError(f"the network has {network.out_channels} classes, the labels need {len(labels) + 1}")
    set_determinism(seed)
    try:
        return _Run(network, cases, recipe, prep, len(labels), val_cases, device, on_progress).run()
    except (InvalidVolume, RuntimeError) as error:
        reason = _unusable_volume(error)
        if reason is None:
            raise
        raise TrainingError(str(reason)) from error
    finally:
        set_determinism(None)


def _unusable_volume(error: BaseException | None) -> InvalidVolume | None:
    """MONAI wraps whatever a transform raises: the sentence for the user is further down."""
    while error is not None and not isinstance(error, InvalidVolume):
        error = error.__cause__
    return error


class _Run:
    """One training run: builds MONAI's engines and listens to them."""

    def __init__(
        self,
        network: DeformUXNet,
        cases: Sequence[Case],
        recipe: Recipe,
        prep: Preprocessing,
        n_labels: int,
        val_cases: Sequence[Case],
        device: str | torch.device,
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        self.network = network.to(device)
        self.recipe, self.prep, self.n_labels, self.val_cases = recipe, prep, n_labels, val_cases
        self.device = torch.device(device)
        self.on_progress = on_progress
        self.epoch_length = math.ceil(recipe.steps / recipe.epochs)
        self.epochs = math.ceil(recipe.steps / self.epoch_length)
        self.started = self.last_report = time.monotonic()
        self.epoch_loss = 0.0
        self.losses: list[float] = []
        self.loss = math.nan
        self.dice: float | None = None
        self.best_dice: float | None = None
        self.best_scores: dict[str, list[float]] = {}
        self.best_state: dict[str, Tensor] | None = None
        self.optimizer = AdamW(
            network.parameters(),
            lr=recipe.learning_rate,
            betas=recipe.betas,
            eps=recipe.eps,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        self.ema = EMAHandler(network, momentum=1 - recipe.ema_decay) if recipe.ema_decay is not None else None
        self.loader = self._loader(cases)

    def run(self) -> FitResult:
        trainer = self._trainer()
        trainer.run()
        if not self.losses or not all(math.isfinite(loss) for loss in self.losses):
            raise TrainingError("the loss is no longer finite; train again with a lower learning rate")
        self.network.load_state_dict(self.best_state or self._candidate().state_dict())
        self.network.eval()
        seconds = time.monotonic() - self.started
        return FitResult(seconds, self.best_dice, self.losses, self.best_scores)

    def _candidate(self) -> nn.Module:
        """The network that validation and the result see: the moving average where there is one."""
        return self.ema.ema_model if self.ema is not None else self.network

    def _loader(self, cases: Sequence[Case]) -> DataLoader:
        files = [{"image": case.image, "label": case.label} for case in cases]
        fixed = labelled_transforms(self.prep, n_labels=self.n_labels)
        augmentation = training_augmentation(self.prep, self.recipe)
        # What a volume takes once it is preprocessed is known only by doing it: the first stands for all.
        first = CacheDataset(files[:1], fixed, cache_rate=1.0, progress=False)[0]
        each = sum(volume.numel() * volume.element_size() for volume in first.values())
        keep = int(self.recipe.cache_gb * 1e9 / each)
        logger.info("keeping %d of %d volumes in memory (%.1f MB each)", min(keep, len(files)), len(files), each / 1e6)
        dataset = CacheDataset(files, [*fixed, *augmentation], cache_num=keep, num_workers=1, progress=False)
        volumes = self.recipe.batch_size // self.recipe.patches_per_volume
        # Epochs of equal length whatever the number of volumes: with few of them, each comes several times.
        sampler = RandomSampler(dataset, num_samples=self.epoch_length * volumes)
        return DataLoader(dataset, batch_size=volumes, sampler=sampler, num_workers=0)

    def _trainer(self) -> SupervisedTrainer:
        recipe = self.recipe
        trainer = SupervisedTrainer(
            device=self.device,
            max_epochs=self.epochs,
            train_data_loader=self.loader,
            network=_MixedPrecision(self.network, recipe.mixed_precision),
            optimizer=self.optimizer,
            loss_function=DiceCELoss(to_onehot_y=True, softmax=True, include_background=False, batch=True),
            decollate=False,
            optim_set_to_none=True,
        )
        if recipe.gradient_clip is not None:
            trainer.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self._clip_gradient, recipe.gradient_clip)
        if recipe.schedule == "one_cycle":
            schedule = OneCycleLR(self.optimizer, recipe.learning_rate, total_steps=self.epochs * self.epoch_length)
            LrScheduleHandler(schedule, print_lr=False, epoch_level=False).attach(trainer)
        if self.ema is not None:
            self.ema.attach(trainer)
        stop_on_nan = TerminateOnNan(output_transform=lambda output: output["loss"])
        trainer.add_event_handler(Events.ITERATION_COMPLETED, stop_on_nan)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self._after_step)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self._after_epoch)
        if recipe.schedule == "plateau":
            # Behind _after_epoch, which provides the loss to judge.
            plateau = ReduceLROnPlateau(self.optimizer, factor=0.9, patience=10)
            LrScheduleHandler(plateau, print_lr=False, step_transform=lambda _: self.losses[-1]).attach(trainer)
        return trainer

    def _clip_gradient(self, _: Engine, largest: float) -> None:
        nn.utils.clip_grad_norm_(self.network.parameters(), largest)

    def _after_step(self, engine: Engine) -> None:
        self.loss = float(engine.state.output["loss"].detach())
        self.epoch_loss += self.loss / self.epoch_length
        if time.monotonic() - self.last_report >= 1:
            self._report(engine)

    def _after_epoch(self, engine: Engine) -> None:
        self.losses.append(self.epoch_loss)
        self.epoch_loss = 0.0
        if self.val_cases:
            network = self._candidate()
            scores = evaluate(network, self.val_cases, self.prep, n_labels=self.n_labels, device=self.device)
            self.dice = mean_dice(list(scores.values()))
            # The first counts even where it is NaN, because validation volumes hold none of the labels.
            if self.best_state is None or self.best_dice is None or self.dice > self.best_dice:
                self.best_dice = self.dice if math.isfinite(self.dice) else None
                self.best_scores = scores
                self.best_state = {name: value.clone() for name, value in network.state_dict().items()}
        logger.info("epoch %d of %d: loss %.4f, Dice %s", engine.state.epoch, self.epochs, self.losses[-1], self.dice)
        self._report(engine)

    def _report(self, engine: Engine) -> None:
        self.last_report = time.monotonic()
        if self.on_progress is None:
            return
        step, total = engine.state.iteration, self.epochs * self.epoch_length
        seconds = self.last_report - self.started
        self.on_progress(
            Progress(
                step=step,
                total_steps=total,
                epoch=engine.state.epoch,
                total_epochs=self.epochs,
                loss=self.loss,
                mean_dice=self.dice,
                best_dice=self.best_dice,
                seconds=seconds,
                eta_s=seconds / step * (total - step),
            )
        )
