"""`make demo`: a simulated radiologist teaches DeformUX-Net through a real MONAI Label server.

Each round: take the samples the server offers, correct its segmentations, submit them, train, and segment every
volume that is still unlabelled. The server sees images only; truth and Dice stay on this side of HTTP.
"""

from __future__ import annotations

import json
import logging
import platform
import shutil
import signal
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Annotated

import nibabel as nib
import numpy as np
import numpy.typing as npt
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from deformux.data.atomic_files import write_text
from deformux.data.cases import InvalidFolder
from deformux.data.preprocessing import geometry_difference
from deformux.data.volume_reader import read_volume
from deformux.inference.metrics import dice_per_label, mean_dice
from deformux.interactive.simulated_annotator import WholeLabelAnnotator
from deformux_label.cli.common import app_folder
from deformux_label.demo import report
from deformux_label.demo.cohort import Cohort, Volume, open_cohort, synthetic_cohort
from deformux_label.demo.server_process import AnnotationClient, PlayerError, Server
from deformux_label.lib.configs.project import InvalidOption, Project

__all__ = ["Plan", "main", "run"]

MODEL = "segmentation"
_MARKER = ".deformux-demo"
Labels = npt.NDArray[np.uint8]


class DemoError(RuntimeError):
    """The demo cannot run; the message is one sentence for the user."""


@dataclass(frozen=True)
class Plan:
    """How much is labelled and trained: `first` volumes in round 1, then `batch` per round; `steps` per training.

    The first training starts from nothing and takes twice the steps.
    """

    rounds: int = 3
    first: int = 3
    batch: int = 2
    steps: int = 60
    strategy: str = "uncertainty"

    def steps_in(self, number: int) -> int:
        """Return the training steps of a round, counted from 1."""
        return self.steps * (2 if number == 1 else 1)

    def check(self, volumes: int) -> None:
        """Raise DemoError unless some of the `volumes` stay unlabelled in the last round."""
        if min(self.rounds, self.first, self.batch, self.steps) < 1:
            raise DemoError(
                "rounds, first, batch and steps must be at least 1; "
                f"got {self.rounds}, {self.first}, {self.batch} and {self.steps}"
            )
        labelled = self.first + (self.rounds - 1) * self.batch
        if labelled >= volumes:
            raise DemoError(
                f"{self.rounds} rounds label {labelled} of {volumes} volumes and leave none to score: "
                "use more volumes or fewer rounds"
            )


