"""Implementation of ``deformux predict-cluster``: shards of a folder as jobs of submitit.

submitit hands a job its arguments, and takes its result, in pickle files. They lie in a folder that only the user can
enter, and are removed when every shard has ended well.
"""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.markup import escape

from deformux.cli.common import Terminated, console, timed_bar
from deformux.cli.predict import Predicted, results_to_make, segment_files
from deformux.cli.shards import Shard
from deformux.data.sequences import first_present
from deformux.networks.model_identity import model_identity

__all__ = ["ClusterOptions", "ShardJob", "predict_on_cluster", "run_shard"]

# Cores for one local shard where the number at once is not given: a network keeps about that many busy.
_CORES = 4
_POLL_S = 1.0


@dataclass(frozen=True)
class ClusterOptions:
    """How shards are sent.

    Args:
        cluster: ``slurm``, or ``local`` for processes on this machine.
        shards: number of jobs.
        max_parallel: most jobs at once; 0 leaves it to SLURM, and takes one for each 4 cores on this machine.
        retries: how often a shard that died is sent again.
        timeout_min: time limit of a job in minutes.
        slurm: further options of sbatch by name, without dashes, such as partition, gres or account.
    """

    cluster: str = "slurm"
    shards: int = 8
    max_parallel: int = 0
    retries: int = 2
    timeout_min: int = 240
    slurm: Mapping[str, str] = field(default_factory=dict)

    @property
    def at_once(self) -> int:
        """Number of jobs that are sent before one has ended."""
        if self.cluster == "slurm":
            return self.shards  # as one array, whose parallelism SLURM limits
        return self.max_parallel or max(1, (os.cpu_count() or 1) // _CORES)


@dataclass(frozen=True)
class ShardJob:
    """Arguments of one job: those of ``segment_files`` for a share of the scans."""

    shard: Shard
    model: Path
    scans: Mapping[str, Sequence[Path]]
    output: Path
    overwrite: bool
    device: str
    threads: int


def run_shard(job: ShardJob) -> Predicted:
    """Segment the scans of a shard; the function that a job runs."""

    def end(*_: object) -> NoReturn:
        raise Terminated

    # By SIGUSR2 submitit announces the time limit and preemption; its own handler raises what looks like a bad scan.
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, end)
    return segment_files(
        job.model, job.scans, job.output, overwrite=job.overwrite, device=job.device, threads=job.threads
    )


def predict_on_cluster(
    model: Path,
    scans: Mapping[str, Sequence[Path]],
    output: Path,
    *,
    options: ClusterOptions,
    overwrite: bool = False,
    device: str = "auto",
    threads: int = 0,
) -> Predicted:
    """Segment volumes into a folder in several jobs; shards that die are sent again, and go on where they were.

    Args:
        model: file of the model.
        scans: name of each result, without a suffix, to the files of its scan.
        output: folder for the label volumes, which the jobs reach under the same path.
        options: how shards are sent.
        overwrite: replace results of other models.
        device, threads: options of each job.

    Raises:
        ValueError: submitit or SLURM is missing, the jobs are refused, or the folder has results of other models.
    """
    submitit = _submitit()
    identity = model_identity(model)
    missing = results_to_make(identity, scans, output, overwrite=overwrite)
    total = Predicted(kept=len(scans) - len(missing))
    if not missing:
        return total
    shards = [Shard(number, min(options.shards, len(missing))) for number in range(1, options.shards + 1)]
    jobs = [
        ShardJob(shard, model.resolve(), _absolute(shard.of(missing)), output.resolve(), overwrite, device, threads)
        for shard in shards[: len(missing)]
    ]
    folder = _private_folder(output)
    executor = _executor(submitit, folder, options)
    before = {name: _written(output, name) for name in missing}
    with timed_bar(f"segmenting in {len(jobs)} jobs", mean_over_s=float("inf")) as bar:
        task = bar.add_task("", total=len(missing))

        def show() -> None:
            new = sum(_written(output, name) != at for name, at in before.items())
            bar.update(task, completed=new)

        ended, lost = _run(executor, jobs, options, show)
    _add_up(total, ended)
    for job, reason in lost:
        left = results_to_make(identity, job.scans, output, overwrite=True)
        total.written += len(job.scans) - len(left)
        died = f"shard {job.shard} died {options.retries + 1} times ({reason})"
        total.failed += [f"{first_present(files).name}: {died}" for files in left.values()]
    if lost:
        console.print(f"the logs of the jobs are in {folder}", soft_wrap=True, highlight=False)
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return total


