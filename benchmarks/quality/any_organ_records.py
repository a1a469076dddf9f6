"""The finished records of the benchmark of any organ: one for each set, contender, seed and number of minutes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common.report import data_file, read_data, rounded, write_data
from benchmarks.quality.any_organ_scores import ORGAN_METRICS, OrganScores
from filelock import FileLock

from deformux.data.atomic_files import write_text
from deformux.inference.metrics import mean_dice

__all__ = ["OrganRecord", "OrganRecords", "OrganRun"]

_NAME = "any_organ"


@dataclass(frozen=True)
class OrganRun:
    """One training with its test: what is trained, on what, for how long and where.

    Args:
        organ: name of a set.
        contender: name of what is trained.
        seed: of the training cases, the weights and every random choice.
        minutes: of training.
        device, threads: where to compute.
    """

    organ: str
    contender: str
    seed: int
    minutes: float
    device: str = "cpu"
    threads: int = 2

    @property
    def name(self) -> str:
        """Return the name of its record."""
        place = self.device if self.device != "cpu" else f"{self.threads} threads"
        return f"{self.organ}, {self.contender}, seed {self.seed}, {self.minutes:g} min on {place}"

    @property
    def file_name(self) -> str:
        """Return its name as that of a file."""
        return self.name.replace(", ", "_").replace(" ", "-").replace(":", "-")


@dataclass(frozen=True)
class OrganRecord:
    """Result of a run.

    Args:
        steps, seconds: optimizer steps, and seconds of training; of a plan, with those of its making.
        plan_seconds: those that a plan took of them.
        scoring_seconds: of all scored cases together.
        parameters: of the network.
        labels: names of labels 1..N.
        training_cases: ids.
        scores: of the scored cases.
        settings: what was chosen for the set, in plain values.
        reasons: of the settings, by their names.
        machine: facts, one per line.
    """

    steps: int
    seconds: float
    plan_seconds: float
    scoring_seconds: float
    parameters: int
    labels: tuple[str, ...]
    training_cases: tuple[str, ...]
    scores: OrganScores
    settings: Mapping[str, Any] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    machine: tuple[str, ...] = ()

    def mean(self, metric: str) -> float:
        """Return the mean over labels of the mean over cases."""
        return mean_dice([[_number(value) for value in own[metric]] for own in self.scores.values()])


class OrganRecords:
    """Records by the names of their runs.

    A run's process writes ``<work>/finished/<name>.json``; ``merge`` moves it into the data file. A record is in one of
    the two at any time.
    """

    def __init__(self, results: Path, work: Path) -> None:
        self.results, self.work = results, work
        self.file = data_file(results, _NAME)

    def write(self, run: OrganRun, record: OrganRecord) -> None:
        """Keep a record in the work folder, by rename."""
        entry = {"name": run.name, **asdict(record)}
        write_text(self.work / "finished" / f"{run.file_name}.json", json.dumps(entry))

    def merge(self) -> None:
        """Move all records of the work folder into the data file, by rename."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.file.with_suffix(".lock")):
            finished = sorted((self.work / "finished").glob("*.json"))
            if not finished:
                return
            content = self._read()
            for file in finished:
                entry = json.loads(file.read_text())
                name = entry.pop("name")
                content["records"][name] = _to_row(entry, content)
            content["records"] = dict(sorted(content["records"].items()))
            write_data(self.results, _NAME, content)
            for file in finished:
                file.unlink()

    def all(self) -> dict[str, OrganRecord]:
        """Return all records of the data file."""
        content = self._read()
        return {name: _from_row(row, content) for name, row in content["records"].items()}

    def _read(self) -> dict[str, Any]:
        if self.file.is_file():
            return read_data(self.results, _NAME)
        return {"machines": [], "labels": [], "cases": [], "records": {}}


def _to_row(entry: Mapping[str, Any], content: dict[str, Any]) -> dict[str, Any]:
    """Return a record as the data file holds it; machines, labels and lists of cases are kept once."""
    row = {key: value for key, value in entry.items() if key not in ("scores", "machine", "labels")}
    scores = entry["scores"]
    return {
        "machine": _index(content["machines"], list(entry["machine"])),
        "labels": _index(content["labels"], list(entry["labels"])),
        "cases": _index(content["cases"], list(scores)),
        **rounded(row),
        **{metric: [rounded(own[metric]) for own in scores.values()] for metric in ORGAN_METRICS},
    }


def _from_row(row: Mapping[str, Any], content: Mapping[str, Any]) -> OrganRecord:
    values = dict(row)
    cases = content["cases"][values.pop("cases")]
    columns = {metric: values.pop(metric) for metric in ORGAN_METRICS}
    scores = {case: {metric: columns[metric][i] for metric in ORGAN_METRICS} for i, case in enumerate(cases)}
    values["machine"] = tuple(content["machines"][values["machine"]])
    values["labels"] = tuple(content["labels"][values["labels"]])
    values["training_cases"] = tuple(values["training_cases"])
    return OrganRecord(scores=scores, **values)


def _index(rows: list[Any], row: Any) -> int:
    """Return the position of a row, which is added if it is new."""
    if row not in rows:
        rows.append(row)
    return rows.index(row)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
