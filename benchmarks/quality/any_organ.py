"""Any organ with default settings: the plan, the fixed defaults before it, and what a user would pick instead.

    python -m benchmarks.quality.any_organ                                            # everything, for days
    python -m benchmarks.quality.any_organ --sets heart-7 --seeds 1 --contenders plan fixed dynunet monailabel
    python -m benchmarks.quality.any_organ --contenders plan-without-frame plan-without-strides --seeds 1
    python -m benchmarks.quality.any_organ --minutes 3 --device cuda                  # on a GPU
    python -m benchmarks.quality.any_organ --report                                   # only writes the page again

Each contender trains on the same cases for the same minutes on the same threads, and is scored on all of ``val``. Runs
follow each other, the most informative first; a killed command goes on with the runs that are missing. Run nothing else
beside it: minutes are wall time. Adds each run to data/any_organ.json and rewrites the section
any_organ_10_minutes of any_organ.md (or that of other minutes).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from benchmarks.common.command import run_command
from benchmarks.common.places import DATA, RESULTS, WORK
from benchmarks.common.report import read_section, write_section
from benchmarks.quality.any_organ_contenders import CONTENDERS
from benchmarks.quality.any_organ_page import any_organ_section
from benchmarks.quality.any_organ_records import OrganRecords, OrganRun
from benchmarks.quality.any_organ_runs import ordered_runs, run_in_process
from benchmarks.quality.any_organ_sets import DRAWN_SETS, ORGAN_SETS, TURNED_SETS
from rich.console import Console

_ALL_SETS = (*ORGAN_SETS, *TURNED_SETS, *DRAWN_SETS)
_console = Console(soft_wrap=True)


def main() -> None:
    arguments = _parsed()
    placed = {"seeds": arguments.seeds, "minutes": arguments.minutes, "device": arguments.device}
    runs = ordered_runs(arguments.sets, arguments.contenders, **placed, threads=arguments.threads)
    # The page shows what was run with other options too.
    known = ordered_runs(_ALL_SETS, CONTENDERS, **placed, threads=arguments.threads)
    records = OrganRecords(arguments.results, arguments.work)
    records.merge()
    if arguments.report:
        if not records.all():
            raise ValueError(f"{records.file} has no records to report")
    elif failed := _run_missing(runs, known, records, arguments.data):
        sys.exit("failed, and tried again by the next call:\n" + "\n".join(failed))
    section = _write_page(runs, known, records)
    print(read_section(arguments.results, "any_organ", section))


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.any_organ",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sets", nargs="+", choices=_ALL_SETS, default=_ALL_SETS)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--seeds", type=int, default=3, help="number of repetitions; default 3")
    parser.add_argument("--minutes", type=float, default=10.0, help="of each training; default 10")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each training; default 2")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of all sets")
    parser.add_argument("--work", type=Path, default=WORK / "any_organ", help="folder for files of unfinished runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of pages, pictures and data files")
    parser.add_argument(
        "--report", "--rewrite", action="store_true", help="measure nothing: write the page again from its data"
    )
    arguments = parser.parse_args()
    if arguments.minutes <= 0 or arguments.seeds < 1:
        parser.error("minutes and seeds must be positive")
    return arguments


def _run_missing(runs: Sequence[OrganRun], known: Sequence[OrganRun], records: OrganRecords, data: Path) -> list[str]:
    """Run what has no record yet, one after another; return the errors of those that failed."""
    failed: list[str] = []
    began = time.monotonic()
    missing = [run for run in runs if run.name not in records.all()]
    _console.print(f"{len(runs) - len(missing)} of {len(runs)} runs are done already")
    for done, run in enumerate(missing, start=1):
        with _console.status(run.name) as status:

            def show(what: str, part: float, name: str = run.name) -> None:
                status.update(f"{name}: {what}" + (f" ({100 * part:.0f} %)" if 0 < part < 1 else ""))

            error = run_in_process(run, data=data, records=records, show=show)
        records.merge()
        left = timedelta(seconds=round((time.monotonic() - began) / done * (len(missing) - done)))
        outcome = error or _outcome(records, run)
        _console.print(f"{run.name}: {outcome}; {done} of {len(missing)}, about {left} left")
        if error:
            failed.append(f"{run.name}: {error}")
        _write_page(runs, known, records)
    return failed


def _outcome(records: OrganRecords, run: OrganRun) -> str:
    record = records.all()[run.name]
    if not record.scores:
        return "as the plan"
    return f"Dice {record.mean('dice'):.3f} after {record.steps} steps in {record.seconds:.0f} s"


def _write_page(runs: Sequence[OrganRun], known: Sequence[OrganRun], records: OrganRecords) -> str:
    """Write the section of these runs and of others with a record; return its name."""
    found, asked = records.all(), {run.name for run in runs}
    section = any_organ_section(found, [run for run in known if run.name in asked or run.name in found])
    write_section(records.results, section)
    return section.name


if __name__ == "__main__":
    run_command(main)
