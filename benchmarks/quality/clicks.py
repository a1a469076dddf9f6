"""What clicks buy on ``val``, and what a case costs an annotator with and without the model.

    python -m benchmarks.quality.clicks --model best_tiny.safetensors
    python -m benchmarks.quality.clicks --model hippocampus --cases 2      # to try it

Robots click into the largest errors, as ``deformux clicks``. With the model a case costs the automatic segmentation,
and the clicks to a Dice, each the model's answer and ``--click-seconds`` of the annotator's. Without it
every slice that holds a label is drawn, ``--slice-seconds`` each, along the axis with the fewest such slices. Both
times of the annotator are assumptions, the rest is measured. A case where the Dice is not reached within 20 clicks
costs these and its drawing. A run that was killed goes on after the last finished case. Writes quality_clicks.md, .csv
and .png after each case.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from benchmarks.common.command import options, run
from benchmarks.common.machine import machine_lines
from benchmarks.common.report import spread, table, write_report
from rich.progress import track

from deformux.cli.common import model_path
from deformux.cli.devices import torch_device
from deformux.data.atomic_files import write_text
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
    """One case: what the robots did, seconds of the automatic segmentation, and slices that would have to be drawn."""

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
    kept = arguments.work / hashlib.sha256(path.read_bytes()).hexdigest()[:10] / f"{device}-{threads}"
    cases = find_cases(arguments.data, subset="val")[: arguments.cases]
    played: list[Played] = []
    for case in track(cases, "clicking"):
        file = kept / f"{case.id}.json"
        if not file.is_file():
            write_text(file, json.dumps(dataclasses.asdict(_play(network, card, case, device))))
        played.append(_read(file))
        _report(arguments, card, played, len(cases))
    print((arguments.results / "quality_clicks.md").read_text())


def _play(network: DeformUXNet, card: ModelCard, case: Case, device: str) -> Played:
    began = time.perf_counter()
    segment(network, case.image, card.preprocessing, device=device)
    automatic_s = time.perf_counter() - began
    results = play_case(network, case, card.preprocessing, labels=card.labels, robots=_ROBOTS, cap=_CAP, device=device)
    drawn = np.asarray(nib.load(case.label).dataobj) > 0
    across = [tuple({0, 1, 2} - {axis}) for axis in range(3)]
    return Played(tuple(results), automatic_s, min(int(drawn.any(axis=axes).sum()) for axes in across))


def _read(file: Path) -> Played:
    values = json.loads(file.read_text())
    return Played(tuple(CaseResult(**robot) for robot in values.pop("robots")), **values)


def _report(arguments: argparse.Namespace, card: ModelCard, played: Sequence[Played], planned: int) -> None:
    results = [result for case in played for result in case.robots]
    trained = "with" if card.network_options.get("guidance") else "without"
    head, *rows = click_rows(summarise_clicks(results))
    drawing = [arguments.slice_seconds * case.slices for case in played]
    costs = {
        (robot.name, goal): [_seconds(arguments, case, index, goal) for case in played]
        for index, robot in enumerate(_ROBOTS)
        for goal in THRESHOLDS
    }
    write_report(
        arguments.results,
        "clicks",
        title="What clicks buy",
        lines=[
            *(f"- {line}" for line in machine_lines()),
            f"- model `{arguments.model}`, preset `{card.preset}`, trained {trained} clicks on "
            f"{len(card.training_cases)} volumes",
            f"- {len(played)} of {planned} `val` volumes; robots of `deformux clicks`, at most {_CAP} clicks",
            f"- **assumed**: {arguments.click_seconds:g} s of an annotator's time per click, "
            f"{arguments.slice_seconds:g} s per slice that is drawn; measured: the model's time, clicks, slices",
            "",
            *table(head, rows),
            "## Seconds that a case costs, mean over cases ± their deviation, and times drawing",
            "",
            *table(
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
        ],
        rows=[
            ("case", "robot", "to_dice", "clicks", "cost_s", "drawing_s"),
            *(
                (case.robots[index].case, robot.name, goal, case.robots[index].clicks_to(goal), f"{cost:.1f}", drawn)
                for index, robot in enumerate(_ROBOTS)
                for goal in THRESHOLDS
                for case, cost, drawn in zip(played, costs[robot.name, goal], drawing, strict=True)
            ),
        ],
    )
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
    run(main)
