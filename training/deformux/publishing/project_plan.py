"""What decides on network and input of each training of a project."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tabulate import tabulate

from deformux.data.cases import Case
from deformux.data.checked_json import read_checked, write_checked
from deformux.data.choices import Choices
from deformux.data.fingerprint import Fingerprint, read_fingerprint
from deformux.data.planned_output import planned_output
from deformux.data.planning import Plan
from deformux.fitting.speed import plan_on
from deformux.networks.deformux_net import PUBLISHED_STRIDES
from deformux.networks.model_file import read_card

__all__ = ["FixedPlan", "Planner", "ProjectPlanner", "continued_plan", "last_plan"]

logger = logging.getLogger(__name__)

_FILE = "plan.json"
# Scans whose intensities were not read by then are planned by their headers; the next plan reads on.
_READING_SECONDS, _QUICK_SECONDS = 120.0, 20.0


class Planner(Protocol):
    """Decides on network and input of a project's trainings."""

    def from_scratch(self, cases: Sequence[Case], *, stop: Callable[[], bool] | None = None) -> Plan:
        """Return the plan of a training of labelled cases from random weights.

        Raises:
            FingerprintStopped: ``stop`` returned true.
        """

    def continued(self, model: Path, cases: Sequence[Case] = (), *, stop: Callable[[], bool] | None = None) -> Plan:
        """Return the plan of a training of labelled cases that starts from a model file; without cases, of any.

        Raises:
            FingerprintStopped: ``stop`` returned true.
        """

    def given(self) -> Mapping[str, Any]:
        """Return what was not left to the planner, as plain values."""


@dataclass(frozen=True)
class FixedPlan:
    """The same plan for all trainings."""

    plan: Plan

    def from_scratch(
        self,
        cases: Sequence[Case],  # noqa: ARG002 - a Planner's arguments, here and below
        *,
        stop: Callable[[], bool] | None = None,  # noqa: ARG002
    ) -> Plan:
        return self.plan

    def continued(
        self,
        model: Path,  # noqa: ARG002
        cases: Sequence[Case] = (),  # noqa: ARG002
        *,
        stop: Callable[[], bool] | None = None,  # noqa: ARG002
    ) -> Plan:
        return self.plan

    def given(self) -> Mapping[str, Any]:
        return {}


class ProjectPlanner:
    """Plans trainings from scratch by all scans and labels of a project; one that continues keeps its model's plan.

    The last plan and the facts of the scans are kept in a folder.

    Args:
        folder: made when it is needed.
        labels: names of labels 1..N.
        choices: what the user decided; this also changes the plan of a training that continues.
        scans: returns the files of all scans now.
        sequences: of a case, the network's channels; none for one.
        modality: of the scans, where something besides them states it; empty if nothing does.
        minutes: time of a training from scratch; None for the plan's default.
    """

    def __init__(
        self,
        folder: Path,
        *,
        labels: Sequence[str],
        choices: Choices | None = None,
        scans: Callable[[], Sequence[Path]] = tuple,
        sequences: tuple[str, ...] = (),
        modality: str = "",
        minutes: float | None = None,
    ) -> None:
        self.folder, self.labels, self.choices, self.scans = Path(folder), tuple(labels), choices or Choices(), scans
        self.sequences, self.modality, self.minutes = sequences, modality, minutes
        self.device = "cpu"

    def from_scratch(
        self, cases: Sequence[Case], *, quick: bool = False, stop: Callable[[], bool] | None = None
    ) -> Plan:
        """Return the plan for all scans and labelled cases as they are now, and keep it.

        Args:
            cases: that are labelled.
            quick: read the intensities of fewer scans, and do not measure the device.
            stop: asked after each scan whether to stop.

        Raises:
            FingerprintStopped: ``stop`` returned true.
            ValueError: there is no usable scan, or a given value is out of range.
        """
        facts = self._facts(cases, seconds=_QUICK_SECONDS if quick else _READING_SECONDS, stop=stop)
        plan = plan_on(
            self.device,
            facts,
            labels=self.labels,
            given=self.choices,
            minutes=self.minutes,
            sequences=self.sequences,
            measured=not (quick or self.choices.fixes_the_patch),
        )
        write_checked(self.folder / _FILE, plan.to_dict(), indent=2)
        logger.info("The plan of a training from scratch:\n%s", tabulate(plan.rows(), tablefmt="plain"))
        return plan

    def continued(self, model: Path, cases: Sequence[Case] = (), *, stop: Callable[[], bool] | None = None) -> Plan:
        """Return the plan of a model with what the user and the labels of now decide.

        Raises:
            FingerprintStopped: ``stop`` returned true.
            InvalidModel: the model has no card.
        """
        facts = None
        if cases and self.choices.keep_largest is None:
            facts = self._facts(cases, seconds=0.0, stop=stop)
        return continued_plan(model, self.choices, self.sequences, facts=facts, n_labels=len(self.labels))

    def given(self) -> Mapping[str, Any]:
        values = dataclasses.asdict(self.choices)
        if self.choices.keep_largest is None:
            # Unchanged: this identifies a round, and older versions did not know the choice.
            del values["keep_largest"]
        return values

    def _facts(self, cases: Sequence[Case], *, seconds: float, stop: Callable[[], bool] | None) -> Fingerprint:
        """Return the facts of all scans, read for some seconds where they are not known, and of the cases' labels."""
        facts = read_fingerprint(
            self.scans(),
            cases,
            cache=self.folder / "fingerprint.json",
            modality=self.modality,
            seconds=seconds,
            stop=stop,
        )
        for reason in facts.unusable:
            logger.warning("Not planned with: %s", reason)
        return facts


def continued_plan(
    model: Path,
    choices: Choices,
    sequences: tuple[str, ...] = (),
    *,
    facts: Fingerprint | None = None,
    n_labels: int = 0,
) -> Plan:
    """Return the plan of a training that starts from a model: the model's own, with what the user decided.

    What is kept of a result does not depend on the weights, and may have been decided by other or fewer labels.

    Args:
        model: its file.
        choices: of the user.
        sequences: of a case, the network's channels; none for one.
        facts: of the labelled scans, by which it is decided anew whether to keep the largest component; None keeps the
            model's.
        n_labels: labels 1..N.

    Raises:
        InvalidModel: the model has no card.
    """
    card = read_card(model)
    plan = Plan.from_dict(
        {
            "preprocessing": dataclasses.replace(choices.applied_to(card.preprocessing), sequences=sequences).to_dict(),
            "preset": choices.preset or card.preset,
            "strides": card.network_options.get("strides", PUBLISHED_STRIDES),
            **{part: card.plan.get(part, {}) for part in ("recipe_changes", "reasons", "facts")},
        }
    )
    if facts is None or choices.keep_largest is not None:
        return plan
    kept, reason = planned_output(facts, plan.preprocessing.frame, n_labels)
    return dataclasses.replace(
        plan,
        preprocessing=dataclasses.replace(plan.preprocessing, **kept),
        reasons={**plan.reasons, "keep_largest": reason},
    )


def last_plan(folder: Path) -> Plan | None:
    """Return the last plan of a ``ProjectPlanner`` in a folder; None before the first, or if it cannot be read."""
    try:
        return read_checked(folder / _FILE, Plan.from_dict)
    except FileNotFoundError:
        return None
    except ValueError as error:
        logger.warning("The plan is made again at the next training from scratch: %s", error)
        return None
