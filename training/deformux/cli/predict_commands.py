"""The commands ``deformux predict`` and ``deformux predict-cluster``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deformux.cli.common import (
    clear_errors,
    ended_by_sigterm,
    existing_folder,
    model_path,
    valid_device,
    writable_folder,
)
from deformux.cli.options import Device, ModelFile, Overwrite, ResultFolder, ScanFolder, Threads
from deformux.cli.shards import Shard, sbatch_options
from deformux.data.cases import InvalidFolder, find_images, result_names

__all__ = ["predict_cluster_command", "predict_command"]


def predict_command(
    model: ModelFile,
    images: ScanFolder,
    output: ResultFolder,
    shard: Annotated[str, typer.Option(help="i/n: only share i of n, for n processes on one folder.")] = "1/1",
    overwrite: Overwrite = False,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Segment volumes; each result lies on its scan's own grid. Run it again to go on: results that exist stay."""
    with clear_errors(), ended_by_sigterm():
        valid_device(device)
        share = Shard.parse(shard)
        file = model_path(model)
        results = _results(images, output)
        from deformux.cli.predict import print_predicted, scans_of, segment_files
        from deformux.networks.model_file import read_card

        card = read_card(file)
        scans = share.of(scans_of(results, card.preprocessing.sequences))
        done = segment_files(file, scans, output, overwrite=overwrite, device=device, threads=threads)
        print_predicted(done, card, output)


def predict_cluster_command(
    model: ModelFile,
    images: ScanFolder,
    output: ResultFolder,
    cluster: Annotated[str, typer.Option(help="slurm, or local: processes on this machine.")] = "slurm",
    shards: Annotated[int, typer.Option(help="Number of jobs.", min=1, max=10_000)] = 8,
    max_parallel: Annotated[int, typer.Option(help="Most jobs at once; 0: no limit, locally by cores.", min=0)] = 0,
    retries: Annotated[int, typer.Option(help="How often a job that died is sent again.", min=0, max=100)] = 2,
    timeout_min: Annotated[int, typer.Option(help="Time limit of a job in minutes.", min=1, max=100_000)] = 240,
    partition: Annotated[str, typer.Option(help="SLURM's partition.")] = "",
    gres: Annotated[str, typer.Option(help="SLURM's resources of a job, e.g. gpu:1.")] = "",
    slurm: Annotated[list[str] | None, typer.Option(help="Further options of sbatch, e.g. --slurm mem=16G.")] = None,
    overwrite: Overwrite = False,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Segment volumes in several jobs, on SLURM or on this machine; jobs that die are sent again."""
    with clear_errors(), ended_by_sigterm():
        valid_device(device)
        if cluster not in ("slurm", "local"):
            raise ValueError(f"cluster must be slurm or local; got {cluster!r}")
        chosen = {"partition": partition, "gres": gres} | sbatch_options(slurm or [])
        file = model_path(model)
        results = _results(images, output)
        from deformux.cli.predict import print_predicted, scans_of
        from deformux.cli.predict_cluster import ClusterOptions, predict_on_cluster
        from deformux.networks.model_file import check_weights, read_card

        options = ClusterOptions(
            cluster,
            shards,
            max_parallel,
            retries,
            timeout_min,
            {name: value for name, value in chosen.items() if value},
        )
        card = read_card(file)
        # Here, once: each of the jobs would end in the same error.
        check_weights(file, card)
        scans = scans_of(results, card.preprocessing.sequences)
        done = predict_on_cluster(
            file, scans, output, options=options, overwrite=overwrite, device=device, threads=threads
        )
        print_predicted(done, card, output)


def _results(images: Path, output: Path) -> dict[str, Path]:
    """Return the name of each result, without a suffix, and its scan; make the folder for them.

    Raises:
        InvalidFolder: there is no scan, or a result would replace one.
    """
    paths = [images] if images.is_file() else find_images(existing_folder(images))
    results = dict(zip(result_names(paths), paths, strict=True))
    scans = {path.resolve() for path in paths}
    for name in results:
        if (target := output / f"{name}.nii.gz").resolve() in scans:
            raise InvalidFolder(f"a result would replace the scan {target}; name a different output folder")
    writable_folder(output)
    return results
