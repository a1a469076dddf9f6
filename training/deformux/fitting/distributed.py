"""One training in several processes: gradients are averaged, and every decision is the same in all of them.

``batch_size`` is the total of a step, and each process takes an equal part of it. The loss is a Dice and a cross
entropy over that part; the mean gradient of n such losses is not quite the gradient of one loss over all patches. So n
processes train as well as one, but not to the same bits.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["ALONE", "Ranks", "connected", "joined"]

_T = TypeVar("_T")


@dataclass(frozen=True)
class Ranks:
    """One process of a distributed training; a single process communicates with nobody.

    All processes must call the same methods in the same order.

    Args:
        rank: number of this process, from 0.
        size: number of processes.
        local: number of the processes on this machine.
        device: where this process computes.
    """

    rank: int = 0
    size: int = 1
    local: int = 1
    device: str = "cpu"

    @property
    def is_writer(self) -> bool:
        """Return whether this process writes checkpoints, results and progress."""
        return self.rank == 0

    def part(self, items: Sequence[_T]) -> Sequence[_T]:
        """Return every ``size``-th of the items, from number ``rank`` on."""
        return items[self.rank :: self.size]

    def share(self, number: int, what: str) -> int:
        """Return each process's part of a number; raise ValueError if it cannot be divided."""
        if number % self.size:
            raise ValueError(
                f"{what} must be a multiple of the number of processes; got {number} for {self.size} processes"
            )
        return number // self.size

    def broadcast(self, module: nn.Module) -> None:
        """Copy the writer's weights and buffers of a module to all processes."""
        self.broadcast_tensors(module.state_dict().values())

    def broadcast_tensors(self, tensors: Iterable[Tensor]) -> None:
        """Copy the writer's values of tensors to all processes."""
        if self.size == 1:
            return
        for value in tensors:
            sent = value.contiguous()
            dist.broadcast(sent, 0)
            value.copy_(sent)

    def average(self, parameters: Iterable[nn.Parameter], loss: Tensor) -> Tensor:
        """Make each gradient the mean over all processes, and return the mean loss.

        A missing gradient counts as zero, unless it is missing in all processes. While none is missing, the CPU does
        not wait for the GPU.
        """
        if self.size == 1:
            return loss
        learning = [parameter for parameter in parameters if parameter.requires_grad]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in learning]
        present = torch.tensor([p.grad is not None for p in learning], dtype=loss.dtype, device=loss.device)
        flat = torch.cat([*(gradient.flatten() for gradient in gradients), present, loss.detach().reshape(1)])
        dist.all_reduce(flat)
        *means, present, total = flat.split([*(gradient.numel() for gradient in gradients), len(learning), 1])
        torch._foreach_copy_(gradients, [mean.view_as(g) for mean, g in zip(means, gradients, strict=True)])
        torch._foreach_div_(gradients, self.size)
        missing = [i for i, parameter in enumerate(learning) if parameter.grad is None]
        if missing:
            anywhere = present.tolist()
            for i in missing:
                learning[i].grad = gradients[i] if anywhere[i] else None
        return total[0] / self.size

    def any_process(self, flag: bool) -> bool:
        """Return whether the flag is set in any of the processes."""
        if self.size == 1:
            return flag
        flags = torch.tensor([int(flag)])
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags.item())

    def from_writer(self, get: Callable[[], Any]) -> Any:
        """Return the function's result, plain values that JSON can hold, to all processes; only the writer calls it."""
        if self.size == 1:
            return get()
        return self.gather(get() if self.is_writer else None)[0]

    def gather(self, value: _T) -> list[_T]:
        """Return the values of all processes, by rank; plain values that JSON can hold."""
        if self.size == 1:
            return [value]
        # As text: PyTorch's own collectives of objects would load pickles.
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(own)]))
        longest = max(int(length) for length in lengths)
        texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(texts, nn.functional.pad(own, (0, longest - len(own))))
        return [json.loads(bytes(text[: int(length)].tolist())) for text, length in zip(texts, lengths, strict=True)]


ALONE = Ranks()


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Join the processes that ``torchrun`` started; without ``torchrun`` this process is alone.

    Args:
        device: ``cpu``, or ``cuda`` for the GPU of the process's local rank.

    Raises:
        ValueError: a particular GPU is asked for, or this machine has fewer GPUs than processes.
    """
    size = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if size == 1:
        yield Ranks(device=device)
        return
    number, local = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if device.startswith("cuda"):
        if device != "cuda":
            raise ValueError(f"each process takes the GPU of its local rank: use --device cuda; got {device!r}")
        if local > torch.cuda.device_count():
            raise ValueError(
                f"{local} processes need as many GPUs, and this machine has {torch.cuda.device_count()}; "
                "start fewer with --nproc-per-node, or use --device cpu"
            )
        device = f"cuda:{number}"
    with connected(Ranks(int(os.environ["RANK"]), size, local, device)) as ranks:
        yield ranks


@contextmanager
def connected(ranks: Ranks, store: dist.Store | None = None) -> Iterator[Ranks]:
    """Connect the processes: tensors of a GPU by NCCL, those of the CPU by Gloo.

    Args:
        ranks: this process among them.
        store: where they find each other; None for the environment that ``torchrun`` sets.
    """
    on_gpu = ranks.device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(ranks.device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo", store=store, rank=ranks.rank, world_size=ranks.size
    )
    try:
        yield ranks
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
