"""Where the seconds of a training step go, for each network of the comparison, on the CPU.

    python -m benchmarks.quality.step_profile                                    # six networks of tiny size, one core
    python -m benchmarks.quality.step_profile --networks UNet --steps 1 --cases 2    # to try it

What PyTorch's profiler says of some steps of `equal_budget`, by kinds of operation. Writes quality_step_profile.md,
.csv and .png.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from typing import Any

import numpy as np
import torch
from benchmarks.common.command import hippocampus, options, run
from benchmarks.common.machine import machine_lines
from benchmarks.common.networks import NETWORKS, SIZES, build
from benchmarks.common.report import figure, table, write_report
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
    parser.add_argument("--steps", type=int, default=5, help="that are profiled, after two to warm up")
    parser.add_argument("--size", choices=SIZES, default=SIZES[0], help="of the networks")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS, help="which networks")
    parser.set_defaults(threads=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    task = hippocampus(arguments)
    # No more volumes are read than are drawn.
    drawn = task.train[: task.recipe.batch_size * (_WARM_UP + arguments.steps)]
    task = dataclasses.replace(task, train=drawn)
    seconds = {}
    for name in track(arguments.networks, "profiling"):
        seconds[name] = profiled_step(name, arguments.size, task, arguments.steps)
        write_report(
            arguments.results,
            "step_profile",
            title=f"Where a training step's seconds go, `{arguments.size}`",
            lines=[
                *(f"- {line}" for line in machine_lines()),
                f"- batch {task.recipe.batch_size}, patch {'×'.join(map(str, task.prep.patch_size))}; mean of "
                f"{arguments.steps} steps, forward and backward together; all else holds Python, the loss and sums",
                "",
                *table(
                    ("seconds per step", *seconds),
                    [[kind, *(f"{each[kind]:.2f}" for each in seconds.values())] for kind in ALL_KINDS]
                    + [["**all**", *(f"**{sum(each.values()):.2f}**" for each in seconds.values())]],
                ),
            ],
            rows=[
                ("network", *ALL_KINDS),
                *((name, *(f"{each[kind]:.4f}" for kind in ALL_KINDS)) for name, each in seconds.items()),
            ],
            plot=_plot(seconds),
        )
    print((arguments.results / "quality_step_profile.md").read_text())


class _Steps:
    """Starts the profiler after the steps to warm up; asked after each whether to stop."""

    def __init__(self, profiler: profile) -> None:
        self.profiler, self.done, self.began = profiler, 0, 0.0

    def __call__(self) -> bool:
        self.done += 1
        if self.done == _WARM_UP:
            self.profiler.start()
            self.began = time.perf_counter()
        return False


def profiled_step(name: str, size: str, task: Task, steps: int) -> Counter[str]:
    """Seconds of a step by kind of operation."""
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


def _plot(seconds: dict[str, Counter[str]]) -> Figure:
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
    run(main)
