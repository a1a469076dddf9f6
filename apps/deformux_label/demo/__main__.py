"""``make demo``: a simulated radiologist teaches DeformUX-Net through a real MONAI Label server.

Each round takes the samples that the server offers, corrects its segmentations, submits them, trains, and segments
all volumes that are still unlabelled. The server gets only images; true labels and Dice stay in this process.
"""

from __future__ import annotations

import logging
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console

from deformux.data.cases import InvalidFolder
from deformux_label.cli.common import app_folder
from deformux_label.demo.cohort import Cohort, open_cohort, synthetic_cohort
from deformux_label.demo.server_process import PlayerError
from deformux_label.demo.teaching import DemoError, DemoPlan, run_demo
from deformux_label.lib.configs.project import InvalidOption, Project

__all__ = ["main"]

_MARKER = ".deformux-demo"


def main(
    studies: Annotated[
        Path | None, typer.Option(help="Labelled data: images/ and labels/, optional split.json.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Rounds of annotate, train, predict.")] = DemoPlan.rounds,
    first: Annotated[int, typer.Option(help="Volumes labelled in the first round.")] = DemoPlan.first,
    batch: Annotated[int, typer.Option(help="Volumes labelled in each later round.")] = DemoPlan.batch,
    steps: Annotated[int, typer.Option(help="Training steps per round; round 1 takes twice as many.")] = DemoPlan.steps,
    strategy: Annotated[str, typer.Option(help="The server's strategy for the next sample.")] = DemoPlan.strategy,
    volumes: Annotated[int, typer.Option(help="Volumes of the cohort, at most.")] = 16,
    held_out: Annotated[int, typer.Option(help="Volumes of split.json's val that are only scored, at most.")] = 6,
    labels: Annotated[
        str, typer.Option(help="Names of the label values in ascending order, e.g. anterior,posterior.")
    ] = "",
    modality: Annotated[str, typer.Option(help="ct or mr; by default from dataset.json or the values.")] = "",
    preset: Annotated[str, typer.Option(help="tiny, small or base.")] = "tiny",
    pretrained: Annotated[str, typer.Option(help="Weights to start from, or none.")] = "none",
    spacing: Annotated[str, typer.Option(help="Voxel size in mm, or native.")] = "",
    patch_size: Annotated[str, typer.Option(help="Voxels of a patch.")] = "",
    voxel_scale: Annotated[float, typer.Option(help="Coarser synthetic volumes, for quick checks.")] = 1.0,
    output: Annotated[Path, typer.Option(help="Folder for pictures, report and log.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Seed of the synthetic cohort, or of the choice of volumes.")] = 0,
) -> None:
    """Teach DeformUX-Net through a real MONAI Label server and write a report."""
    started = time.monotonic()
    plan = DemoPlan(rounds, first, batch, steps, strategy)
    console = Console(soft_wrap=True)
    with _one_sentence(console):
        if studies is None:
            plan.check(volumes)
            _make_empty(output)
            console.print(f"Drawing {volumes} synthetic abdominal CT volumes …")
            cohort = synthetic_cohort(output / "cohort", volumes=volumes, seed=seed, voxel_scale=voxel_scale)
        else:
            names = tuple(name.strip() for name in labels.split(",")) if labels else ()
            cohort = open_cohort(
                studies, volumes=volumes, held_out=held_out, labels=names, modality=modality, seed=seed
            )
            plan.check(len(cohort.volumes))
            _make_empty(output)
        options = {"labels": ",".join(cohort.labels), "modality": cohort.modality, "preset": preset}
        options |= {"pretrained": pretrained, "spacing": spacing or cohort.spacing}
        options |= {"patch_size": patch_size or cohort.patch_size}
        if cohort.image_channels:
            options["image_channels"] = cohort.image_channels
        _teach(cohort, plan, options, output, console, started)


@contextmanager
def _one_sentence(console: Console) -> Iterator[None]:
    """End the command with one sentence if the demo fails or is interrupted."""
    logging.getLogger("monailabel").setLevel(logging.WARNING)
    # SIGINT too, because a shell makes background processes ignore it.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        yield
    except KeyboardInterrupt:
        console.print("Stopped; the server is stopped too.")
        raise typer.Exit(130) from None
    except (DemoError, PlayerError, InvalidFolder, InvalidOption, ValueError, OSError) as error:
        Console(stderr=True, soft_wrap=True).print(f"demo: {error}.", style="bold red", markup=False, highlight=False)
        raise typer.Exit(1) from None


def _teach(
    cohort: Cohort, plan: DemoPlan, options: dict[str, str], output: Path, console: Console, started: float
) -> None:
    """Run the rounds on a server with these options, and print the result and the time since ``started``."""
    state = Project.from_conf(options).state_folder(app_folder(), str(output / "studies"))
    shutil.rmtree(state, ignore_errors=True)  # state of an earlier demo: this one starts untrained
    console.print(f"{cohort.description}. Labels: {', '.join(cohort.labels)}. Starting the server …")
    last = run_demo(cohort, plan, options, output, console)[-1]
    minutes = (time.monotonic() - started) / 60
    console.print(
        f"Mean Dice on the {last.unlabelled} unlabelled volumes: {last.mean_dice:.3f} "
        f"after {last.labelled} labels, {minutes:.1f} min. Report: {output / 'report.html'}"
    )
    console.print(
        f"View it in 3D Slicer: make serve STUDIES={output / 'studies'} LABELS={options['labels']} "
        f"MODALITY={cohort.modality}" + (f" CHANNELS={cohort.image_channels}" if cohort.image_channels else "")
    )


def _make_empty(output: Path) -> None:
    """Make an empty output folder; delete an earlier demo, but nothing else."""
    if output.exists() and not output.is_dir():
        raise DemoError(f"--output {output} is a file, expected a folder")
    if output.is_dir() and any(output.iterdir()):
        if not (output / _MARKER).is_file():
            raise DemoError(f"--output {output} has files that no demo wrote; choose an empty or new folder")
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    (output / _MARKER).touch()


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt  # so that the server stops too


if __name__ == "__main__":
    typer.run(main)
