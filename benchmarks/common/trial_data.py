"""The finished trials of a benchmark: one compact data file, and results in a work folder that are not in it yet."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.report import data_file, read_data, rounded, write_data
from benchmarks.common.scores import METRICS
from benchmarks.common.trials import Result, Trial
from filelock import FileLock

__all__ = ["TrialData"]


class TrialData:
    """Results by the names of their trials.

    A trial's process writes ``<work>/finished/<name>.json``. ``merge`` moves it into the data file, which several
    processes may share: a result is in one of the two at any time.

    Args:
        results: folder of the results.
        benchmark: name of the data file.
        work: folder for results that are not merged, for locks, checkpoints and models.
        complete: run no trials that are missing.
    """

    def __init__(self, results: Path, benchmark: str, work: Path, *, complete: bool = False) -> None:
        self.results, self.benchmark, self.work, self.complete = results, benchmark, work, complete
        self.file = data_file(results, benchmark)
        self._version: tuple[int, int] | None = None
        self._content = _empty()

    def __contains__(self, trial: Trial) -> bool:
        return trial.name in self._read()["trials"]

    def of(self, trials: Sequence[Trial]) -> list[Result]:
        """Return the results of those trials that are finished, in their order."""
        content = self._read()
        entries = content["trials"]
        return [_from_entry(t, entries[t.name], content) for t in trials if t.name in entries]

    def merge(self) -> None:
        """Move all results of the work folder into the data file, by rename."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.file.with_suffix(".lock")):
            finished = sorted((self.work / "finished").glob("*.json"))
            if not finished:
                return
            content = read_data(self.results, self.benchmark) if self.file.is_file() else _empty()
            for file in finished:
                content["trials"][file.stem] = _to_entry(json.loads(file.read_text()), content)
            content["trials"] = dict(sorted(content["trials"].items()))
            write_data(self.results, self.benchmark, content)
            for file in finished:
                file.unlink()

    def _read(self) -> dict[str, Any]:
        """Read the data file, unless it is the one that was read last."""
        if self.file.is_file():
            status = self.file.stat()
            version = (status.st_ino, status.st_mtime_ns)
            if version != self._version:
                self._content, self._version = read_data(self.results, self.benchmark), version
        return self._content


def _empty() -> dict[str, Any]:
    return {"machines": [], "cases": [], "trials": {}}


def _to_entry(values: Mapping[str, Any], content: dict[str, Any]) -> dict[str, Any]:
    """Return a result as the data file holds it; machines and lists of cases are kept once."""
    scores = values["scores"]
    numbers = {name: value for name, value in values.items() if name not in ("scores", "machine")}
    return {
        "machine": _index(content["machines"], list(values["machine"])),
        "cases": _index(content["cases"], list(scores)),
        **{name: rounded(value) for name, value in numbers.items()},
        **{metric: [rounded(scores[case][metric]) for case in scores] for metric in METRICS},
    }


def _from_entry(trial: Trial, entry: Mapping[str, Any], content: Mapping[str, Any]) -> Result:
    values = {name: value for name, value in entry.items() if name not in METRICS}
    machine, cases = content["machines"][values.pop("machine")], content["cases"][values.pop("cases")]
    scores = {case: {metric: entry[metric][row] for metric in METRICS} for row, case in enumerate(cases)}
    return Result(trial, scores, machine=tuple(machine), **values)


def _index(rows: list[Any], row: Any) -> int:
    """Return the position of a row, which is added if it is new."""
    if row not in rows:
        rows.append(row)
    return rows.index(row)