@dataclass
class _Shown:
    """What the pictures need: predictions per round and volume id."""

    predictions: list[dict[str, Path]] = field(default_factory=list)
    dice: list[dict[str, npt.NDArray[np.float64]]] = field(default_factory=list)

    def middle(self, number: int) -> str:
        """Return the volume whose mean Dice is the median of a round: neither the best nor the worst."""
        ranked = sorted(self.dice[number], key=lambda name: float(np.nan_to_num(np.nanmean(self.dice[number][name]))))
        return ranked[len(ranked) // 2]


class _Teaching:
    """The rounds over one server: annotate, train, predict."""

    def __init__(
        self, cohort: Cohort, plan: Plan, client: AnnotationClient, output: Path, progress: Progress, whole: TaskID
    ) -> None:
        self.cohort, self.plan, self.client, self.output = cohort, plan, client, output
        self.progress, self.whole = progress, whole
        self.annotator = WholeLabelAnnotator(cohort.labels)
        self.labelled: set[str] = set()
        self.shown = _Shown()
        self.held_out_dice: list[dict[str, list[float]]] = []

    @staticmethod
    def work(cohort: Cohort, plan: Plan) -> float:
        """Return the expected work in units of one segmentation, for the remaining time shown."""
        labelled = [plan.first + i * plan.batch for i in range(plan.rounds)]
        predictions = sum(len(cohort.volumes) - n + len(cohort.held_out) for n in labelled)
        return predictions + labelled[-1] + sum(map(plan.steps_in, range(1, plan.rounds + 1)))

    def run_round(self, number: int) -> report.Round:
        start = time.monotonic()
        strategy = "first" if number == 1 else self.plan.strategy
        edited = self._annotate(number, self.plan.first if number == 1 else self.plan.batch, strategy)
        training_seconds = self._train(number)
        unlabelled = [v for v in self.cohort.volumes if v.id not in self.labelled]
        folder = self.output / "predictions" / f"round_{number}"
        scores = self._predict(number, unlabelled, folder)
        held_out = self._predict(number, self.cohort.held_out, folder / "held_out", uploaded=True)
        self.shown.predictions.append({v.id: folder / f"{v.id}.nii.gz" for v in unlabelled})
        self.shown.dice.append(scores)
        self.held_out_dice.append({name: values.tolist() for name, values in held_out.items()})
        table = np.array(list(scores.values()))
        return report.Round(
            number=number,
            labelled=len(self.labelled),
            unlabelled=len(unlabelled),
            dice={name: mean_dice(table[:, i : i + 1]) for i, name in enumerate(self.cohort.labels)},
            mean_dice=mean_dice(table),
            edited=edited,
            seconds=time.monotonic() - start,
            training_seconds=training_seconds,
            held_out_dice=mean_dice(list(held_out.values())) if held_out else None,
        )

    def _annotate(self, number: int, count: int, strategy: str) -> float:
        """Correct and submit `count` volumes; return the share of foreground that had to be changed."""
        changed = foreground = 0
        task = self.progress.add_task(f"round {number}: correcting", total=count)
        for _ in range(count):
            image_id = self.client.next_sample(strategy)
            volume = self.cohort.volume(image_id)
            if image_id in self.labelled:
                raise PlayerError(f"the strategy {strategy} offered {image_id}, which is labelled already")
            shown = _read_prediction(self.client.infer(MODEL, image_id), volume)
            truth = volume.truth()
            correction = self.annotator.correct(truth, shown)
            corrected = self.output / "corrected" / f"{image_id}.nii.gz"
            corrected.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(correction.label, volume.affine()), corrected)
            self.client.submit(image_id, corrected, self.cohort.labels, model=MODEL)
            self.labelled.add(image_id)
            changed += correction.edited_voxels
            foreground += int(np.count_nonzero(truth | shown))
            self.progress.advance(task)
            self.progress.advance(self.whole)
        self.progress.remove_task(task)
        return changed / max(1, foreground)

    def _train(self, number: int) -> float:
        start = time.monotonic()
        task = self.progress.add_task(f"round {number}: training on {len(self.labelled)} volumes", total=1.0)
        before = 0.0

        def show(share: float) -> None:
            nonlocal before
            self.progress.update(task, completed=share)
            self.progress.advance(self.whole, max(0.0, share - before) * self.plan.steps_in(number))
            before = max(before, share)

        # one volume per step: on few volumes more steps teach more than larger batches
        self.client.train(MODEL, {"steps": self.plan.steps_in(number), "batch_size": 1}, show)
        self.progress.remove_task(task)
        return time.monotonic() - start

    def _predict(
        self, number: int, volumes: list[Volume], folder: Path, *, uploaded: bool = False
    ) -> dict[str, npt.NDArray[np.float64]]:
        """Segment volumes and return the Dice per label of each; `uploaded` ones are not in the server's studies."""
        scores = {}
        folder.mkdir(parents=True, exist_ok=True)
        task = self.progress.add_task(f"round {number}: segmenting {len(volumes)} volumes", total=len(volumes))
        for volume in volumes:
            result = self.client.infer(MODEL, volume.id, image=volume.image if uploaded else None)
            scores[volume.id] = dice_per_label(
                _read_prediction(result, volume), volume.truth(), len(self.cohort.labels)
            )
            shutil.move(result, folder / f"{volume.id}.nii.gz")
            self.progress.advance(task)
            self.progress.advance(self.whole)
        self.progress.remove_task(task)
        return scores


def _read_prediction(path: Path, volume: Volume) -> Labels:
    """Return the label the server sent; it must lie on the image's own grid."""
    label = read_volume(path)
    if difference := geometry_difference(volume.shape(), volume.affine(), label.header.shape, label.affine):
        raise PlayerError(f"the segmentation of {volume.id} does not lie on the image's grid: {difference}")
    return label.values.astype(np.uint8)


def run(cohort: Cohort, plan: Plan, options: dict[str, str], output: Path, console: Console) -> list[report.Round]:
    """Serve the cohort's images, teach the network in rounds and write the report; return what each round reached."""
    plan.check(len(cohort.volumes))
    studies = output / "studies"
    studies.mkdir(parents=True)
    for volume in cohort.volumes:
        shutil.copyfile(volume.image, studies / volume.file_name)  # a copy: the source folder stays as it is
    server = Server({"studies": str(studies), **options}, log=output / "server.log")
    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"), TimeElapsedColumn(),
        TextColumn("left:"), TimeRemainingColumn(),
    )  # fmt: skip
    rounds: list[report.Round] = []
    try:
        with Progress(*columns, console=console, transient=True, speed_estimate_period=120) as progress:
            whole = progress.add_task("whole demo", total=_Teaching.work(cohort, plan))
            with server:
                client = AnnotationClient(server, output / "received")
                if plan.strategy not in client.info().get("strategies", {}):
                    valid = ", ".join(sorted(client.info().get("strategies", {})))
                    raise DemoError(f"strategy must be one of {valid}; got {plan.strategy!r}")
                teaching = _Teaching(cohort, plan, client, output, progress, whole)
                _print_head(console, cohort)
                for number in range(1, plan.rounds + 1):
                    rounds.append(teaching.run_round(number))
                    _print_row(console, cohort, rounds[-1])
                    _save_round(cohort, teaching.shown, rounds, output)
    except PlayerError:
        console.print("\nThe last lines of the server's log:", style="bold")
        console.print(server.tail(), markup=False, highlight=False)
        raise
    _save_report(cohort, teaching, rounds, options, plan, output)
    return rounds


