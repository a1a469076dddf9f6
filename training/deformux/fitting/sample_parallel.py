"""Training on a CPU with a thread per sample: what is small in a network leaves no thread without work."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["SampleThreads"]


class SampleThreads(nn.Module):
    """A network whose batches are shared between threads, forward and backward, on a CPU.

    Otherwise every operation of a batch waits for its slowest thread, and all wait for what is not parallel. The
    network must treat each sample as if it were alone and draw nothing at random. Gradients of parameters are summed in
    the order of the samples; inputs get none.

    Args:
        network: ``(N, ...)`` tensors to one of as many samples.
        workers: threads that share a batch; each computes with an equal part of ``torch.get_num_threads()``.
    """

    def __init__(self, network: nn.Module, workers: int) -> None:
        super().__init__()
        self.network = network
        self.workers = workers
        threads, started = torch.get_num_threads(), threading.Barrier(workers)
        # They end with this object.
        self._pool = ThreadPoolExecutor(
            workers, "sample", initializer=_compute_with, initargs=(max(1, threads // workers),)
        )
        self.each(lambda _: started.wait(), range(workers))
        # What a thread sets for itself is also what threads to come begin with.
        torch.set_num_threads(threads)

    def forward(self, *inputs: Tensor) -> Tensor:
        return _Shared.apply(self, inputs, *(p for p in self.network.parameters() if p.requires_grad))

    def each(self, work: Callable[..., Any], *arguments: Sequence[Any]) -> list[Any]:
        """As ``map``, each call in a thread of its own; raises what one of them raised when all are over."""
        calls = [self._pool.submit(work, *given) for given in zip(*arguments, strict=True)]
        wait(calls)
        return [call.result() for call in calls]


def _compute_with(threads: int) -> None:
    torch.get_num_threads()  # a thread's first question sets the number that all begin with
    torch.set_num_threads(threads)


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, threads: SampleThreads, inputs: tuple[Tensor, ...], *parameters: Tensor) -> Tensor:
        # Gradients are off here, and on in the threads.
        parts = threads.each(threads.network, *(tensor.chunk(threads.workers) for tensor in inputs))
        ctx.threads, ctx.parts, ctx.parameters = threads, parts, parameters
        return torch.cat([part.detach() for part in parts])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        parts, ctx.parts = ctx.parts, None

        def gradients(part: Tensor, of_part: Tensor) -> tuple[Tensor | None, ...]:
            return torch.autograd.grad(part, ctx.parameters, of_part, allow_unused=True)

        each = ctx.threads.each(gradients, parts, gradient.split([len(part) for part in parts]))
        return (None, None, *(None if own[0] is None else sum(own[1:], own[0]) for own in zip(*each, strict=True)))
