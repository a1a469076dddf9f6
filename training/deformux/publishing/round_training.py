"""The trainings of a round: what each of them is, and doing them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deformux.data.fingerprint import FingerprintStopped
from deformux.data.planning import Plan
from deformux.fitting.fit import FitResult, Progress, TrainingError, TrainingStopped
from deformux.fitting.minutes import in_minutes
from deformux.fitting.rank_processes import fit_on
from deformux.fitting.recipe import Recipe
from deformux.networks.deformux_net import DeformUXNet
from deformux.networks.model_file import planned_network, warm_start
from deformux.publishing.learning_round import Round, RoundPlan, round_progress
from deformux.publishing.project_plan import Planner
from deformux.publishing.round_folder import RoundFolder

__all__ = ["FOREIGN", "RoundTrainings", "Trained", "Training"]

FOREIGN = "pretrained-"
"""Before the name of a model that is no version of the project."""
# Continuing a training takes this share of the time of one from scratch.
_CONTINUED_TIME = 0.5


@dataclass(frozen=True)
class Training:
    """One training of a round, before it begins.

    Args:
        setup: the network and its input.
        recipe: of the training, with as many steps as fit into its time.
        parent, weights: name and file of the model to start from; None for random weights.
    """

    setup: Plan
    recipe: Recipe
    parent: str | None
    weights: Path | None


@dataclass(frozen=True)
class Trained:
    """The network that a round chose, and how it was trained.

    Args:
        network: in evaluation mode.
        result: of its training.
        training: that it had.
        seconds: of all trainings of the round.
    """

    network: DeformUXNet
    result: FitResult
    training: Training
    seconds: float


class RoundTrainings:
    """Prepares and does the trainings of a project's rounds.

    Args:
        root: the project's state folder.
        labels: names of labels 1..N.
        planner: decides on network and input of each training.
        round_folder: keeps what was chosen and measured, and the checkpoints.
    """

    def __init__(self, root: Path, labels: Sequence[str], planner: Planner, round_folder: RoundFolder) -> None:
        self.root, self.labels, self.planner, self.round_folder = root, labels, planner, round_folder

    def prepared(self, plan: RoundPlan, options: Round, part: int, stop: Callable[[], bool] | None = None) -> Training:
        """Prepare the first training of a round, from its parent, or the second, from scratch.

        What is measured or chosen here holds until the round ends, also after a restart.

        Raises:
            TrainingStopped: ``stop`` returned true while the scans were read.
        """
        parent, weights = (plan.parent, plan.parent_path) if part == 0 else (None, None)

        def setup() -> dict[str, Any]:
            try:
                if weights is not None:
                    return self.planner.continued(weights, plan.training, stop=stop).to_dict()
                return self.planner.from_scratch(plan.training, stop=stop).to_dict()
            except FingerprintStopped as error:
                raise TrainingStopped(str(error)) from error

        chosen = Plan.from_dict(self.round_folder.kept(f"plan-{part}", setup))
        base = plan.recipes[part].replace(**{**chosen.recipe_changes, **options.fixed})
        minutes = options.minutes
        if minutes is None:
            return Training(chosen, base, parent, weights)
        of_project = parent is not None and not parent.startswith(FOREIGN)
        recipe = self.round_folder.kept(
            f"recipe-{part}",
            lambda: in_minutes(
                minutes * (_CONTINUED_TIME if of_project else 1.0),
                self.network(chosen, weights, plan.seed, guidance=base.clicks > 0),
                plan.training,
                recipe=base,
                prep=chosen.preprocessing,
                labels=self.labels,
                val_cases=plan.validation,
                scans=plan.scans,
                device=options.device,
            ).to_dict(),
        )
        return Training(chosen, Recipe.from_dict(recipe), parent, weights)

    def fit(
        self,
        trainings: Sequence[Training],
        plan: RoundPlan,
        options: Round,
        part: int,
        on_progress: Callable[[Progress], None] | None,
        stop: Callable[[], bool] | None,
    ) -> Trained:
        """Do one of the round's trainings."""
        training = trainings[part]
        setup, recipe = training.setup, training.recipe
        network = self.network(setup, training.weights, plan.seed, guidance=recipe.clicks > 0)
        result = fit_on(
            options.devices or (options.device,),
            network,
            plan.training,
            recipe=recipe,
            prep=setup.preprocessing,
            labels=self.labels,
            val_cases=plan.validation,
            new=plan.new if training.parent else (),
            scans=plan.scans,
            memory_share=options.memory_share,
            on_progress=round_progress(on_progress, [each.recipe for each in trainings], part),
            seed=plan.seed,
            checkpoint=self.round_folder.checkpoint(part),
            checkpoint_seconds=options.checkpoint_seconds,
            stop=stop,
            compile_cache=self.root / "compiled",
            store=self.root / "preprocessed",
        )
        _check_finite(network)
        return Trained(network, result, training, result.seconds)

    def network(self, setup: Plan, weights: Path | None, seed: int, *, guidance: bool = False) -> DeformUXNet:
        """Return a network of a plan, with the weights of a model file, if any, where they fit."""
        torch.manual_seed(seed)
        network = planned_network(setup, len(self.labels), guidance=guidance)
        if weights is not None:
            warm_start(network, weights)
        return network


def _check_finite(network: torch.nn.Module) -> None:
    if not all(bool(torch.isfinite(value).all()) for value in network.state_dict().values()):
        raise TrainingError("the weights are no longer finite; train again with a lower learning rate")