def _add_up(total: Predicted, shards: Sequence[Predicted]) -> None:
    """Add the outcome of shards; what one found was written by its first try, which died."""
    for shard in shards:
        total.written += shard.written + shard.kept
        total.failed += shard.failed
        total.notes += shard.notes


def _run(
    executor: Any, jobs: Sequence[ShardJob], options: ClusterOptions, on_poll: Callable[[], None]
) -> tuple[list[Predicted], list[tuple[ShardJob, str]]]:
    """Send jobs and wait for them; return the results, and the jobs that died too often, each with the reason."""
    waiting = list(jobs)
    running: list[tuple[ShardJob, Any]] = []
    deaths: Counter[Shard] = Counter()
    ended, lost = [], []
    try:
        while waiting or running:
            batch = waiting[: max(0, options.at_once - len(running))]
            waiting = waiting[len(batch) :]
            if batch:
                running += zip(batch, _sent(executor, batch), strict=True)
            time.sleep(_POLL_S)
            on_poll()
            for job, sent in [pair for pair in running if pair[1].done()]:
                running.remove((job, sent))
                error = sent.exception()
                if error is None:
                    ended.append(sent.result())
                    continue
                deaths[job.shard] += 1
                reason = str(error).strip().splitlines()[-1]
                if deaths[job.shard] > options.retries:
                    lost.append((job, reason))
                else:
                    console.print(escape(f"shard {job.shard} died and is sent again"), highlight=False)
                    waiting.append(job)
    except BaseException:
        # Ctrl-C, or an error here: nothing goes on unseen. What is written stays, and the next run goes on from it.
        for _, sent in running:
            sent.cancel(check=False)
        raise
    return ended, lost


def _sent(executor: Any, batch: Sequence[ShardJob]) -> list[Any]:
    """Submit jobs, as one array where the cluster has them; raise ValueError if they are refused."""
    try:
        return list(executor.map_array(run_shard, batch))
    except RuntimeError as error:
        reason = next((line for line in reversed(str(error).splitlines()) if "error:" in line), str(error))
        raise ValueError(f"the cluster refuses the jobs: {reason.strip()}") from error


def _submitit() -> Any:
    try:
        return importlib.import_module("submitit")
    except ImportError as error:
        raise ValueError("jobs need the package submitit; install it with: pip install '.[cluster]'") from error


def _executor(submitit: Any, folder: Path, options: ClusterOptions) -> Any:
    """Return submitit's executor with the options set; raise ValueError if there is no such cluster here."""
    try:
        executor = submitit.AutoExecutor(folder / "%j", cluster=options.cluster)
    except RuntimeError as error:
        raise ValueError(
            "SLURM's command srun is not on this machine; run this where jobs are submitted, or use --cluster local"
        ) from error
    executor.update_parameters(
        name="deformux",
        timeout_min=options.timeout_min,
        slurm_array_parallelism=options.max_parallel or options.shards,
        slurm_additional_parameters=dict(options.slurm),
        # Local jobs see no GPU unless told.
        **({"gpus_per_node": torch.cuda.device_count()} if options.cluster == "local" else {}),
    )
    return executor


def _private_folder(output: Path) -> Path:
    """Make a folder for the files of this run's jobs, where every node finds it and no other user."""
    parent = output.resolve() / ".cluster"
    parent.mkdir(mode=0o700, exist_ok=True)
    parent.chmod(0o700)
    return Path(tempfile.mkdtemp(prefix="run-", dir=parent))


def _absolute(scans: Mapping[str, Sequence[Path]]) -> dict[str, tuple[Path, ...]]:
    return {name: tuple(path.absolute() for path in files) for name, files in scans.items()}


def _written(output: Path, name: str) -> int:
    """Return when a result was written; 0 if it is not there."""
    try:
        return (output / f"{name}.nii.gz").stat().st_mtime_ns
    except OSError:
        return 0
