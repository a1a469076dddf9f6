"""Training: ``fit`` is one loop of draw, step, validate, report, stop and save."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from monai.utils import set_determinism
from torch import nn

from deformux.data.cases import Case, Scan
from deformux.data.preprocessing import Preprocessing
from deformux.data.volume_reader import InvalidVolume
from deformux.fitting.checkpoint import CheckpointFile, broadcast_checkpoint, fingerprint
from deformux.fitting.click_steps import ClickTraining
from deformux.fitting.compilation import Compilation, CompileOnce
from deformux.fitting.distributed import ALONE, Ranks
from deformux.fitting.patches import Patches, seed_everything
from deformux.fitting.recipe import Recipe
from deformux.fitting.training_state import TrainingState
from deformux.fitting.training_step import LossReader, TrainingStep
from deformux.fitting.unlabelled import MeanTeacher, UnlabelledPatches, labelled_region, read_scans, unlabelled_batches
from deformux.inference.evaluate import evaluate
from deformux.networks.deformux_net import DeformUXNet

__all__ = ["Case", "FitResult", "Progress", "TrainingError", "TrainingStopped", "fit"]

logger = logging.getLogger(__name__)

_REPORT_SECONDS = 1.0


class TrainingError(RuntimeError):
    """Training cannot start or continue; the message is one sentence for the user."""


class TrainingStopped(TrainingError):
    """Training was asked to stop; with a checkpoint it can be continued."""


@dataclass(frozen=True)
class Progress:
    """Steps and epochs done, last loss, validation Dice so far, seconds since the start and to the end."""

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
    """Result of a training: its seconds, the best validation Dice, and the mean loss of each epoch.

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
    scans: Sequence[Scan] = (),
    device: str | torch.device = "cpu",
    on_progress: Callable[[Progress], None] | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 30.0,
    stop: Callable[[], bool] | None = None,
    capture: bool = True,
    compile_cache: Path | None = None,
    store: Path | None = None,
    ranks: Ranks = ALONE,
) -> FitResult:
    """Train a network on labelled volumes; afterwards it holds the best weights by validation, else the last ones.

    Args:
        network: its output channels are background and ``labels``. With ``recipe.clicks``, a network that takes
            guidance also learns from clicks; one that takes none is trained without them.
        cases: volumes to learn from; unlabelled voxels and labels that were not annotated teach nothing.
        recipe: every number of the training.
        prep: how volumes become network input.
        labels: names of labels 1..N.
        val_cases: volumes to validate on after each epoch; without any, the weights of the last step are kept.
        new: ids of the cases that are drawn ``recipe.oversampling`` times as often.
        scans: volumes without a label, from which a training with ``recipe.unlabelled_scans`` learns too.
        device: where to compute.
        on_progress: called about once a second and after each epoch.
        seed: of every random choice; a training in float32 repeats bit for bit, bfloat16 gradients differ by rounding.
        checkpoint: file from which an interrupted training is resumed, to end as if it had never been interrupted. A
            checkpoint of other cases, labels, weights or another recipe is ignored. The file stays at the end.
        checkpoint_seconds: least time between two checkpoints.
        stop: asked after each step whether to stop; the checkpoint then holds that step.
        capture: on a GPU, replay steps from CUDA graphs, which gives the same in a fraction of the time, and compile
            the network if the training is long enough to pay for it, which rounds differently.
        compile_cache: folder that keeps compiled code for the next training.
        store: folder that keeps preprocessed volumes which do not fit into memory, also for the next training.
        ranks: this process among those that train together, all of which call this with the same arguments but
            ``device``. One of them writes checkpoints and reports progress; ``stop`` of any of them stops all.

    Raises:
        TrainingStopped: ``stop`` returned true.
        TrainingError: no cases, an unusable scan or label, or a loss that is no longer finite.
        ValueError: the volumes of a step cannot be divided among the processes.

    Examples:
        Two steps on a synthetic scan of the trunk with large voxels:

        >>> from tempfile import TemporaryDirectory
        >>> from deformux import DeformUXNet, Preprocessing, fit
        >>> from deformux.data.cases import find_cases, label_names
        >>> from deformux.data.synthetic import write_cohort
        >>> from deformux.fitting.recipe import RECIPES
        >>> with TemporaryDirectory() as folder:
        ...     cohort = write_cohort(folder, volumes=1, voxel_scale=8.0)
        ...     labels = label_names(cohort)
        ...     result = fit(
        ...         DeformUXNet(1, len(labels) + 1, "tiny"),
        ...         find_cases(cohort),
        ...         recipe=RECIPES["finetune"].replace(steps=2, epochs=1),
        ...         prep=Preprocessing("ct", patch_size=(16, 16, 16)),
        ...         labels=labels,
        ...     )
        >>> len(result.losses)
        1
    """
    _check(network, cases, labels, prep)
    prep = prep.with_dropout(recipe.sequence_dropout)
    if not scans:
        recipe = recipe.replace(unlabelled_scans=0)
    set_determinism(seed)
    try:
        saved = None
        if checkpoint is not None and ranks.is_writer:
            run_id = fingerprint(
                network,
                cases,
                val_cases,
                new=new,
                scans=scans if recipe.unlabelled_scans else (),
                recipe=recipe,
                prep=prep,
                labels=labels,
                seed=seed,
            )
            saved = CheckpointFile(checkpoint, run_id, checkpoint_seconds)
        patches = Patches(
            cases, new=new, recipe=recipe, prep=prep, labels=labels, device=device, ranks=ranks, store=store
        )
        others = None
        if recipe.unlabelled_scans:
            region = labelled_region(patches)
            volumes = read_scans(scans, region, recipe=recipe, prep=prep, seed=seed, stop=stop)
            if volumes:
                others = UnlabelledPatches(
                    volumes, n_labels=len(labels), recipe=recipe, prep=prep, device=device, ranks=ranks
                )
        with _on(device):
            ranks.broadcast(network.to(device))
            state = TrainingState(network, recipe)
            if found := broadcast_checkpoint(lambda: saved.load() if saved is not None else None, ranks):
                state.restore(found)
            first_step = state.step
            take_step = _training_step(network, state, recipe, seed=seed, device=device, capture=capture, ranks=ranks)
            effort = recipe.effort if take_step.clicks is not None else float
            reporter = _Reporter(state, effort, on_progress if ranks.is_writer else None)
            if not state.done:
                _train(
                    state,
                    take_step,
                    patches,
                    others,
                    seed=seed,
                    ranks=ranks,
                    compile_once=_compile_once(take_step, state, recipe, prep, compile_cache, ranks),
                    validate=lambda: _validate(state.candidate, val_cases, prep, labels, device, ranks),
                    reporter=reporter,
                    saved=saved,
                    stop=stop,
                )
            state.load_best()
            return FitResult(reporter.seconds, state.best_dice, state.losses, state.best_scores, first_step)
    except (InvalidVolume, RuntimeError) as error:
        reason = _unusable_volume(error)
        if reason is None:
            raise
        raise TrainingError(str(reason)) from error
    finally:
        set_determinism(None)


