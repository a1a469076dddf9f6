"""The host's microseconds for one call of the operator, and where they go.

    python -m benchmarks.operator.host_time [--before FOLDER] [--results FOLDER]

It runs on a GPU if there is one, otherwise on the CPU, and takes about 20 seconds. On a GPU calls are only queued; on
the CPU a whole call includes its work, and the GPU's launcher runs on CPU tensors and starts nothing. ``--before``
names a folder with another version of the package ``deform3d``, measured in turns with this one. Writes
data/host_time.json and the section host_time of operator_gpu.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from benchmarks.common.machine import machine_lines
from benchmarks.common.report import Section, add_results, bullets, markdown_table, measure_and_write
from torch import Tensor
from torch.nn import functional as F

from deform3d import _autograd, _launch, deform_conv3d
from deform3d._checks import check
from deform3d._dispatch import choose_backend

# The problem of the page's first table, and the deepest stage of `tiny` in a patch of 32x48x32 voxels.
SHAPES = ((1, 16, 4, 4, 4), (2, 128, 2, 3, 2))
# The GPU's queue holds this number of calls: the host never waits.
CALLS, TURNS = 10, 25
ONES = (1, 1, 1)
Runs = dict[str, Callable[[], object]]


def main() -> None:
    """Measure, print, and keep the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, metavar="FOLDER")
    add_results(parser)
    parser.add_argument("--rounds", type=int, default=2, help="of each version, in turns")
    parser.add_argument("--only-measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only_measure:
        print(json.dumps(call_times()))
        return
    packages = {"now": Path(deform_conv3d.__code__.co_filename).parents[1]}
    if arguments.before:
        packages = {"before": arguments.before.resolve(), **packages}
    measure_and_write(arguments, "host_time", lambda: measured(packages, arguments.rounds), section)


def measured(packages: dict[str, Path], rounds: int) -> dict[str, Any]:
    """Measure microseconds by call and package: the least of all rounds, for other work only adds to them."""
    rows: dict[str, dict[str, float]] = {}
    for _ in range(rounds):
        for name, folder in packages.items():
            path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
            command = [sys.executable, "-m", "benchmarks.operator.host_time", "--only-measure"]
            done = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
            )
            for what, us in json.loads(done.stdout.splitlines()[-1]).items():
                kept = rows.setdefault(what, {})
                kept[name] = min(us, kept.get(name, us))
    return {"us_per_call": rows, "machine": machine_lines()}


def call_times() -> dict[str, float]:
    """Return microseconds per call of everything, with the package that this process has imported."""
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results: dict[str, float] = {}
    for shape in SHAPES:
        label = "x".join(map(str, shape))
        results.update(least(named(label, whole_calls(shape, device))))
    tensors = problem(SHAPES[0], device)
    results.update(least(pieces(tensors)))
    with backend(EMPTY):
        results.update(least(named("no backend", calls(tensors, operator))))
    recorder = Idle()
    with backend(launcher(recorder)):
        results.update(least(named("launcher that starts nothing", calls(tensors, operator))))
        with deterministic():
            results.update(least(named("launcher that starts nothing, deterministic", calls(tensors, operator))))
        recorder.count = 0
        forward_and_backward(operator, tensors, leaves(tensors))()
    if device.type == "cuda":
        with deterministic():
            results.update(least(named("deterministic", calls(tensors, operator))))
    results["kernels that a forward and a backward start"] = recorder.count
    return results


def named(label: str, runs: Runs) -> Runs:
    """Return the runs with a label before their names."""
    return {f"{label}: {name}": run for name, run in runs.items()}


def least(runs: Runs) -> dict[str, float]:
    """Time the runs in turns; return the least microseconds per call of each."""
    best = dict.fromkeys(runs, float("inf"))
    for turn in range(TURNS):
        for name, run in runs.items():
            settle()
            began = time.perf_counter()
            for _ in range(CALLS):
                run()
            if turn > 1:  # the first turns compile
                best[name] = min(best[name], (time.perf_counter() - began) / CALLS * 1e6)
    settle()
    return best


def settle() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def problem(shape: Sequence[int], device: torch.device) -> list[Tensor]:
    """Return input, offsets, depthwise 3x3x3 weight and bias, laid out as in a channels-last network."""
    batch, channels, *size = shape
    shapes = (tuple(shape), (batch, 81, *size), (channels, 1, 3, 3, 3), (channels,))
    tensors = [torch.randn(s, device=device) for s in shapes]
    return [t.contiguous(memory_format=torch.channels_last_3d) for t in tensors[:2]] + tensors[2:]


