"""A training step: gradients, clicks, clipping, AdamW, moving average; on a GPU its gradients are a CUDA graph.

A step of a small network makes over two thousand launches, which Python queues more slowly than a GPU runs them. A
graph queues them at once. AdamW stays outside: a one-cycle schedule changes the decay rates of its moments, which its
fused kernel takes by value. It is one launch for many tensors, queued while the GPU still computes the gradients.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from deformux.fitting.click_steps import ClickTraining
from deformux.fitting.losses import PartialDiceCELoss
from deformux.fitting.optimizer import MixedPrecision
from deformux.fitting.recipe import Recipe
from deformux.fitting.sample_parallel import SampleThreads, sample_workers
from deformux.fitting.unlabelled import MeanTeacher
from deformux.networks.cuda_graphs import CapturedCall, CaptureFailed

__all__ = ["LossReader", "TrainingStep"]

# On a GPU, guidance of at most this many channels is convolved whole, whether its channels hold anything or not.
_MAX_GUIDANCE = 32


class TrainingStep:
    """Takes the steps of one training.

    Args:
        network: in training, on ``device``.
        optimizer: of its parameters.
        average: the moving average of its weights, or None.
        recipe: how to train.
        clicks: guidance of the steps with clicks, or None.
        device: device of the network.
        capture: on a GPU, replay the gradients from CUDA graphs, one for each shape of batch. If that fails, one
            warning says why and steps are queued launch by launch.
        samples: number of patches in a batch, which get a thread each on a CPU.
        combine: called with the loss when the gradients of a batch are complete, before they are clipped; returns the
            loss to report.
        teacher: labels unlabelled patches, or None.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: Optimizer,
        average: AveragedModel | None,
        recipe: Recipe,
        *,
        clicks: ClickTraining | None,
        device: torch.device,
        capture: bool = True,
        samples: int = 1,
        combine: Callable[[Tensor], Tensor] | None = None,
        teacher: MeanTeacher | None = None,
    ) -> None:
        self.network, self.optimizer, self.average, self.recipe = network, optimizer, average, recipe
        self.clicks, self.device, self.combine, self.teacher = clicks, device, combine, teacher
        self.compiled = False
        self._loss = PartialDiceCELoss()
        self._with_clicks = self._without_clicks = _in_training(network, recipe, device, samples)
        self._capture = capture and device.type == "cuda"
        self._captured: dict[Any, tuple[CapturedCall, list[Tensor | None]]] = {}
        self._captured_clicks: dict[Any, CapturedCall] = {}
        self._pool: Any = torch.cuda.graph_pool_handle() if self._capture else None
        guidance = getattr(network, "guidance_channels", 0)
        # All of them: asking which hold anything would wait for the GPU.
        self._channels: tuple[Tensor, ...] = ()
        if device.type == "cuda" and 0 < guidance <= _MAX_GUIDANCE:
            self._channels = (torch.arange(guidance, device=device),)
        # Gradients of the guidance stay in place, for a graph that adds to them.
        self._guidance = [p for name, p in network.named_parameters() if name.endswith(".guidance")]
        self._guidance_gradients: list[Tensor] = []

    def __call__(
        self,
        step: int,
        image: Tensor,
        label: Tensor,
        annotated: Tensor,
        others: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Take one step; return the loss of the batch before it, a scalar on the device.

        Args:
            step: number of the step, from 1.
            image: ``(N, channels, D, H, W)``.
            label: ``(N, 1, D, H, W)``, 255 where unlabelled.
            annotated: ``(N, classes)``, on the CPU.
            others: patches without a label, for the teacher: ``image`` and ``label``, which is 255 beyond their scans.
        """
        self.network.train()
        with_clicks = self.clicks is not None and self.clicks.takes_part(step)
        some = () if bool(annotated.all()) else (annotated,)
        batch = tuple(tensor.to(self.device, non_blocking=True) for tensor in (image, label, *some))
        if others is not None:
            assert self.teacher is not None
            beside, beyond = (others[name].to(self.device, non_blocking=True) for name in ("image", "label"))
            mixed, answers, label = self.teacher.mixed(step, batch[0], batch[1], annotated, beside, beyond)
            batch = (mixed, answers, *batch[2:])
        clip_at_once = self.combine is None and not with_clicks
        loss, logits, key = self._gradients(batch, clip_at_once)
        if with_clicks:
            assert self.clicks is not None
            guidance = self.clicks.guidance(step, batch[0], logits, label, annotated)
            self._add_clicks(batch, guidance, key if self._channels else None)
        if self.combine is not None:
            loss = self.combine(loss)
        if not clip_at_once:
            self._clip()
        self.optimizer.step()
        if self.average is not None:
            self._update_average(self.average)
        return loss

    @property
    def captures(self) -> bool:
        """Return whether gradients are replayed from CUDA graphs."""
        return self._capture

    def compile(self) -> None:
        """Compile the network for batches without clicks, at the next step, which takes a minute or two.

        If it cannot be compiled, steps continue without, after a warning. If steps are not captured, nothing is
        compiled, since compiling saves little of Python's time.
        """
        if not self._capture:
            return
        self._use(torch.compile(self.network, dynamic=False, fullgraph=True))
        self.compiled = True

    def _use(self, network: Callable[..., Tensor]) -> None:
        self._without_clicks = MixedPrecision(network, self.recipe.mixed_precision)
        self._forget()

    def _forget(self) -> None:
        """Free the memory of the graphs."""
        self._captured.clear()
        self._captured_clicks.clear()
        if self._pool is not None:
            torch.cuda.empty_cache()
            # A pool ends with its last graph, and cannot be used again.
            self._pool = torch.cuda.graph_pool_handle()

    def _gradients(self, batch: tuple[Tensor, ...], clip: bool) -> tuple[Tensor, Tensor, Any]:
        """Set the gradients of a batch; return its loss, its logits and the key of its graph, None without one."""

        def work(image: Tensor, label: Tensor, *annotated: Tensor) -> tuple[Tensor, Tensor]:
            self.optimizer.zero_grad(set_to_none=True)
            logits = self._without_clicks(image)
            loss = self._loss(logits, label, *annotated)
            loss.backward()
            if clip:
                self._clip()
            return loss.detach(), logits.detach()

        # The optimizer's state exists after its first step only.
        if not self._capture or not self.optimizer.state:
            return *work(*batch), None
        key = (*((t.shape, t.dtype) for t in batch), clip)
        if key not in self._captured:
            try:
                call = CapturedCall(work, batch, pool=self._pool)
            except CaptureFailed as error:
                self._give_up(error)
                return self._gradients(batch, clip)
            self._captured[key] = call, [p.grad for p in self.network.parameters()]
        call, gradients = self._captured[key]
        loss, logits = call(*batch)
        for parameter, gradient in zip(self.network.parameters(), gradients, strict=True):
            parameter.grad = gradient
        return loss, logits, key

    def _add_clicks(self, batch: tuple[Tensor, ...], guidance: Tensor, key: Any) -> None:
        """Add the gradient of the same batch with clicks; the pass without them has freed its memory by now."""

        def work(guidance: Tensor, image: Tensor, *targets: Tensor) -> tuple[()]:
            label, annotated = (*targets, None)[:2]
            # Only the prediction near the clicks is ever used.
            near = guidance[:, : self.network.out_channels].amax(1, keepdim=True)
            for gradient in self._guidance_gradients:
                gradient.zero_()
            logits = self._with_clicks(image, guidance, *self._channels)
            self._loss(logits, label, annotated, near).backward()
            return ()

        if self._channels:
            self._guidance_gradients = self._guidance_gradients or [torch.zeros_like(p) for p in self._guidance]
            for parameter, gradient in zip(self._guidance, self._guidance_gradients, strict=True):
                parameter.grad = gradient
        if key is None:
            work(guidance, *batch)
            return
        if key not in self._captured_clicks:
            try:
                self._captured_clicks[key] = CapturedCall(work, (guidance, *batch), pool=self._pool)
            except CaptureFailed as error:
                self._capture = False
                self._warn(error)
            # Capturing has added to the gradients, whether it succeeded or not.
            self._captured[key][0].replay()
            if not self._capture:
                work(guidance, *batch)
                self._forget()
                return
        self._captured_clicks[key](guidance, *batch)

    def _give_up(self, error: CaptureFailed) -> None:
        if self.compiled:
            self.compiled = False
            self._use(self.network)
            warnings.warn(f"Training continues without compiling the network: {error}", stacklevel=2)
            return
        self._capture = False
        # Steps need the memory now.
        self._forget()
        self._warn(error)

    def _warn(self, error: CaptureFailed) -> None:
        warnings.warn(f"Training continues without CUDA graphs, which are several times as fast: {error}", stacklevel=2)

    def _clip(self) -> None:
        if self.recipe.gradient_clip is not None:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.recipe.gradient_clip)

    def _update_average(self, average: AveragedModel) -> None:
        if self.device.type == "cpu" or not average.n_averaged or average.multi_avg_fn is None:
            average.update_parameters(self.network)
            return
        # As above, without a copy of the counter from the CPU, which would make the GPU wait.
        with torch.no_grad():
            average.multi_avg_fn(list(average.module.parameters()), list(self.network.parameters()), average.n_averaged)
            for own, current in zip(average.module.buffers(), self.network.buffers(), strict=True):
                own.copy_(current)
        average.n_averaged += 1


class LossReader:
    """Reads losses as numbers: on a GPU one step late, so that it computes the next step meanwhile."""

    def __init__(self, device: torch.device) -> None:
        self._waits = device.type == "cuda"
        self._pending: list[tuple[Tensor, Any]] = []

    def add(self, loss: Tensor) -> list[float]:
        """Add the loss of a step; return those that are known by now and were not returned before, in order."""
        if not self._waits:
            return [float(loss)]
        number = torch.empty((), dtype=loss.dtype, pin_memory=True)
        number.copy_(loss, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(loss.device))
        known = self.rest()
        self._pending.append((number, event))
        return known

    def rest(self) -> list[float]:
        """Wait for the losses that ``add`` did not return, and return them."""
        pending, self._pending = self._pending, []
        values = []
        for number, event in pending:
            event.synchronize()
            values.append(float(number))
        return values


def _in_training(network: nn.Module, recipe: Recipe, device: torch.device, samples: int) -> nn.Module:
    mixed: nn.Module = MixedPrecision(network, recipe.mixed_precision)
    workers = sample_workers(network, device, samples)
    return SampleThreads(mixed, workers) if workers > 1 else mixed
