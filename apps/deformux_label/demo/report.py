"""The report of a demo: one HTML file with a table of the rounds and figures, and the figures as files."""

from __future__ import annotations

import base64
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from deformux.data.atomic_files import replacing, write_text
from deformux.inference.metrics import mean_dice
from deformux_label.demo import figures
from deformux_label.demo.cohort import Cohort
from deformux_label.demo.figures import DemoRound

__all__ = ["DemoResults", "save_report", "save_round", "write_html"]


@dataclass
class DemoResults:
    """Results of the rounds so far, with the predicted file and the Dice per label of each scored volume."""

    rounds: list[DemoRound] = field(default_factory=list)
    predictions: list[dict[str, Path]] = field(default_factory=list)
    dice: list[dict[str, npt.NDArray[np.float64]]] = field(default_factory=list)

    def median_volume(self) -> str:
        """Return the volume with the median mean Dice of the last round."""
        dice = self.dice[-1]
        ranked = sorted(dice, key=lambda name: float(np.nan_to_num(np.nanmean(dice[name]))))
        return ranked[len(ranked) // 2]


def save_round(cohort: Cohort, results: DemoResults, output: Path) -> None:
    """Write the figure of the last round, and ``rounds.json`` with the results so far."""
    last = results.rounds[-1]
    name = results.median_volume()
    volume = cohort.volume(name)
    reached = f"{last.labelled} labelled, mean Dice {last.mean_dice:.3f} on the other {last.unlabelled}"
    figures.save_comparison(
        output / f"round_{last.number}.png",
        figures.read_scan(volume.image, modality=cohort.modality),
        volume.canonical_truth(),
        figures.read_label(results.predictions[-1][name]),
        cohort.labels,
        title=f"Round {last.number}: {reached} (shown: {name})",
        dice=dict(zip(cohort.labels, map(float, results.dice[-1][name]), strict=True)),
    )
    records = [
        asdict(done) | {"volumes": {name: values.tolist() for name, values in dice.items()}}
        for done, dice in zip(results.rounds, results.dice, strict=True)
    ]
    write_text(output / "rounds.json", json.dumps(records, indent=1))


def save_report(cohort: Cohort, results: DemoResults, facts: Mapping[str, str], output: Path) -> None:
    """Write the montage, the learning curve and ``report.html``, which contains them, the table and the ``facts``."""
    rounds, name = results.rounds, results.median_volume()
    volume = cohort.volume(name)
    truth = volume.canonical_truth()
    columns: list[tuple[str, npt.NDArray[np.uint8] | None]] = [(cohort.modality.upper(), None), ("truth", truth)]
    for number in dict.fromkeys((0, len(rounds) - 1)):
        dice = mean_dice(results.dice[number][name])
        title = f"after {rounds[number].labelled} labelled volumes\nDice {dice:.3f}"
        columns.append((title, figures.read_label(results.predictions[number][name])))
    scan = figures.read_scan(volume.image, modality=cohort.modality)
    montage = figures.save_montage(
        output / "montage.png", scan, columns, truth, rounds, cohort.labels,
        title=f"DeformUX-Net taught through MONAI Label by a simulated radiologist: {cohort.description}",
    )  # fmt: skip
    curve = figures.save_learning_curve(
        output / "learning_curve.png", rounds, cohort.labels, title="Dice while a simulated radiologist labels"
    )
    pictures = [(montage, f"{name}, never labelled in this run: before and after the later corrections")]
    pictures += [(curve, "Learning curve")]
    pictures += [(output / f"round_{done.number}.png", f"After round {done.number}") for done in rounds]
    write_html(
        output / "report.html",
        title="DeformUX Label demo",
        rounds=rounds,
        labels=cohort.labels,
        pictures=pictures,
        facts={**facts, **_versions()},
    )


def write_html(
    path: Path,
    *,
    title: str,
    rounds: Sequence[DemoRound],
    labels: Sequence[str],
    pictures: Sequence[tuple[Path, str]],
    facts: Mapping[str, str],
) -> Path:
    """Write a report in one HTML file: a table of the rounds, the ``pictures`` (path, caption) embedded, ``facts``."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["score"] = _score
    page = environment.get_template("report.html.j2").render(
        title=title,
        rounds=rounds,
        labels=labels,
        held_out=any(done.held_out_dice is not None for done in rounds),
        pictures=[(base64.b64encode(png.read_bytes()).decode("ascii"), caption) for png, caption in pictures],
        facts=facts,
    )
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _score(value: float | None) -> str:
    return "–" if value is None or np.isnan(value) else f"{value:.3f}"


def _versions() -> dict[str, str]:
    gpu = "CUDA" if torch.cuda.is_available() else "no GPU"
    return {
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, {gpu}",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
    }
