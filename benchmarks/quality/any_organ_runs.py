"""Runs of the benchmark of any organ: in which order, and each in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import torch
from benchmarks.common.machine import machine_lines
from benchmarks.quality.any_organ_contenders import ABLATIONS, PLAN, UNLABELLED, Ready, contender
from benchmarks.quality.any_organ_records import OrganRecord, OrganRecords, OrganRun
from benchmarks.quality.any_organ_scores import score_organ
from benchmarks.quality.any_organ_sets import DRAWN_SETS, ORGAN_SETS, TURNED_SETS, Organ, OrganSet, prepared_organ

from deformux.cli.devices import torch_device
from deformux.data.volume_reader import InvalidVolume
from deformux.fitting.fit import TrainingError

__all__ = ["ordered_runs", "run_in_process", "run_organ"]

_FIRST_SET = next(iter(ORGAN_SETS))
# Called with what is done now, and the part of the training that is done (0..1).
Show = Callable[[str, float], None]


def ordered_runs(
    sets: Sequence[str],
    contenders: Sequence[str],
    *,
    seeds: int,
    minutes: float,
    device: str = "cpu",
    threads: int = 2,
) -> list[OrganRun]:
    """Return all runs, the most informative first.

    These are the main contenders on all sets with one seed; then the plan without its parts on the first set; then
    other seeds; then turned headers and labels in part; then the plan without its parts elsewhere. Turned sets are for
    the plan and the fixed defaults only: no header is read by the others, or every scan is turned by them. Labels in
    part are for the plan, with and without unlabelled scans: the peers cannot learn from them.
    """
    runs = [
        OrganRun(organ, name, seed, minutes, device, threads)
        for organ in sets
        for name in contenders
        for seed in range(seeds)
        if organ in ORGAN_SETS or name in ((PLAN, "fixed") if organ in TURNED_SETS else (PLAN, UNLABELLED))
    ]
    order = (*ORGAN_SETS, *TURNED_SETS, *DRAWN_SETS)

    def rank(run: OrganRun) -> tuple[int, int, int, int]:
        ablation = run.contender in ABLATIONS
        if run.organ not in ORGAN_SETS:
            block = 3
        elif ablation:
            block = 1 if run.organ == _FIRST_SET and run.seed == 0 else 4
        else:
            block = 0 if run.seed == 0 else 2
        return block, run.seed, order.index(run.organ), contenders.index(run.contender)

    return sorted(runs, key=rank)


def run_in_process(run: OrganRun, *, data: Path, records: OrganRecords, show: Show) -> str:
    """Run in a process whose memory is fresh, which writes the record; return its error, or an empty text."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(run, data, records.results, records.work, sender))
    process.start()
    sender.close()
    error = ""
    try:
        while True:
            if receiver.poll(1):
                what, part = receiver.recv()
                if what == "error":
                    error = str(part)
                else:
                    show(what, part)
    except EOFError:
        process.join()
    finally:
        # It ends its own server before it ends.
        process.terminate()
        process.join(30)
        process.kill()
    return error or (f"its process ended with code {process.exitcode}" if process.exitcode else "")


def _child(run: OrganRun, data: Path, results: Path, work: Path, sender: Connection) -> None:
    signal.signal(signal.SIGTERM, _leave)

    def tell(what: str, part: object) -> None:
        try:
            sender.send((what, part))
        except BrokenPipeError:
            # The parent was killed: leave the cores to the run that goes on.
            _leave()

    try:
        run_organ(run, data=data, records=OrganRecords(results, work), tell=tell)
    except (TrainingError, InvalidVolume, OSError, ValueError, subprocess.SubprocessError) as error:
        tell("error", str(error))
    except KeyboardInterrupt:
        os._exit(130)  # the parent says so


def _leave(*_: Any) -> NoReturn:
    raise SystemExit(143)


def run_organ(run: OrganRun, *, data: Path, records: OrganRecords, tell: Show) -> None:
    """Train a contender on a set, score it, and write its record."""
    torch_device(run.device)
    torch.set_num_threads(run.threads)
    tell("preparing the set", 0.0)
    organ = prepared_organ(_set(run.organ), data, records.work / "sets", seed=run.seed)
    earlier = records.all().get(replace(run, contender=PLAN).name) if run.contender != PLAN else None
    with contender(
        run, organ, work=records.work / run.file_name, earlier=earlier and earlier.settings, tell=tell
    ) as ready:
        records.write(run, _as_the_plan(organ) if ready is None else _record(ready, organ, tell))


def _record(ready: Ready, organ: Organ, tell: Show) -> OrganRecord:
    def done(number: int) -> None:
        tell(f"scoring, scan {number} of {len(organ.val)}", 1.0)

    began = time.monotonic()
    scores = score_organ(organ.val, ready.segment_case, n_labels=len(organ.labels), on_case=done)
    return OrganRecord(
        steps=ready.steps,
        seconds=ready.seconds,
        plan_seconds=ready.plan_seconds,
        scoring_seconds=time.monotonic() - began,
        parameters=ready.parameters,
        labels=organ.labels,
        training_cases=tuple(case.id for case in organ.train),
        scores=scores,
        settings=dict(ready.settings),
        reasons=dict(ready.reasons),
        machine=tuple(machine_lines()),
    )


def _as_the_plan(organ: Organ) -> OrganRecord:
    """Return the record of a plan without a part in which the plan does as the fixed defaults do: nothing was run."""
    cases = tuple(case.id for case in organ.train)
    return OrganRecord(0, 0.0, 0.0, 0.0, 0, organ.labels, cases, {}, {"same_as": PLAN})


def _set(name: str) -> OrganSet:
    sets: Mapping[str, OrganSet] = {**ORGAN_SETS, **TURNED_SETS, **DRAWN_SETS}
    return sets[name]