def operator(input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Call the function under test."""
    return deform_conv3d(input, offset, weight, bias, padding=1)


def depthwise(input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # noqa: ARG001 - as `operator`
    """Call the yardstick, PyTorch's depthwise convolution of the same sizes."""
    return F.conv3d(input, weight, bias, padding=1, groups=input.shape[1])


def whole_calls(shape: Sequence[int], device: torch.device) -> Runs:
    """Return calls of the operator and of its yardstick."""
    tensors = problem(shape, device)
    functions = {"deform_conv3d": operator, "depthwise conv3d": depthwise}
    return {
        f"{name}, {kind}": run for name, function in functions.items() for kind, run in calls(tensors, function).items()
    }


def calls(tensors: Sequence[Tensor], function: Callable[..., Tensor]) -> Runs:
    """Return calls of a function without autograd, and as in a training step."""

    @torch.no_grad()
    def forward() -> None:
        function(*tensors)

    return {
        "forward": forward,
        "forward + sum + backward": forward_and_backward(function, tensors, leaves(tensors)),
    }


def leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors as leaves of a graph."""
    return [t.clone().requires_grad_() for t in tensors]


def forward_and_backward(
    function: Callable[..., Tensor], tensors: Sequence[Tensor], inputs: Sequence[Tensor]
) -> Callable[[], object]:
    """Return a run of the function and of its backward, for every input that it has a gradient of."""
    used = [x for x, t in zip(inputs, tensors, strict=True) if function is operator or t is not tensors[1]]
    return lambda: torch.autograd.grad(function(*inputs).sum(), used)


def pieces(tensors: Sequence[Tensor]) -> Runs:
    """Return parts of a call by themselves."""
    input, offset, weight, bias = tensors
    return {
        "checks": lambda: check(input, offset, weight, bias, None, ONES, ONES, ONES),
        "choice of the backend": lambda: choose_backend(input.device, input.dtype, None),
        "an empty tensor": lambda: torch.empty_like(input),
    }


class Idle:
    """A runtime of the launcher that counts what it is asked to start, for a GPU of 132 multiprocessors."""

    tuning = _launch.Tuning()
    count = 0

    def launch(self, *arguments: object) -> None:  # noqa: ARG002 - the launcher's signature
        """Count."""
        self.count += 1

    def multiprocessors(self, device: torch.device) -> int:  # noqa: ARG002 - the launcher's signature
        """Return the number of an H100 or H200."""
        return 132


def launcher(runtime: Idle) -> Any:
    """Return the CUDA backend with a different runtime."""
    return SimpleNamespace(
        forward=lambda *arguments: _launch.forward(runtime, *arguments),
        backward=lambda *arguments: _launch.backward(runtime, *arguments),
    )


def _empty_gradients(_grad: Tensor, input: Tensor, offset: Tensor, weight: Tensor, *_rest: object) -> list[Any]:
    return [torch.empty_like(input), torch.empty_like(offset), torch.empty_like(weight), weight[:, 0, 0, 0, 0], None]


EMPTY = SimpleNamespace(forward=lambda input, *_rest: torch.empty_like(input), backward=_empty_gradients)


@contextmanager
def backend(module: Any) -> Iterator[None]:
    """Put another backend below the operator: what is left is the Python function, the dispatcher and autograd."""
    before = _autograd._module
    _autograd._module = lambda *_: module
    try:
        yield
    finally:
        _autograd._module = before


@contextmanager
def deterministic() -> Iterator[None]:
    """Switch on PyTorch's deterministic mode, which on a GPU sorts samples in a different way."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def section(data: Mapping[str, Any]) -> Section:
    """Write the times as a table."""
    rows = data["us_per_call"]
    packages = tuple(next(iter(rows.values())))
    return Section(
        "operator_gpu",
        "host_time",
        "Host time of one call",
        [
            "Microseconds of the host per call, float32, one thread, the least of many turns. Without a GPU a whole",
            "call includes its work; parts are of the first problem. The launcher that starts nothing shows the host's",
            "work without starting kernels, which is the rest of a whole call on a GPU. What runs without a backend is",
            "the function, PyTorch's dispatcher and autograd.",
            "",
            *markdown_table(
                ("", *packages), [(what, *(f"{us[name]:.1f}" for name in packages)) for what, us in rows.items()]
            ),
            *bullets(data["machine"]),
        ],
    )


if __name__ == "__main__":
    main()
