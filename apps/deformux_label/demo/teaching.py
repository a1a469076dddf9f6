"""The rounds of the demo: annotate, train and predict through a real server."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from deformux.data.header import geometry_difference
from deformux.data.volume_reader import read_volume
from deformux.inference.metrics import dice_per_label, mean_dice
from deformux.interactive.simulated_annotator import WholeLabelAnnotator
from deformux_label.demo.cohort import Cohort, CohortVolume
from deformux_label.demo.figures import DemoRound
from deformux_label.demo.report import DemoResults, save_report, save_round
from deformux_label.demo.server_process import AnnotationClient, PlayerError, Server

__all__ = ["DemoError", "DemoPlan", "run_demo"]

_MODEL = "segmentation"
_STEPS_IN_TIME = 300


class DemoError(RuntimeError):
    """The demo cannot run; the message is one sentence for the user."""


@dataclass(frozen=True)
class DemoPlan:
    """Amounts of labelling and training: `first` volumes in round 1, then `batch` per round; `steps` per training.

    The first training takes twice the steps. Without steps, a training takes as many as fit into `minutes`, or into
    the server's time if these are 0 too.
    """

    rounds: int = 3
    first: int = 3
    batch: int = 2
    steps: int = 0
    minutes: float = 0.0
    strategy: str = "uncertainty"

    def steps_in(self, number: int) -> int:
        """Return the training steps of a round, counted from 1; without steps, a guess for the progress bar."""
        return (self.steps or _STEPS_IN_TIME) * (2 if number == 1 else 1)

    def training(self, number: int) -> dict[str, Any]:
        """Return the options of the training in a round."""
        if self.steps:
            # One volume per step: on few volumes more steps teach more than larger batches.
            return {"steps": self.steps_in(number), "batch_size": 1}
        return {"minutes": self.minutes} if self.minutes else {}

    @property
    def described(self) -> str:
        """Return how long trainings are, in words."""
        if self.steps:
            return f"{self.steps} steps per round, twice as many in the first"
        return f"{self.minutes:g} minutes from scratch" if self.minutes else "as long as the server's plan says"

    def check(self, volumes: int) -> None:
        """Raise DemoError unless some of the `volumes` stay unlabelled in the last round."""
        if min(self.rounds, self.first, self.batch) < 1:
            raise DemoError(
                f"rounds, first and batch must be at least 1; got {self.rounds}, {self.first} and {self.batch}"
            )
        if min(self.steps, self.minutes) < 0:
            raise DemoError(f"steps and minutes must not be negative; got {self.steps} and {self.minutes:g}")
        labelled = self.first + (self.rounds - 1) * self.batch
        if labelled >= volumes:
            raise DemoError(
                f"{self.rounds} rounds label {labelled} of {volumes} volumes and leave none to score: "
                "use more volumes or fewer rounds"
            )


class _Teaching:
    """The rounds on one server."""

    def __init__(
        self, cohort: Cohort, plan: DemoPlan, client: AnnotationClient, output: Path, progress: Progress, whole: TaskID
    ) -> None:
        self.cohort, self.plan, self.client, self.output = cohort, plan, client, output
        self.progress, self.whole = progress, whole
        self.annotator = WholeLabelAnnotator(cohort.labels)
        self.labelled: set[str] = set()
        self.results = DemoResults()

    @staticmethod
    def work(cohort: Cohort, plan: DemoPlan) -> float:
        """Return the expected work in units of one segmentation, for the display of the remaining time."""
        labelled = [plan.first + i * plan.batch for i in range(plan.rounds)]
        predictions = sum(len(cohort.volumes) - n + len(cohort.held_out) for n in labelled)
        return predictions + labelled[-1] + sum(map(plan.steps_in, range(1, plan.rounds + 1)))

    def run_round(self, number: int) -> None:
        """Annotate, train and predict, and add the round to the results."""
        start = time.monotonic()
        strategy = "first" if number == 1 else self.plan.strategy
        edited = self._annotate(number, self.plan.first if number == 1 else self.plan.batch, strategy)
        training_seconds = self._train(number)
        unlabelled = [volume for volume in self.cohort.volumes if volume.id not in self.labelled]
        folder = self.output / "predictions" / f"round_{number}"
        scores = self._predict(number, unlabelled, folder)
        held_out = self._predict(number, self.cohort.held_out, folder / "held_out", uploaded=True)
        self.results.predictions.append({volume.id: folder / f"{volume.id}.nii.gz" for volume in unlabelled})
        self.results.dice.append(scores)
        table = np.array(list(scores.values()))
        finished = DemoRound(
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
        self.results.rounds.append(finished)

    def _annotate(self, number: int, count: int, strategy: str) -> float:
        """Correct and submit `count` volumes; return the share of corrected foreground."""
        changed = foreground = 0
        task = self.progress.add_task(f"round {number}: correcting", total=count)
        for _ in range(count):
            image_id = self.client.next_sample(strategy)
            volume = self.cohort.volume(image_id)
            if image_id in self.labelled:
                raise PlayerError(f"the strategy {strategy} offered {image_id}, which is already labelled")
            shown = _read_prediction(self.client.infer(_MODEL, image_id), volume)
            truth = volume.truth()
            correction = self.annotator.correct(truth, shown)
            corrected = self.output / "corrected" / f"{image_id}.nii.gz"
            corrected.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(correction.label, volume.affine()), corrected)
            self.client.submit(image_id, corrected, self.cohort.labels, model=_MODEL)
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

        self.client.train(_MODEL, self.plan.training(number), show)
        self.progress.remove_task(task)
        return time.monotonic() - start

    def _predict(
        self, number: int, volumes: list[CohortVolume], folder: Path, *, uploaded: bool = False
    ) -> dict[str, npt.NDArray[np.float64]]:
        """Segment volumes and return the Dice per label of each; `uploaded` ones are not in the server's studies."""
        scores = {}
        folder.mkdir(parents=True, exist_ok=True)
        task = self.progress.add_task(f"round {number}: segmenting {len(volumes)} volumes", total=len(volumes))
        for volume in volumes:
            result = self.client.infer(_MODEL, volume.id, files=volume.sequences if uploaded else ())
            scores[volume.id] = dice_per_label(
                _read_prediction(result, volume), volume.truth(), len(self.cohort.labels)
            )
            shutil.move(result, folder / f"{volume.id}.nii.gz")
            self.progress.advance(task)
            self.progress.advance(self.whole)
        self.progress.remove_task(task)
        return scores


