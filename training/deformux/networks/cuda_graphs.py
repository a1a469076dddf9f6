"""Work on a GPU captured in a CUDA graph once and replayed: one launch instead of thousands."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["CaptureFailed", "CapturedCall", "captured"]


class CaptureFailed(RuntimeError):
    """The work cannot be captured; the message says why. Nothing is left half changed."""


def captured(
    work: Callable[[], Any], device: torch.device, *, pool: Any = None, alone: bool = False
) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Run the work twice, then capture it; return its graph, and its results, which each replay overwrites.

    Args:
        work: reads and writes tensors at fixed addresses; returns tensors, in any nesting.
        device: a GPU.
        pool: memory shared by graphs that are never replayed at the same time (``torch.cuda.graph_pool_handle()``).
        alone: no other thread of this process waits for a GPU meanwhile. A wait in the work is then found before the
            capture, which leaves less behind.

    Raises:
        CaptureFailed: the work waits for the GPU or does something else that cannot be captured, or memory is short.
    """
    try:
        # Graphs and streams belong to the current device, wherever the tensors are.
        with torch.cuda.device(device):
            _warm_up(work, device, alone)
            graph = torch.cuda.CUDAGraph()
            return graph, _captured(work, graph, device, pool)
    except (RuntimeError, UserWarning) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CaptureFailed(f"{type(error).__name__}: {reason}") from error


class CapturedCall:
    """A function of tensors on a GPU, replayed on inputs of the same shapes and dtypes.

    Every call returns the same tensors, which the next one overwrites. The function may also write to tensors at fixed
    addresses, such as gradients. It runs twice before it is captured.

    Use it only in a process where no other thread waits for a GPU.

    Args:
        work: takes as many tensors as there are ``inputs``; returns tensors, in any nesting.
        inputs: of the first call, on the GPU.
        pool: as for ``captured``.

    Raises:
        CaptureFailed: as ``captured``.
    """

    def __init__(self, work: Callable[..., Any], inputs: Sequence[Tensor], *, pool: Any = None) -> None:
        self.inputs = tuple(tensor.clone() for tensor in inputs)
        self._graph, self.results = captured(lambda: work(*self.inputs), self.inputs[0].device, pool=pool, alone=True)

    def __call__(self, *inputs: Tensor) -> Any:
        """Replay on these inputs, on the current stream; return the results, which the next call overwrites."""
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given, non_blocking=True)
        self.replay()
        return self.results

    def replay(self) -> None:
        """Replay on the inputs of the last call."""
        self._graph.replay()


def _warm_up(work: Callable[[], Any], device: torch.device, alone: bool) -> None:
    """Run the work as it will be captured; raise if it waits for the GPU, which would break a capture."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    before = torch.cuda.get_sync_debug_mode()
    try:
        with torch.cuda.stream(stream):
            # In this pass libraries compile and choose kernels, and may wait.
            work()
            if alone:
                # The mode applies to all threads.
                torch.cuda.set_sync_debug_mode("error")
            work()
    finally:
        torch.cuda.set_sync_debug_mode(before)
        # Also after a failure: nobody else may write to the same tensors meanwhile.
        torch.cuda.current_stream(device).wait_stream(stream)


@functools.cache
def _stream(index: int) -> torch.cuda.Stream:
    """Return the stream for captures on a device: PyTorch's own belongs to the device that was current first."""
    return torch.cuda.Stream(index)


def _captured(work: Callable[[], Any], graph: torch.cuda.CUDAGraph, device: torch.device, pool: Any) -> Any:
    index = torch.cuda._utils._get_device_index(device, optional=True)
    generator = torch.cuda.default_generators[index]
    kept, current = generator.clone_state(), torch.cuda.current_stream(device)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*[Gg]raph is empty")
            # Only this thread: others, such as one that pins memory for batches to come, go on.
            with torch.cuda.graph(graph, pool=pool, stream=_stream(index), capture_error_mode="thread_local"):
                return work()
    except BaseException:
        # A broken capture leaves its stream current, and a generator that can no longer draw random numbers.
        generator.graphsafe_set_state(kept)
        torch.cuda.set_stream(current)
        raise