def _print_head(console: Console, cohort: Cohort) -> None:
    heads = "".join(f"{name[:11]:>12}" for name in cohort.labels)
    held_out = f"{'held-out':>10}" if cohort.held_out else ""
    console.print(
        f"{'round':>5}{'labelled':>10}{'mean Dice':>11}{heads}{held_out}{'corrected':>11}{'seconds':>9}", style="bold"
    )


def _print_row(console: Console, cohort: Cohort, r: report.Round) -> None:
    dice = "".join(f"{r.dice[name]:12.3f}" for name in cohort.labels)
    held_out = f"{r.held_out_dice:10.3f}" if r.held_out_dice is not None else ""
    console.print(
        f"{r.number:5d}{r.labelled:10d}{r.mean_dice:11.3f}{dice}{held_out}{r.edited:11.0%}{r.seconds:9.0f}",
        highlight=False,
    )


def _save_round(cohort: Cohort, shown: _Shown, rounds: list[report.Round], output: Path) -> None:
    r = rounds[-1]
    name = shown.middle(-1)
    volume = cohort.volume(name)
    dice = dict(zip(cohort.labels, (float(v) for v in shown.dice[-1][name]), strict=True))
    reached = f"{r.labelled} labelled, mean Dice {r.mean_dice:.3f} on the other {r.unlabelled}"
    report.save_comparison(
        output / f"round_{r.number}.png",
        report.read_scan(volume.image, modality=cohort.modality),
        volume.canonical_truth(),
        report.read_label(shown.predictions[-1][name]),
        cohort.labels,
        title=f"Round {r.number}: {reached} (shown: {name})",
        dice=dice,
    )
    results = [
        asdict(r) | {"volumes": {k: v.tolist() for k, v in d.items()}} for r, d in zip(rounds, shown.dice, strict=True)
    ]
    write_text(output / "rounds.json", json.dumps(results, indent=1))


def _save_report(
    cohort: Cohort, teaching: _Teaching, rounds: list[report.Round], options: dict[str, str], plan: Plan, output: Path
) -> None:
    shown = teaching.shown
    name = shown.middle(-1)
    volume = cohort.volume(name)
    truth = volume.canonical_truth()
    columns: list[tuple[str, Labels | None]] = [(cohort.modality.upper(), None), ("truth", truth)]
    for number in dict.fromkeys((0, len(rounds) - 1)):
        dice = mean_dice(shown.dice[number][name])
        title = f"after {rounds[number].labelled} labelled volumes\nDice {dice:.3f}"
        columns.append((title, report.read_label(shown.predictions[number][name])))
    scan = report.read_scan(volume.image, modality=cohort.modality)
    montage = report.save_montage(
        output / "montage.png", scan, columns, truth, rounds, cohort.labels,
        title=f"DeformUX-Net taught through MONAI Label by a simulated radiologist: {cohort.description}",
    )  # fmt: skip
    curve = report.save_learning_curve(
        output / "learning_curve.png", rounds, cohort.labels, title="Dice while a simulated radiologist labels"
    )
    pictures = [(montage, f"{name}, never labelled in this run: before and after the later corrections")]
    pictures += [(curve, "Learning curve")]
    pictures += [(output / f"round_{r.number}.png", f"After round {r.number}") for r in rounds]
    facts = {
        "cohort": cohort.description,
        "scored on": "the volumes that were unlabelled at the end of each round",
        "annotator": "simulated: hands in the true label",
        "next sample": f"first in round 1, then {plan.strategy}",
        "training": f"{plan.steps} steps per round, twice as many in the first, on all labels submitted so far",
        "server": ", ".join(f"{key} {value}" for key, value in options.items()),
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        f"{'CUDA' if torch.cuda.is_available() else 'no GPU'}",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
    }
    if cohort.held_out:
        facts["held out"] = f"{len(cohort.held_out)} volumes of the split's val, never in the studies"
    report.write_html(
        output / "report.html", title="DeformUX Label demo", rounds=rounds, labels=cohort.labels, pictures=pictures,
        facts=facts,
    )  # fmt: skip