def _read_prediction(path: Path, volume: CohortVolume) -> npt.NDArray[np.uint8]:
    """Return the label that the server sent; raise PlayerError unless it lies on the image's grid."""
    label = read_volume(path)
    if difference := geometry_difference(volume.shape(), volume.affine(), label.header.shape, label.affine):
        raise PlayerError(f"the segmentation of {volume.id} does not lie on the image's grid: {difference}")
    return label.values.astype(np.uint8)


def run_demo(
    cohort: Cohort, plan: DemoPlan, options: dict[str, str], output: Path, console: Console
) -> list[DemoRound]:
    """Serve the cohort's images, teach the network in rounds, write the report, and return the rounds."""
    plan.check(len(cohort.volumes))
    studies = output / "studies"
    studies.mkdir(parents=True)
    for volume in cohort.volumes:
        for path in volume.sequences:
            shutil.copyfile(path, studies / path.name)  # a copy: the source folder stays as it is
    server = Server({"studies": str(studies), **options}, log=output / "server.log")
    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"), TimeElapsedColumn(),
        TextColumn("left:"), TimeRemainingColumn(),
    )  # fmt: skip
    try:
        with Progress(*columns, console=console, transient=True, speed_estimate_period=120) as progress:
            whole = progress.add_task("whole demo", total=_Teaching.work(cohort, plan))
            with server:
                client = AnnotationClient(server, output / "received")
                _check_strategy(client, plan.strategy)
                teaching = _Teaching(cohort, plan, client, output, progress, whole)
                _print_head(console, cohort)
                for number in range(1, plan.rounds + 1):
                    teaching.run_round(number)
                    _print_row(console, teaching.results.rounds[-1])
                    save_round(cohort, teaching.results, output)
    except PlayerError:
        console.print("\nThe last lines of the server's log:", style="bold")
        console.print(server.tail(), markup=False, highlight=False)
        raise
    save_report(cohort, teaching.results, _facts(cohort, plan, options), output)
    return teaching.results.rounds


def _check_strategy(client: AnnotationClient, strategy: str) -> None:
    valid = client.info().get("strategies", {})
    if strategy not in valid:
        raise DemoError(f"strategy must be one of {', '.join(sorted(valid))}; got {strategy!r}")


def _facts(cohort: Cohort, plan: DemoPlan, options: dict[str, str]) -> dict[str, str]:
    """Return the conditions of the demo for the report."""
    facts = {
        "cohort": cohort.description,
        "scored on": "the volumes that were unlabelled at the end of each round",
        "annotator": "simulated: submits the true label",
        "next sample": f"first in round 1, then {plan.strategy}",
        "training": f"{plan.described}, on all labels submitted so far",
        "server": ", ".join(f"{key} {value}" for key, value in options.items()),
    }
    if cohort.held_out:
        facts["held out"] = f"{len(cohort.held_out)} volumes of the split's val, never in the studies"
    return facts


def _print_head(console: Console, cohort: Cohort) -> None:
    heads = "".join(f"{name[:11]:>12}" for name in cohort.labels)
    held_out = f"{'held-out':>10}" if cohort.held_out else ""
    console.print(
        f"{'round':>5}{'labelled':>10}{'mean Dice':>11}{heads}{held_out}{'corrected':>11}{'seconds':>9}", style="bold"
    )


def _print_row(console: Console, finished: DemoRound) -> None:
    dice = "".join(f"{value:12.3f}" for value in finished.dice.values())
    held_out = f"{finished.held_out_dice:10.3f}" if finished.held_out_dice is not None else ""
    console.print(
        f"{finished.number:5d}{finished.labelled:10d}{finished.mean_dice:11.3f}{dice}{held_out}"
        f"{finished.edited:11.0%}{finished.seconds:9.0f}",
        highlight=False,
    )
