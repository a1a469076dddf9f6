"""Training on a CPU with a thread per sample, so that small layers leave no thread idle."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from deformux.networks.deformux_net import DeformUXNet

__all__ = ["SampleThreads", "sample_workers"]


def sample_workers(network: nn.Module, device: torch.device, samples: int) -> int:
    """Return the number of threads that share a batch of a network; 1 where it is computed as a whole."""
    # In other networks samples may depend on their batch, as with batch normalisation.
    if device.type != "cpu" or not isinstance(network, DeformUXNet):
        return 1
    return min(samples, torch.get_num_threads())


class SampleThreads(nn.Module):
    """A network whose batches are shared between threads, forward and backward, on a CPU.

    Without it every operation of a batch waits for its slowest thread, and all threads wait for serial code. The
    network must treat each sample independently and draw nothing at random. Gradients of parameters are summed in
    the order of the samples; inputs get none.

    Args:
        network: ``(N, ...)`` tensors to one tensor of N samples.
        workers: number of threads that share a batch; each gets an equal part of ``torch.get_num_threads()``.
    """

    def __init__(self, network: nn.Module, workers: int) -> None:
        super().__init__()
        self.network = network
        self.workers = workers
        threads, started = torch.get_num_threads(), threading.Barrier(workers)
        # The threads end with this object.
        self._pool = ThreadPoolExecutor(
            workers, "sample", initializer=_compute_with, initargs=(max(1, threads // workers),)
        )
        self.each(lambda _: started.wait(), range(workers))
        # The number that a thread sets for itself is also the default of later threads.
        torch.set_num_threads(threads)

    def forward(self, *inputs: Tensor) -> Tensor:
        return _Shared.apply(self, inputs, *(p for p in self.network.parameters() if p.requires_grad))

    def each(self, work: Callable[..., Any], *arguments: Sequence[Any]) -> list[Any]:
        """Call ``work`` as ``map`` does, each time in its own thread; raise one of their errors when all are done."""
        calls = [self._pool.submit(work, *given) for given in zip(*arguments, strict=True)]
        wait(calls)
        return [call.result() for call in calls]


def _compute_with(threads: int) -> None:
    torch.get_num_threads()  # the first call in a thread sets the default of all
    torch.set_num_threads(threads)


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, threads: SampleThreads, inputs: tuple[Tensor, ...], *parameters: Tensor) -> Tensor:
        # Gradients are disabled here, and enabled in the threads.
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
        return (None, None, *(_summed(own) for own in zip(*each, strict=True)))


def _summed(gradients: Sequence[Tensor | None]) -> Tensor | None:
    """Return the sum of a parameter's gradients; None if no sample used it: some have no clicks, for instance."""
    known = [own for own in gradients if own is not None]
    return sum(known[1:], known[0]) if known else None
