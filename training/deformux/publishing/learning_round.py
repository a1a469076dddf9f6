"""A round of learning: its options, its plan, and its outcome."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deformux.data.cases import Case, Scan
from deformux.data.label_quality import LabelFacts
from deformux.fitting.fit import Progress
from deformux.fitting.recipe import RECIPES, Recipe
from deformux.networks.model_file import ModelCard
from deformux.publishing.publish_gate import Decision

__all__ = ["Outcome", "Round", "RoundPlan", "round_progress"]


@dataclass(frozen=True)
class Round:
    """How a round is trained.

    Args:
        scratch_recipe, continue_recipe: for a start from random or foreign weights, and from a published version. The
            new version takes guidance if its recipe has clicks, whatever it starts from.
        start: model file to start from while no version is published.
        served: model file that answers requests while no version is published; the gate compares with it.
        from_scratch: start from random weights in any case.
        from_start: start from ``start`` even if a version is published.
        device: where to compute.
        devices: where to train, with one process on each; empty for ``device`` alone.
        memory_share: most of a GPU's memory for each process that a training on several devices starts.
        seed: of every random choice.
        checkpoint_seconds: least time between two checkpoints.
        minutes: time of a training from scratch, into which as many steps as fit are put, and twice the time of one
            that continues; None for the steps of the recipes.
    """

    scratch_recipe: Recipe = RECIPES["finetune"]
    continue_recipe: Recipe = RECIPES["continue"]
    start: Path | None = None
    served: Path | None = None
    from_scratch: bool = False
    from_start: bool = False
    device: str = "cpu"
    devices: tuple[str, ...] = ()
    memory_share: float = 1.0
    seed: int = 0
    checkpoint_seconds: float = 30.0
    minutes: float | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RoundPlan:
    """A round before it begins: which cases train and which validate, and where the weights come from.

    Args:
        training, validation: cases of each side.
        checksums, facts: of each label, by case id.
        set_aside: case id to why its label is not used.
        parent, parent_path: name and file of the model to start from; None for random weights.
        parent_labels: case id to checksum of the label that the parent was trained on.
        recipes: of the training, and of a second one from scratch if the labels have doubled since the last.
        last_from_scratch: number of training cases of the last training from scratch; 0 if there was none.
        seed: of every random choice.
        scans: volumes without a label to learn from.
    """

    training: tuple[Case, ...]
    validation: tuple[Case, ...]
    checksums: Mapping[str, str]
    facts: Mapping[str, LabelFacts]
    set_aside: Mapping[str, str]
    parent: str | None
    parent_path: Path | None
    parent_labels: Mapping[str, str]
    recipes: tuple[Recipe, ...]
    last_from_scratch: int
    seed: int
    scans: tuple[Scan, ...] = ()

    @property
    def training_labels(self) -> dict[str, str]:
        """Return label checksums by case id."""
        return {case.id: self.checksums[case.id] for case in self.training}

    @property
    def new(self) -> set[str]:
        """Return the cases that the parent has not seen, or not with this label."""
        return {case.id for case in self.training if self.parent_labels.get(case.id) != self.checksums[case.id]}

    @property
    def scratch_cases(self) -> int:
        """Return the training cases of the last training from scratch in this line of models, this round included."""
        from_scratch_now = self.parent is None or len(self.recipes) > 1
        return len(self.training) if from_scratch_now else self.last_from_scratch or len(self.training)

    def identity(self, options: Round) -> dict[str, Any]:
        """Return what an interrupted round must have in common with this one to be resumed."""
        # The time replaces the steps, which are measured once.
        timed = {} if options.minutes is None else {"minutes": options.minutes, "fixed": dict(options.fixed)}
        return {
            "training": self.training_labels,
            "validation": {case.id: self.checksums[case.id] for case in self.validation},
            "parent": self.parent,
            "recipes": [self.recipes[0].to_dict(), options.scratch_recipe.to_dict()],
            "seed": self.seed,
            **timed,
        }


@dataclass(frozen=True)
class Outcome:
    """Result of a round: the version written, the gate's decision, and whether it is published.

    ``set_aside`` names labelled cases that were not used, each with the reason.
    """

    version: str
    published: bool
    decision: Decision
    card: ModelCard
    set_aside: Mapping[str, str] = field(default_factory=dict)


def round_progress(
    on_progress: Callable[[Progress], None] | None, recipes: Sequence[Recipe], part: int
) -> Callable[[Progress], None] | None:
    """Wrap ``on_progress`` to report the progress of the whole round, of which one training is a part."""
    if on_progress is None:
        return None
    before, after = recipes[:part], recipes[part + 1 :]

    def report(p: Progress) -> None:
        steps_before, steps_after = (sum(recipe.steps for recipe in some) for some in (before, after))
        epochs_before, epochs_after = (sum(recipe.epochs for recipe in some) for some in (before, after))
        on_progress(
            dataclasses.replace(
                p,
                step=p.step + steps_before,
                total_steps=p.total_steps + steps_before + steps_after,
                epoch=p.epoch + epochs_before,
                total_epochs=p.total_epochs + epochs_before + epochs_after,
                eta_s=p.eta_s + p.seconds / max(1, p.step) * steps_after,
            )
        )

    return report