def _fresh_output(output: Path) -> None:
    """Make an empty output folder; of an earlier demo everything goes, of anything else nothing."""
    if output.exists() and not output.is_dir():
        raise DemoError(f"--output {output} is a file, expected a folder")
    if output.is_dir() and any(output.iterdir()):
        if not (output / _MARKER).is_file():
            raise DemoError(f"--output {output} holds files that no demo wrote: choose an empty or new folder")
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    (output / _MARKER).touch()


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt  # so that the server stops too


def main(
    studies: Annotated[
        Path | None, typer.Option(help="Labelled data: images/ and labels/, optional split.json.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Rounds of annotate, train, predict.")] = Plan.rounds,
    first: Annotated[int, typer.Option(help="Volumes labelled in the first round.")] = Plan.first,
    batch: Annotated[int, typer.Option(help="Volumes labelled in each later round.")] = Plan.batch,
    steps: Annotated[int, typer.Option(help="Training steps per round; round 1 takes twice as many.")] = Plan.steps,
    strategy: Annotated[str, typer.Option(help="The server's strategy for the next sample.")] = Plan.strategy,
    volumes: Annotated[int, typer.Option(help="Volumes of the cohort, at most.")] = 16,
    held_out: Annotated[int, typer.Option(help="Volumes of split.json's val that are only scored, at most.")] = 6,
    labels: Annotated[
        str, typer.Option(help="Names of the label values in ascending order, e.g. anterior,posterior.")
    ] = "",
    modality: Annotated[str, typer.Option(help="ct or mr; else dataset.json or the values tell.")] = "",
    preset: Annotated[str, typer.Option(help="tiny, small or base.")] = "tiny",
    pretrained: Annotated[str, typer.Option(help="Weights to start from, or none.")] = "none",
    spacing: Annotated[str, typer.Option(help="Voxel size in mm, or native.")] = "",
    patch_size: Annotated[str, typer.Option(help="Voxels of a patch.")] = "",
    voxel_scale: Annotated[float, typer.Option(help="Coarser synthetic volumes, for quick checks.")] = 1.0,
    output: Annotated[Path, typer.Option(help="Folder for pictures, report and log.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Of the synthetic cohort or of the choice among many volumes.")] = 0,
) -> None:
    """Teach DeformUX-Net through a real MONAI Label server and write a report."""
    console = Console(soft_wrap=True)
    logging.getLogger("monailabel").setLevel(logging.WARNING)
    # SIGINT as well: a shell that starts the demo in the background has it ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    started = time.monotonic()
    plan = Plan(rounds, first, batch, steps, strategy)
    try:
        if studies is None:
            plan.check(volumes)
            _fresh_output(output)
            console.print(f"Drawing {volumes} synthetic abdominal CT volumes …")
            cohort = synthetic_cohort(output / "cohort", volumes=volumes, seed=seed, voxel_scale=voxel_scale)
        else:
            names = tuple(name.strip() for name in labels.split(",")) if labels else ()
            cohort = open_cohort(
                studies, volumes=volumes, held_out=held_out, labels=names, modality=modality, seed=seed
            )
            plan.check(len(cohort.volumes))
            _fresh_output(output)
        options = {
            "labels": ",".join(cohort.labels),
            "modality": cohort.modality,
            "preset": preset,
            "pretrained": pretrained,
            "spacing": spacing or cohort.spacing,
            "patch_size": patch_size or cohort.patch_size,
        }
        state = Project.from_conf(options).state_folder(app_folder(), str(output / "studies"))
        shutil.rmtree(state, ignore_errors=True)  # of an earlier demo: this one starts untrained
        console.print(f"{cohort.description}. Labels: {', '.join(cohort.labels)}. Starting the server …")
        results = run(cohort, plan, options, output, console)
    except KeyboardInterrupt:
        console.print("Stopped; the server is stopped too.")
        raise typer.Exit(130) from None
    except (DemoError, PlayerError, InvalidFolder, InvalidOption, ValueError, OSError) as error:
        Console(stderr=True, soft_wrap=True).print(f"demo: {error}.", style="bold red", markup=False, highlight=False)
        raise typer.Exit(1) from None
    minutes = (time.monotonic() - started) / 60
    console.print(
        f"Mean Dice on the {results[-1].unlabelled} unlabelled volumes: {results[-1].mean_dice:.3f} "
        f"after {results[-1].labelled} labels, {minutes:.1f} min. Report: {output / 'report.html'}"
    )
    console.print(
        f"Look at it in 3D Slicer: make serve STUDIES={output / 'studies'} LABELS={options['labels']} "
        f"MODALITY={cohort.modality}"
    )


if __name__ == "__main__":
    typer.run(main)
