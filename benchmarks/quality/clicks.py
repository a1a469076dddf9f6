"""Gain in Dice from clicks on ``val``, and the time that a case costs an annotator with and without the model.

    python -m benchmarks.quality.clicks --model best_tiny.safetensors
    python -m benchmarks.quality.clicks --model hippocampus --cases 2      # to try it

Simulated annotators click into the largest errors, as in ``deformux clicks``. With the model a case costs the
automatic segmentation and the clicks to a Dice; a click costs the model's answer and ``--click-seconds`` of the
annotator. Without the model every slice that holds a label is drawn, ``--slice-seconds`` each, along the axis with the
fewest such slices. Both times of the annotator are assumptions, the rest is measured. A case that does not reach the
Dice within 20 clicks costs these and its drawing. A killed run resumes after the last finished case. Adds each case to
data/clicks.json and rewrites the section quality_clicks of clicks.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np
import torch
from benchmarks.common.command import options, run_command
from benchmarks.common.machine import machine_lines
from benchmarks.common.report import (
    Section,
    bullets,
    data_file,
    markdown_table,
    read_data,
    read_section,
    rounded,
    write_data,
    write_section,
)
from benchmarks.common.trial_report import spread
from rich.progress import track

from deformux.cli.common import model_path
from deformux.cli.devices import torch_device
from deformux.data.cases import Case, find_cases
from deformux.inference.sliding_window import segment
from deformux.interactive.click_benchmark import THRESHOLDS, CaseResult, Robot, play_case, summarise_clicks
from deformux.interactive.click_report import click_rows, plot_clicks
from deformux.networks.deformux_net import DeformUXNet
from deformux.networks.model_file import ModelCard, load_model, with_guidance

_ROBOTS = (Robot("centred"), Robot("jittered", 0.5))
_CAP = 20


@dataclass(frozen=True)
class Played:
    """Result of one case: simulated clicks, seconds of the automatic segmentation, and slices to draw without it."""

    robots: tuple[CaseResult, ...]
    automatic_s: float
    slices: int


def main() -> None:
    parser = options("clicks", __doc__, seeds=None)
    parser.add_argument("--model", required=True, help="model file with its card, or the name of a shipped model")
    parser.add_argument(
        "--goal", type=float, choices=THRESHOLDS, default=THRESHOLDS[-1], help="mean Dice at which a case is done"
    )
    parser.add_argument("--click-seconds", type=float, default=3.0, help="an annotator's, to look and to click")
    parser.add_argument("--slice-seconds", type=float, default=15.0, help="an annotator's, to draw one slice")
    arguments = parser.parse_args()
    device, threads = torch_device(arguments.device), arguments.threads
    torch.set_num_threads(threads)
    path = model_path(arguments.model)
    network, card = load_model(path, device=device)
    network = with_guidance(network).to(device).eval()
    key = f"{hashlib.sha256(path.read_bytes()).hexdigest()[:10]} {device}-{threads}"
    file = data_file(arguments.results, "clicks")
    data = read_data(arguments.results, "clicks") if file.is_file() else {"machines": {}, "cases": {}}
    machines, kept = data["machines"].setdefault(key, []), data["cases"]
    cases = find_cases(arguments.data, subset="val")[: arguments.cases]
    played: list[Played] = []
    for case in track(cases, "clicking"):
        name = f"{key} {case.id}"
        if name not in kept and arguments.rewrite:
            continue
        if name not in kept:
            kept[name] = rounded(dataclasses.asdict(_play(network, card, case, device)))
            machines += [line for line in machine_lines() if line not in machines]
            write_data(arguments.results, "clicks", data)
        played.append(_played(kept[name]))
        _report(arguments, card, played, machines, len(cases))
    print(read_section(arguments.results, "clicks", "quality_clicks"))


def _play(network: DeformUXNet, card: ModelCard, case: Case, device: str) -> Played:
    began = time.perf_counter()
    segment(network, case.image, card.preprocessing, device=device)
    automatic_s = time.perf_counter() - began
    results = play_case(network, case, card.preprocessing, labels=card.labels, robots=_ROBOTS, cap=_CAP, device=device)
    drawn = np.asarray(nib.load(case.label).dataobj) > 0
    across = [tuple({0, 1, 2} - {axis}) for axis in range(3)]
    return Played(tuple(results), automatic_s, min(int(drawn.any(axis=axes).sum()) for axes in across))


def _played(values: Mapping[str, Any]) -> Played:
    robots = tuple(CaseResult(**robot) for robot in values["robots"])
    return Played(robots, values["automatic_s"], values["slices"])


def _report(
    arguments: argparse.Namespace, card: ModelCard, played: Sequence[Played], machine: Sequence[str], planned: int
) -> None:
    results = [result for case in played for result in case.robots]
    trained = "with" if card.network_options.get("guidance") else "without"
    head, *rows = click_rows(summarise_clicks(results))
    drawing = [arguments.slice_seconds * case.slices for case in played]
    costs = {
        (robot.name, goal): [_seconds(arguments, case, index, goal) for case in played]
        for index, robot in enumerate(_ROBOTS)
        for goal in THRESHOLDS
    }
    section = Section(
        "clicks",
        "quality_clicks",
        "What clicks gain, and what a case costs",
        [
            *bullets(machine),
            f"- model `{arguments.model}`, preset `{card.preset}`, trained {trained} clicks on "
            f"{len(card.training_cases)} volumes",
            f"- {len(played)} of {planned} `val` volumes; "
            f"simulated annotators of `deformux clicks`, at most {_CAP} clicks",
            f"- **assumed**: {arguments.click_seconds:g} s of an annotator's time per click, "
            f"{arguments.slice_seconds:g} s per slice that is drawn; measured: the model's time, clicks, slices",
            "",
            *markdown_table(head, rows),
            "### Seconds that a case costs, mean over cases ± their deviation, and times drawing",
            "",
            *markdown_table(
                ("", *(f"to Dice {goal:.2f}" for goal in THRESHOLDS)),
                [
                    ("without the model, every slice drawn", *[spread(drawing, 0)] * len(THRESHOLDS)),
                    *(
                        (
                            f"with the model, {robot.name} clicks",
                            *(_compared(costs[robot.name, goal], drawing) for goal in THRESHOLDS),
                        )
                        for robot in _ROBOTS
                    ),
                ],
            ),
            "![Dice over clicks](quality_clicks.png)",
        ],
    )
    write_section(arguments.results, section)
    plot_clicks(arguments.results / "quality_clicks.png", results)


def _seconds(arguments: argparse.Namespace, case: Played, robot: int, goal: float) -> float:
    result = case.robots[robot]
    needed = result.clicks_to(goal)
    clicks = len(result.seconds) if needed is None else needed
    cost = case.automatic_s + sum(result.seconds[:clicks]) + arguments.click_seconds * clicks
    return cost + (arguments.slice_seconds * case.slices if needed is None else 0.0)


def _compared(cost: Sequence[float], drawing: Sequence[float]) -> str:
    return f"{spread(cost, 0)} ({np.mean(cost) / np.mean(drawing):.2f}×)"


if __name__ == "__main__":
    run_command(main)