def _train(
    state: TrainingState,
    take_step: TrainingStep,
    patches: Patches,
    others: UnlabelledPatches | None,
    *,
    seed: int,
    ranks: Ranks,
    compile_once: CompileOnce | None,
    validate: Callable[[], dict[str, list[float]]],
    reporter: _Reporter,
    saved: CheckpointFile | None,
    stop: Callable[[], bool] | None,
) -> None:
    """Take the steps that are left; raises TrainingStopped and TrainingError as ``fit``."""
    losses = LossReader(take_step.device)
    batches = iter(patches.loader(first_step=state.step, steps=state.steps, seed=seed))
    beside = unlabelled_batches(others, take_step.teacher, first_step=state.step, steps=state.steps, seed=seed)
    while not state.done:
        seed_everything(seed, state.step, ranks.rank)
        batch = next(batches)
        unlabelled = next(beside)
        state.step += 1
        # Gradients, clicks, clipping, optimizer and moving average.
        loss = take_step(state.step, batch["image"], batch["label"], batch["annotated"], unlabelled)
        state.end_step()
        state.count(losses.add(loss))
        if compile_once is not None:
            compile_once.after_step(state.step)
        reporter.report_if_due()
        stopped = stop is not None and ranks.any_process(stop())
        if state.epoch_is_over and not state.diverged:
            state.count(losses.rest())
            state.end_epoch(validate())
            reporter.report()
        if saved is not None and (state.done or stopped or saved.due):
            state.count(losses.rest())
            if not state.diverged:
                saved.save(state.checkpoint(seconds=reporter.seconds))
        # A training that is stopped in its last step is done all the same.
        if stopped and not state.done:
            raise TrainingStopped("the training was stopped" + (", and can be continued" if saved else ""))
        if state.diverged:
            if saved is not None:
                # Resuming from it would only diverge again.
                saved.remove()
            raise TrainingError("the loss is no longer finite; train again with a lower learning rate")


