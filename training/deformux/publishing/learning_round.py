"""How a round of learning is trained, and what it gave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from deformux.fitting.recipe import RECIPES, Recipe
from deformux.networks.model_file import ModelCard
from deformux.publishing.publish_gate import Decision

__all__ = ["Outcome", "Round"]


@dataclass(frozen=True)
class Round:
    """How a round is trained.

    Args:
        scratch_recipe, continue_recipe: for a start from random or foreign weights, and from a published version. The
            version takes guidance where its recipe has clicks, whatever it starts from.
        start: model file to start from while no version is published.
        served: model file that answers requests while no version is published; the gate compares with it.
        from_scratch: start from random weights in any case.
        from_start: start from ``start`` even where a version is published.
        device: where to compute.
        devices: where to train, by a process on each; empty for ``device`` alone.
        memory_share: most of a GPU's memory for each process that a training on several devices starts.
        seed: of every random choice.
        checkpoint_seconds: least time between two checkpoints.
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


@dataclass(frozen=True)
class Outcome:
    """What a round gave: the version written, the gate's decision, whether it is published, and why not.

    ``set_aside`` names labelled cases that were not used, each with the reason.
    """

    version: str
    published: bool
    decision: Decision
    card: ModelCard
    set_aside: Mapping[str, str] = field(default_factory=dict)
