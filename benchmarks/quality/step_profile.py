"""Where the seconds of a training step go, for each network of the comparison, on the CPU.

    python -m benchmarks.quality.step_profile                                    # six networks of tiny size, one core
    python -m benchmarks.quality.step_profile --networks UNet --steps 1 --cases 2    # to try it

PyTorch's profile of some steps of `equal_budget`, by kinds of operation. Writes data/step_profile.json and the section
quality_step_profile of training_speed.md after each network.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from benchmarks.common.command import hippocampus, options, run_command
from benchmarks.common.machine import machine_lines
from benchmarks.common.networks import NETWORKS, SIZES, build
from benchmarks.common.plots import figure
from benchmarks.common.report import Section, bullets, markdown_table, measure_and_write
from benchmarks.common.trials import Task
from matplotlib.figure import Figure
from rich.progress import track
from torch.profiler import ProfilerActivity, profile

from deformux.fitting.fit import fit

_WARM_UP = 2
AUGMENTATION = "augmentation"
# The first kind whose word is in an operation's name.
KINDS = {
    "deformable convolution": ("deform3d",),
    "convolution": ("conv",),
    "matrix product": ("mm", "linear", "dot_product"),
    "normalisation": ("norm",),
    "activation": ("gelu", "relu", "softmax"),
    "optimizer": ("adamw", "_foreach"),
    "copies and layouts": ("copy", "contiguous", "clone", "cat", "permute", "pad", "roll", "mkldnn", "to_dense"),
}
OTHER = "all else"
ALL_KINDS = (AUGMENTATION, *KINDS, OTHER)


def main() -> None:
    parser = options("step_profile", __doc__, seeds=None)
    parser.add_argument("--steps", type=int, default=5, help="steps to profile, after two to warm up")
    parser.add_argument("--size", choices=SIZES, default=SIZES[0], help="of the networks")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS, help="which networks")
    parser.set_defaults(threads=1)
    arguments = parser.parse_args()
    measure_and_write(arguments, "step_profile", lambda: measured(arguments), section)


def measured(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Profile one network after the other; yield the data so far after each."""
    torch.set_num_threads(arguments.threads)
    task = hippocampus(arguments)
    # No more volumes are read than are drawn.
    drawn = task.train[: task.recipe.batch_size * (_WARM_UP + arguments.steps)]
    task = dataclasses.replace(task, train=drawn)
    seconds = {}
    for name in track(arguments.networks, "profiling"):
        seconds[name] = profiled_step(name, arguments.size, task, arguments.steps)
        yield {
            "machine": machine_lines(),
            "size": arguments.size,
            "batch": task.recipe.batch_size,
            "patch": task.prep.patch_size,
            "steps": arguments.steps,
            "seconds": seconds,
        }


def section(data: Mapping[str, Any]) -> Section:
    """Write the seconds of each kind of operation as a table and a plot."""
    seconds = data["seconds"]
    rows = [[kind, *(f"{each[kind]:.2f}" for each in seconds.values())] for kind in ALL_KINDS]
    rows.append(["**all**", *(f"**{sum(each.values()):.2f}**" for each in seconds.values())])
    return Section(
        "training_speed",
        "quality_step_profile",
        f"Where a training step's seconds go, `{data['size']}`",
        [
            *bullets(data["machine"]),
            f"- batch {data['batch']}, patch {'×'.join(map(str, data['patch']))}; mean of {data['steps']} steps, "
            "forward and backward together; all else holds Python, the loss and sums",
            "",
            *markdown_table(("seconds per step", *seconds), rows),
        ],
        _plot(seconds),
    )


class _Steps:
    """A ``stop`` for ``fit`` that starts the profiler after the steps to warm up, and never stops."""

    def __init__(self, profiler: profile) -> None:
        self.profiler, self.done, self.began = profiler, 0, 0.0

    def __call__(self) -> bool:
        self.done += 1
        if self.done == _WARM_UP:
            self.profiler.start()
            self.began = time.perf_counter()
        return False


def profiled_step(name: str, size: str, task: Task, steps: int) -> Counter[str]:
    """Return the seconds of a step by kind of operation."""
    torch.manual_seed(0)
    network = build(name, size, classes=len(task.labels) + 1, patch=task.prep.patch_size)
    profiler = profile(activities=[ProfilerActivity.CPU], acc_events=True)
    counted = _Steps(profiler)
    recipe = task.recipe.in_steps(_WARM_UP + steps, epochs=1)
    fit(network, task.train, recipe=recipe, prep=task.prep, labels=task.labels, stop=counted)
    whole = time.perf_counter() - counted.began
    profiler.stop()
    seconds: Counter[str] = Counter()
    for event in profiler.events():
        seconds[_kind(event)] += event.self_cpu_time_total / 1e6
    seconds[OTHER] += whole - sum(seconds.values())
    return Counter({kind: value / steps for kind, value in seconds.items()})


def _kind(event: Any) -> str:
    above = event
    while above is not None:
        if above.name.startswith("enumerate(DataLoader)"):
            return AUGMENTATION
        above = above.cpu_parent
    name = event.name.lower()
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), OTHER)


def _plot(seconds: Mapping[str, Mapping[str, float]]) -> Figure:
    plot = figure(height=1.6 + 0.4 * len(seconds))
    axes = plot.add_subplot()
    names = list(seconds)[::-1]
    left = np.zeros(len(names))
    for kind in ALL_KINDS:
        values = np.array([seconds[name][kind] for name in names])
        axes.barh(names, values, left=left, label=kind)
        left += values
    axes.set_xlabel("seconds per step")
    axes.legend(frameon=False, fontsize=8)
    return plot


if __name__ == "__main__":
    run_command(main)
