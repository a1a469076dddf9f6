"""Options of ``deformux simulate`` that need more than a parser; importing them is light."""

from __future__ import annotations

from deformux.active_learning.strategy_names import STRATEGIES
from deformux.cli.common import assignments, console
from deformux.fitting.recipe import RECIPES, Recipe

__all__ = ["chosen_strategies", "short_recipe", "short_recipes"]

_STEPS_PER_EPOCH = 20


def short_recipe(steps: int, name: str = "finetune") -> Recipe:
    """Return a recipe in a number of steps, averaging weights over a tenth of them at most, without clicks."""
    return RECIPES[name].in_steps(steps, epochs=steps // _STEPS_PER_EPOCH).replace(clicks=0)


def short_recipes(steps: int, continue_steps: int, changes: list[str]) -> tuple[Recipe, Recipe | None]:
    """Return the recipes of a training from scratch and of one that continues, None without ``continue_steps``."""
    values = assignments(changes)
    first = short_recipe(steps).replace(**values)
    return first, short_recipe(continue_steps, "continue").replace(**values) if continue_steps else None


def chosen_strategies(text: str, *, several_samples: bool) -> tuple[str, ...]:
    """Return the strategies of an option; ``all`` leaves out bald where each volume has one sample only."""
    if text != "all":
        return tuple(dict.fromkeys(text.replace(" ", "").split(",")))
    if several_samples:
        return STRATEGIES
    console.print("without bald: it needs --snapshots 2, or axes that may be mirrored (--set flip_axes=0,)")
    return tuple(name for name in STRATEGIES if name != "bald")
