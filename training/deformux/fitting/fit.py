"""Training: ``fit()`` on MONAI's engines and handlers."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from monai.handlers import LrScheduleHandler
from monai.utils import set_determinism
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from deformux.data.cases import Case
from deformux.data.preprocessing import Preprocessing
from deformux.data.volume_reader import InvalidVolume
from deformux.fitting.checkpoint import Checkpoint, CheckpointFile, fingerprint
from deformux.fitting.click_steps import ClickTraining
from deformux.fitting.compilation import Compilation
from deformux.fitting.distributed import ALONE, Ranks
from deformux.fitting.optimizer import make_average, make_optimizer, make_schedule
from deformux.fitting.patches import Patches, seed_everything
from deformux.fitting.recipe import Recipe
from deformux.fitting.training_step import LossReader, TrainingStep
from deformux.inference.evaluate import evaluate
from deformux.inference.metrics import mean_dice
from deformux.networks.deformux_net import DeformUXNet

__all__ = ["Case", "FitResult", "Progress", "TrainingError", "TrainingStopped", "fit"]

logger = logging.getLogger(__name__)

# The steps by whose time it is judged whether compiling pays; the first ones compile kernels and capture graphs.
_PACE_FROM, _PACE_TO = 20, 60


class TrainingError(RuntimeError):
    """Training cannot start or go on; the message is one sentence for the user."""


class TrainingStopped(TrainingError):
    """Training was asked to stop; with a checkpoint it can be continued."""


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
    """What a run gave: training seconds, the best validation Dice, and the mean loss per epoch.

    ``per_case`` holds the validation Dice by label of the weights that were kept, ``resumed_from`` the step at which
    this call took over from a checkpoint.
    """

    seconds: float
    best_dice: float | None
    losses: list[float]
    per_case: dict[str, list[float]] = field(default_factory=dict)
    resumed_from: int = 0


def fit(
    network: DeformUXNet,
    cases: Sequence[Case],
    *,
    recipe: Recipe,
    prep: Preprocessing,
    labels: Sequence[str],
    val_cases: Sequence[Case] = (),
    new: Collection[str] = (),
    device: str | torch.device = "cpu",
    on_progress: Callable[[Progress], None] | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 30.0,
    stop: Callable[[], bool] | None = None,
    capture: bool = True,
    compile_cache: Path | None = None,
    ranks: Ranks = ALONE,
) -> FitResult:
    """Train a network on labelled volumes; afterwards it holds the best weights by validation, else the last ones.

    Args:
        network: its output channels are background and ``labels``. With ``recipe.clicks`` one that takes guidance
            learns from clicks too; one that takes none is trained as it is without them.
        cases: volumes to learn from; unlabelled voxels and labels that were not annotated teach nothing.
        recipe: every number of the run.
        prep: how volumes become network input.
        labels: names of labels 1..N.
        val_cases: volumes to validate on after each epoch; none keeps the weights of the last step.
        new: ids of the cases that are drawn ``recipe.oversampling`` times as often.
        device: where to compute.
        on_progress: called about once a second and after each epoch.
        seed: of every random choice; a run in float32 repeats bit for bit, bfloat16 gradients differ by rounding.
        checkpoint: file from which an interrupted run goes on, and ends as if it had never been interrupted; one of
            other cases, labels, weights or another recipe is ignored. It stays when the run is over.
        checkpoint_seconds: least time between two checkpoints.
        stop: asked after each step whether to stop; the checkpoint then holds that step.
        capture: on a GPU, replay steps from CUDA graphs, which gives the same in a fraction of the time; and compile
            the network where the run is long enough to pay for it, which rounds otherwise.
        compile_cache: folder that keeps what was compiled for the next run.
        ranks: this process among those that train together, all of which call this with the same arguments but
            ``device``. One of them writes checkpoints and reports progress; ``stop`` of any of them stops all.

    Raises:
        TrainingStopped: ``stop`` said so.
        TrainingError: no cases, an unusable scan or label, or a loss that is no longer finite.
        ValueError: the volumes of a step cannot be divided among the processes.
    """
    if not cases:
        raise TrainingError("there are no labelled volumes to train on")
    if network.out_channels != len(labels) + 1:
        raise TrainingError(f"the network has {network.out_channels} classes, the labels need {len(labels) + 1}")
    set_determinism(seed)
    try:
        saved = None
        if checkpoint is not None and ranks.is_writer:
            run_id = fingerprint(network, cases, val_cases, new=new, recipe=recipe, prep=prep, labels=labels, seed=seed)
            saved = CheckpointFile(checkpoint, run_id, checkpoint_seconds)
        patches = Patches(cases, new=new, recipe=recipe, prep=prep, labels=labels, device=device, ranks=ranks)
        run = _Run(
            network,
            patches,
            recipe,
            prep,
            labels,
            val_cases,
            device,
            seed,
            on_progress,
            saved,
            stop,
            capture,
            compile_cache,
            ranks,
        )
        # CUDA graphs are those of the current device.
        with torch.cuda.device(device) if torch.device(device).type == "cuda" else nullcontext():
            return run.run()
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
        patches: Patches,
        recipe: Recipe,
        prep: Preprocessing,
        labels: Sequence[str],
        val_cases: Sequence[Case],
        device: str | torch.device,
        seed: int,
        on_progress: Callable[[Progress], None] | None,
        saved: CheckpointFile | None,
        stop: Callable[[], bool] | None,
        capture: bool,
        compile_cache: Path | None,
        ranks: Ranks,
    ) -> None:
        self.network = network.to(device)
        self.ranks = ranks
        ranks.broadcast(self.network)
        self.patches, self.recipe, self.prep, self.labels, self.val_cases = patches, recipe, prep, labels, val_cases
        self.device = torch.device(device)
        self.seed, self.on_progress, self.saved, self.stop = seed, on_progress, saved, stop
        self.epoch_length = math.ceil(recipe.steps / recipe.epochs)
        self.epochs = math.ceil(recipe.steps / self.epoch_length)
        self.steps = self.epochs * self.epoch_length
        self.started = self.last_report = time.monotonic()
        self.seconds_before = 0.0
        self.first_step = 0
        self.epoch_loss = 0.0
        self.losses: list[float] = []
        self.loss = math.nan
        self.dice: float | None = None
        self.best_dice: float | None = None
        self.best_scores: dict[str, list[float]] = {}
        self.best_state: dict[str, Tensor] | None = None
        self.stale_epochs = 0
        self.done = self.stopped = False
        self.optimizer = make_optimizer(network, recipe)
        self.schedule = make_schedule(self.optimizer, recipe, steps=self.steps)
        self.ema = make_average(network, recipe)
        guided = recipe.clicks > 0 and getattr(network, "guidance_channels", 0) > 0
        self.clicks = ClickTraining(network, recipe, seed=seed) if guided else None
        self.step = TrainingStep(
            network,
            self.optimizer,
            self.ema,
            recipe,
            clicks=self.clicks,
            device=self.device,
            capture=capture,
            samples=recipe.batch_size // ranks.size,
            combine=(lambda loss: ranks.average(network.parameters(), loss)) if ranks.size > 1 else None,
        )
        self.loss_reader = LossReader(self.device)
        # What compiling saves is known of this network alone; another may not be compiled without a break.
        compiles = capture and self.device.type == "cuda" and isinstance(network, DeformUXNet)
        self.compiler = (
            Compilation(_identity(network, recipe, prep, ranks.size), cache=compile_cache) if compiles else None
        )
        self.pace_began = 0.0

    def run(self) -> FitResult:
        checkpoint = self.ranks.from_writer(lambda: self.saved.load() if self.saved is not None else None)
        if checkpoint is not None:
            self._restore(checkpoint)
        if not self.done:
            self._trainer(checkpoint).run()
        if self.stopped:
            raise TrainingStopped("the training was stopped" + (", and can be continued" if self.saved else ""))
        if not all(math.isfinite(loss) for loss in (self.loss, *self.losses)):
            if self.saved is not None:
                # It would only lead here again.
                self.saved.remove()
            raise TrainingError("the loss is no longer finite; train again with a lower learning rate")
        self.network.load_state_dict(self.best_state or self._candidate().state_dict())
        self.network.eval()
        return FitResult(self._seconds(), self.best_dice, self.losses, self.best_scores, self.first_step)

    def _candidate(self) -> nn.Module:
        """The network that validation and the result see: the moving average where there is one."""
        return self.ema.module if self.ema is not None else self.network

    def _trainer(self, checkpoint: Checkpoint | None) -> SupervisedTrainer:
        trainer = SupervisedTrainer(
            device=self.device,
            max_epochs=self.epochs,
            train_data_loader=self.patches.loader(first_step=self.first_step, steps=self.steps, seed=self.seed),
            epoch_length=self.epoch_length,
            network=self.network,
            optimizer=self.optimizer,
            loss_function=None,  # it is part of the step
            iteration_update=self._take_step,
            decollate=False,
        )
        if checkpoint is not None:
            trainer.load_state_dict(checkpoint.values["engine"])
        trainer.add_event_handler(
            Events.GET_BATCH_STARTED, lambda engine: seed_everything(self.seed, engine.state.iteration, self.ranks.rank)
        )
        if isinstance(self.schedule, LRScheduler) and not isinstance(self.schedule, ReduceLROnPlateau):
            LrScheduleHandler(self.schedule, print_lr=False, epoch_level=False).attach(trainer)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self._after_step)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self._after_epoch)
        if isinstance(self.schedule, ReduceLROnPlateau):
            # Behind _after_epoch, which provides the loss to judge.
            handler = LrScheduleHandler(self.schedule, print_lr=False, step_transform=lambda _: self.losses[-1])
            handler.attach(trainer)
        # Last, when the step is over for everybody else.
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self._keep_step)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self._keep_epoch)
        return trainer

    def _take_step(self, engine: Engine, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        loss = self.step(engine.state.iteration, batch["image"], batch["label"], batch["annotated"])
        return {"loss": loss}

    def _after_step(self, engine: Engine) -> None:
        self._count(engine, self.loss_reader.add(engine.state.output["loss"]))
        if self.compiler is not None:
            self._consider_compiling(engine.state.iteration)
        if time.monotonic() - self.last_report >= 1:
            self._report(engine)

    def _count(self, engine: Engine, losses: Sequence[float]) -> None:
        for self.loss in losses:
            self.epoch_loss += self.loss / self.epoch_length
            if not math.isfinite(self.loss):
                engine.terminate()

    def _consider_compiling(self, step: int) -> None:
        """Compile, once, where the steps so far say that this pays for the rest."""
        taken = step - self.first_step
        if taken == _PACE_FROM:
            self.pace_began = time.monotonic()
        elif taken == _PACE_TO:
            assert self.compiler is not None
            pace = (time.monotonic() - self.pace_began) / (_PACE_TO - _PACE_FROM)
            if self.ranks.agree(self.compiler.pays(pace * (self.steps - step))):
                self.compiler.begin()
                self.step.compile()
        elif taken == _PACE_TO + 1 and self.step.compiled:
            assert self.compiler is not None
            self.compiler.end()

    def _after_epoch(self, engine: Engine) -> None:
        self._count(engine, self.loss_reader.rest())
        self.losses.append(self.epoch_loss)
        self.epoch_loss = 0.0
        if self.val_cases:
            self._validate()
        logger.info("epoch %d of %d: loss %.4f, Dice %s", engine.state.epoch, self.epochs, self.losses[-1], self.dice)
        self.done = engine.state.iteration >= self.steps
        if self.recipe.patience is not None and self.stale_epochs >= self.recipe.patience and not self.done:
            logger.info("stopping early: no better validation Dice in %d epochs", self.stale_epochs)
            self.done = True
            engine.terminate()
        self._report(engine)

    def _validate(self) -> None:
        network = self._candidate()
        cases = self.ranks.part(self.val_cases)
        own = evaluate(network, cases, self.prep, n_labels=len(self.labels), labels=self.labels, device=self.device)
        each = {case: dice for part in self.ranks.gather(own) for case, dice in part.items()}
        scores = {case.id: each[case.id] for case in self.val_cases}
        self.dice = mean_dice(list(scores.values()))
        self.stale_epochs += 1
        # The first counts even where it is NaN, because validation volumes hold none of the labels.
        if self.best_state is None or self.best_dice is None or self.dice > self.best_dice:
            self.best_dice = self.dice if math.isfinite(self.dice) else None
            self.best_scores = scores
            self.best_state = {name: value.clone() for name, value in network.state_dict().items()}
            self.stale_epochs = 0

    def _keep_step(self, engine: Engine) -> None:
        if self.stop is not None and self.ranks.agree(self.stop()):
            self.stopped = True
        within_epoch = engine.state.iteration % self.epoch_length != 0
        if within_epoch:
            # At the end of an epoch validation comes first.
            self._keep(engine)

    def _keep_epoch(self, engine: Engine) -> None:
        self._keep(engine)

    def _keep(self, engine: Engine) -> None:
        if self.saved is not None and (self.done or self.stopped or self.saved.due):
            self._count(engine, self.loss_reader.rest())
            if math.isfinite(self.loss):
                self.saved.save(self._checkpoint(engine))
        if self.stopped:
            # Stopped in the last step, it is over all the same.
            self.stopped = not self.done
            engine.terminate()

    def _checkpoint(self, engine: Engine) -> Checkpoint:
        optimizer = self.optimizer.state_dict()
        tensors: dict[str, Mapping[str, Tensor]] = {
            "network": self.network.state_dict(),
            "optimizer": {
                f"{index}/{name}": value for index, entry in optimizer["state"].items() for name, value in entry.items()
            },
            "average": self.ema.module.state_dict() if self.ema is not None else {},
            "best": self.best_state or {},
        }
        values: dict[str, Any] = {
            "engine": dict(engine.state_dict()),
            "optimizer": optimizer["param_groups"],
            "schedule": self.schedule.state_dict() if self.schedule is not None else None,
            "seconds": self._seconds(),
        }
        return Checkpoint(tensors, values | {name: getattr(self, name) for name in _PLAIN})

    def _restore(self, checkpoint: Checkpoint) -> None:
        tensors, values = checkpoint.tensors, checkpoint.values
        self.network.load_state_dict(tensors["network"])
        if self.ema is not None:
            self.ema.module.load_state_dict(tensors["average"])
            self.ema.n_averaged.fill_(values["engine"]["iteration"])
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.get("optimizer", {}).items():
            index, _, name = key.partition("/")
            state.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": values["optimizer"]})
        if self.schedule is not None:
            self.schedule.load_state_dict(values["schedule"])
        if "best" in tensors:
            self.best_state = {name: value.to(self.device) for name, value in tensors["best"].items()}
        for name in _PLAIN:
            setattr(self, name, values[name])
        self.seconds_before = values["seconds"]
        self.first_step = values["engine"]["iteration"]
        logger.info("resuming after %d of %d steps", self.first_step, self.steps)

    def _seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    def _report(self, engine: Engine) -> None:
        self.last_report = time.monotonic()
        if self.on_progress is None or not self.ranks.is_writer:
            return
        step = engine.state.iteration
        effort = self.recipe.effort if self.clicks is not None else float
        pace = (self.last_report - self.started) / max(1.0, effort(step) - effort(self.first_step))
        self.on_progress(
            Progress(
                step=step,
                total_steps=self.steps,
                epoch=engine.state.epoch,
                total_epochs=self.epochs,
                loss=self.loss,
                mean_dice=self.dice,
                best_dice=self.best_dice,
                seconds=self._seconds(),
                eta_s=0.0 if self.done else pace * (effort(self.steps) - effort(step)),
            )
        )


# What a checkpoint holds of a run beside tensors and the states of engine, optimizer and schedule.
_PLAIN = ("epoch_loss", "losses", "loss", "dice", "best_dice", "best_scores", "stale_epochs", "done")


def _identity(network: DeformUXNet, recipe: Recipe, prep: Preprocessing, ranks: int) -> dict[str, Any]:
    """What a compiled network is made for."""
    return {
        "preset": network.preset,
        "channels": (network.in_channels, network.out_channels, network.guidance_channels),
        "batch": recipe.batch_size // ranks,
        "patch": prep.patch_size,
        "mixed_precision": recipe.mixed_precision,
    }