class _Reporter:
    """Reports the progress of a training, and the time it takes.

    Args:
        state: of the training, already restored.
        effort: returns the time of all steps up to a step, in ordinary steps.
        on_progress: called with the progress, or None.
    """

    def __init__(
        self, state: TrainingState, effort: Callable[[int], float], on_progress: Callable[[Progress], None] | None
    ) -> None:
        self.state, self.effort, self.on_progress = state, effort, on_progress
        self.first_step = state.step
        self.started = self.last = time.monotonic()

    @property
    def seconds(self) -> float:
        """Return the seconds of training, including those before the checkpoint."""
        return self.state.seconds_before + time.monotonic() - self.started

    def report_if_due(self) -> None:
        """Report once a second."""
        if time.monotonic() - self.last >= _REPORT_SECONDS:
            self.report()

    def report(self) -> None:
        """Report now."""
        self.last = time.monotonic()
        if self.on_progress is None:
            return
        state, effort = self.state, self.effort
        pace = (self.last - self.started) / max(1.0, effort(state.step) - effort(self.first_step))
        self.on_progress(
            Progress(
                step=state.step,
                total_steps=state.steps,
                epoch=state.epoch,
                total_epochs=state.epochs,
                loss=state.loss,
                mean_dice=state.dice,
                best_dice=state.best_dice,
                seconds=self.seconds,
                eta_s=0.0 if state.done else pace * (effort(state.steps) - effort(state.step)),
            )
        )


def _check(network: DeformUXNet, cases: Sequence[Case], labels: Sequence[str], prep: Preprocessing) -> None:
    if not cases:
        raise TrainingError("there are no labelled volumes to train on")
    if network.out_channels != len(labels) + 1:
        raise TrainingError(f"the network has {network.out_channels} classes, the labels need {len(labels) + 1}")
    channels = getattr(network, "in_channels", prep.channels)
    if channels != prep.channels:
        raise TrainingError(f"the network takes {channels} sequences, the preprocessing gives {prep.channels}")


def _on(device: str | torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the current one: CUDA graphs are those of the current device."""
    return torch.cuda.device(device) if torch.device(device).type == "cuda" else nullcontext()


def _training_step(
    network: DeformUXNet,
    state: TrainingState,
    recipe: Recipe,
    *,
    seed: int,
    device: str | torch.device,
    capture: bool,
    ranks: Ranks,
) -> TrainingStep:
    samples = recipe.batch_size // ranks.size
    teacher = None
    if recipe.unlabelled_scans and state.average is not None:
        teacher = MeanTeacher(state.average, recipe, seed=seed, samples=samples)
    guided = recipe.clicks > 0 and getattr(network, "guidance_channels", 0) > 0
    return TrainingStep(
        network,
        state.optimizer,
        state.average,
        recipe,
        clicks=ClickTraining(network, recipe, seed=seed) if guided else None,
        device=torch.device(device),
        capture=capture,
        samples=samples,
        teacher=teacher,
        combine=(lambda loss: ranks.average(network.parameters(), loss)) if ranks.size > 1 else None,
    )


def _compile_once(
    take_step: TrainingStep,
    state: TrainingState,
    recipe: Recipe,
    prep: Preprocessing,
    cache: Path | None,
    ranks: Ranks,
) -> CompileOnce | None:
    network = state.network
    # The gain was measured for this network only; others may not compile as one graph.
    if not take_step.captures or not isinstance(network, DeformUXNet):
        return None
    identity = {
        "preset": network.preset,
        "strides": network.strides,
        "channels": (network.in_channels, network.out_channels, network.guidance_channels),
        "batch": recipe.batch_size // ranks.size,
        "patch": prep.patch_size,
        "mixed_precision": recipe.mixed_precision,
    }
    compilation = Compilation(identity, cache=cache)
    return CompileOnce(compilation, take_step, first_step=state.step, steps=state.steps, any_process=ranks.any_process)


def _validate(
    network: nn.Module,
    cases: Sequence[Case],
    prep: Preprocessing,
    labels: Sequence[str],
    device: str | torch.device,
    ranks: Ranks,
) -> dict[str, list[float]]:
    """Return the Dice by case and label; each process validates on an equal part of the cases."""
    if not cases:
        return {}
    own = evaluate(network, ranks.part(cases), prep, n_labels=len(labels), labels=labels, device=device)
    each = {case: dice for part in ranks.gather(own) for case, dice in part.items()}
    return {case.id: each[case.id] for case in cases}


def _unusable_volume(error: BaseException | None) -> InvalidVolume | None:
    """Return the cause that is meant for the user: MONAI wraps whatever a transform raises."""
    while error is not None and not isinstance(error, InvalidVolume):
        error = error.__cause__
    return error
