"""The ``deformux simulate`` command."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.table import Table

from deformux.active_learning.learning_curve import Round, Summary, plot, summarise, write_rounds, write_summary
from deformux.active_learning.simulation import Plan, held_out, simulate
from deformux.active_learning.strategies import STRATEGIES
from deformux.cli.common import (
    LARGEST_SEED,
    MOST_THREADS,
    ProgressBar,
    assignments,
    clear_errors,
    console,
    existing_folder,
    model_path,
    named_labels,
    torch_device,
    use_threads,
    writable_folder,
)
from deformux.data.cases import find_cases
from deformux.data.preprocessing import MODALITIES, Preprocessing
from deformux.fitting.fit import Progress
from deformux.fitting.recipe import RECIPES, Recipe
from deformux.networks.presets import PRESETS

__all__ = ["play", "short_recipe", "simulate_command", "summary_table"]

_STEPS_PER_EPOCH = 20


def simulate_command(
    data: Annotated[Path, typer.Option(help="Folder with images/ and labels/ (or imagesTr/ and labelsTr/).")],
    output: Annotated[Path, typer.Option(help="Folder for rounds.csv, summary.csv, curves.png and kept results.")],
    strategy: Annotated[str, typer.Option(help=f"all, or some of {', '.join(STRATEGIES)}, comma separated.")] = "all",
    rounds: Annotated[int, typer.Option(help="Trainings per strategy and seed.", min=1)] = 6,
    batch: Annotated[int, typer.Option(help="Volumes labelled after each.", min=1)] = 5,
    start: Annotated[int, typer.Option(help="Volumes labelled before the first.", min=1)] = 5,
    seeds: Annotated[int, typer.Option(help="How often everything is repeated.", min=1, max=1000)] = 5,
    first_seed: Annotated[
        int, typer.Option(help="Share a folder between processes: give each other seeds.", min=0, max=LARGEST_SEED)
    ] = 0,
    steps: Annotated[int, typer.Option(help="Optimizer steps of each training.", min=1)] = 400,
    continue_steps: Annotated[
        int, typer.Option(help="Go on from the round before in so many steps; 0: from scratch each time.", min=0)
    ] = 0,
    test_fraction: Annotated[
        float, typer.Option(help="Part of the volumes that test, by a hash of their ids.", min=0, max=1)
    ] = 0.25,
    subset: Annotated[str, typer.Option(help="Subset of split.json to play on, e.g. train.")] = "",
    labels: Annotated[
        str, typer.Option(help="Names of labels 1..N, comma separated; default: from dataset.json.")
    ] = "",
    modality: Annotated[str, typer.Option(help=" or ".join(MODALITIES))] = "ct",
    preset: Annotated[str, typer.Option(help=", ".join(PRESETS))] = "tiny",
    spacing: Annotated[str, typer.Option(help="Voxel size R,A,S in mm, or native.")] = "native",
    patch_size: Annotated[str, typer.Option(help="Patch R,A,S in voxels.")] = "96,96,96",
    set_: Annotated[list[str] | None, typer.Option("--set", help="Change the recipe, e.g. --set flip_axes=0,")] = None,
    snapshots: Annotated[int, typer.Option(help="Models of the last rounds whose predictions compare.", min=1)] = 1,
    start_from: Annotated[str, typer.Option(help="Model file or shipped name that every training starts from.")] = "",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N; auto takes the first GPU.")] = "auto",
    threads: Annotated[int, typer.Option(help="CPU threads; 0 lets PyTorch choose.", min=0, max=MOST_THREADS)] = 0,
) -> None:
    """Compare strategies of choosing what to label, on a folder whose labels are all known."""
    with clear_errors():
        use_threads(threads)
        names = named_labels(labels, existing_folder(data))
        changes = assignments(set_ or [])
        recipe = short_recipe(steps).replace(**changes)
        plan = Plan(
            strategies=_strategies(strategy, several_samples=snapshots > 1 or bool(recipe.flip_axes)),
            rounds=rounds,
            batch=batch,
            start=start,
            seeds=tuple(range(first_seed, first_seed + seeds)),
            recipe=recipe,
            prep=Preprocessing.from_options(modality, spacing, patch_size),
            labels=tuple(names),
            preset=preset,
            snapshots=snapshots,
            start_from=model_path(start_from) if start_from else None,
            device=torch_device(device),
            continue_recipe=short_recipe(continue_steps, "continue").replace(**changes) if continue_steps else None,
        )
        play(plan, data, writable_folder(output), subset=subset or None, test_fraction=test_fraction, console=console)


def _strategies(text: str, *, several_samples: bool) -> tuple[str, ...]:
    if text != "all":
        return tuple(dict.fromkeys(text.replace(" ", "").split(",")))
    if several_samples:
        return STRATEGIES
    console.print("without bald: it needs --snapshots 2, or axes that may be mirrored (--set flip_axes=0,)")
    return tuple(name for name in STRATEGIES if name != "bald")


def short_recipe(steps: int, name: str = "finetune") -> Recipe:
    """A recipe in a number of steps, its average of weights no longer than a tenth of them, without clicks."""
    return RECIPES[name].in_steps(steps, epochs=steps // _STEPS_PER_EPOCH).replace(clicks=0)


def play(
    plan: Plan, data: Path, output: Path, *, subset: str | None, test_fraction: float, console: Console
) -> list[Summary]:
    """Run a simulation with a progress bar; write its tables and plot after each round, and print the summary."""
    pool, test = held_out(find_cases(data, subset=subset), test_fraction)
    total = len(plan.strategies) * len(plan.seeds) * plan.rounds
    done: list[Round] = []
    computing: list[float] = []
    began = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}"))
    with ProgressBar(*columns, console=console) as bar:
        task = bar.add_task(f"{len(pool)} volumes to choose from, {len(test)} to test on", total=total, left="")

        def show(what: str, progress: Progress) -> None:
            bar.update(task, description=f"{what}: step {progress.step} of {progress.total_steps}")

        def finished(row: Round, computed: bool) -> None:
            nonlocal began
            if computed:
                computing.append(time.monotonic() - began)
            began = time.monotonic()
            done.append(row)
            _write(output, done, plan)
            console.print(
                f"{row.strategy}, seed {row.seed}: {len(row.labelled)} labelled, Dice {row.mean_dice:.4f}"
                + ("" if computed else " (kept)")
            )
            left = _duration((total - len(done)) * sum(computing) / len(computing)) if computing else ""
            bar.update(task, completed=len(done), left=f"about {left} left" if left else "")

        simulate(plan, pool, test, output, on_round=finished, on_progress=show)
    summary = summarise(done)
    console.print(summary_table(summary))
    console.print(f"{output}: rounds.csv, summary.csv, curves.png")
    return summary


def summary_table(summary: list[Summary]) -> Table:
    """Area under the budget curve of each strategy, and its paired difference to random."""
    table = Table("strategy", "seeds", "AUBC", "final Dice", "difference to random (95 %)")
    for line in summary:
        table.add_row(
            line.strategy,
            str(line.seeds),
            f"{line.area:.4f} ± {line.area_half_width:.4f}",
            f"{line.final_dice:.4f}",
            "" if line.difference is None else f"{line.difference:+.4f} ± {line.difference_half_width:.4f}",
        )
    return table


def _write(output: Path, rounds: list[Round], plan: Plan) -> None:
    write_rounds(output / "rounds.csv", rounds, plan.labels)
    write_summary(output / "summary.csv", summarise(rounds))
    plot(output / "curves.png", rounds)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min" if minutes else "a minute"
