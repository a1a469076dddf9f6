"""Simulation of active learning on a labelled folder: train, test, choose, label, repeat."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from deformux.active_learning.feature_file import read_features, write_features
from deformux.active_learning.learning_curve import SimulatedRound
from deformux.active_learning.observe import encode, observe
from deformux.active_learning.strategies import NEEDS_SCORES, STRATEGIES, choose
from deformux.active_learning.uncertainty_scores import VolumeScores
from deformux.data.atomic_files import replacing, write_text
from deformux.data.cases import Case
from deformux.data.preprocessing import Preprocessing
from deformux.fitting.fit import Progress, fit
from deformux.fitting.recipe import Recipe
from deformux.inference.evaluate import evaluate
from deformux.inference.metrics import mean_dice
from deformux.networks.deformux_net import DeformUXNet
from deformux.networks.model_file import warm_start

__all__ = ["SimulationPlan", "held_out", "simulate"]

_COLD_STARTS = ("adaptive", "typicality")


@dataclass(frozen=True)
class SimulationPlan:
    """Settings of a simulation; the same settings and volumes give the same curves, except for rounding in bfloat16.

    Args:
        strategies: some of ``STRATEGIES``.
        rounds: number of trainings per strategy and seed.
        batch: number of volumes labelled between two trainings.
        start: number of volumes labelled before the first: typical ones for ``adaptive`` and ``typicality``, random
            ones (those of the seed) for the others.
        seeds: each starts other networks from other volumes.
        recipe: of every training, from scratch each time, so that a curve shows the effect of labels and not of longer
            training; its ``flip_axes`` also give the samples that scores compare.
        continue_recipe: where given, of all trainings but the first, which then continue the round before, as in the
            app. Curves then include the effect of longer training, which is the same for all strategies.
        prep, labels, preset: as in ``fit``.
        snapshots: number of models whose predictions a score compares: the current one, and those of earlier rounds.
        start_from: model file that every training and the cold start begin with.
        device: where to compute.

    Raises:
        ValueError: an unknown strategy, or a count below 1.
    """

    strategies: tuple[str, ...]
    rounds: int
    batch: int
    start: int
    seeds: tuple[int, ...]
    recipe: Recipe
    prep: Preprocessing
    labels: tuple[str, ...]
    preset: str = "tiny"
    snapshots: int = 1
    start_from: Path | None = None
    device: str = "cpu"
    continue_recipe: Recipe | None = None

    def __post_init__(self) -> None:
        unknown = [name for name in self.strategies if name not in STRATEGIES]
        if unknown or not self.strategies:
            raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}; got {', '.join(unknown) or 'none'}")
        for name in ("rounds", "batch", "start", "snapshots"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if "bald" in self.strategies and self.snapshots == 1 and not self.recipe.flip_axes:
            raise ValueError(
                "bald compares several predictions of a volume: give axes that may be mirrored (--set flip_axes=0,) "
                "or more than one snapshot (--snapshots 2)"
            )


def held_out(cases: Sequence[Case], fraction: float) -> tuple[list[Case], list[Case]]:
    """Return pool and test set of a labelled folder, by a hash of the case ids, so that the same cases always test.

    Raises:
        ValueError: the fraction leaves one of the two empty.
    """
    ranked = sorted(cases, key=lambda case: hashlib.sha256(case.id.encode()).digest())
    count = round(fraction * len(cases))
    if not 0 < count < len(cases):
        raise ValueError(
            f"a test fraction of {fraction:g} of {len(cases)} volumes leaves nothing to test or to train on"
        )
    test = {case.id for case in ranked[:count]}
    return [case for case in cases if case.id not in test], [case for case in cases if case.id in test]


def simulate(
    plan: SimulationPlan,
    pool: Sequence[Case],
    test: Sequence[Case],
    folder: Path,
    *,
    on_round: Callable[[SimulatedRound, bool], None] | None = None,
    on_progress: Callable[[str, Progress], None] | None = None,
) -> list[SimulatedRound]:
    """Simulate every strategy with every seed.

    Results of trainings are kept in ``folder``, written by rename. A stopped simulation, or a plan with further seeds
    or strategies, computes only what is missing; processes with other seeds may share a folder.

    Args:
        plan: settings of the simulation.
        pool: volumes to choose from.
        test: volumes on which every training is tested, and none is trained.
        folder: where the results are kept.
        on_round: called after each round, and told whether it was computed now or kept.
        on_progress: called about once a second in trainings, and told what is being trained.

    Raises:
        ValueError: the pool is smaller than the last round needs.
        TrainingError, InvalidVolume: as ``fit`` and ``evaluate``.
        OSError: the folder cannot be written to.
    """
    needed = plan.start + (plan.rounds - 1) * plan.batch
    if needed > len(pool):
        raise ValueError(
            f"{plan.rounds} rounds need {needed} volumes to label, the pool has {len(pool)}: "
            "choose fewer rounds, a smaller batch or a smaller test fraction"
        )
    # A folder that cannot be written to must fail before hours of training.
    (folder / "measurements").mkdir(parents=True, exist_ok=True)
    lab = _Laboratory(plan, pool, test, folder, on_progress)
    result: list[SimulatedRound] = []
    for row, computed in _rounds(plan, lab):
        result.append(row)
        if on_round is not None:
            on_round(row, computed)
    return result


def _rounds(plan: SimulationPlan, lab: _Laboratory) -> Iterator[tuple[SimulatedRound, bool]]:
    """Yield rounds seed by seed, so that strategies can be compared before the end."""
    names = sorted(lab.cases)
    for seed in plan.seeds:
        history = {strategy: [lab.start(strategy, seed)] for strategy in plan.strategies}
        for index in range(plan.rounds):
            last = index + 1 == plan.rounds
            for strategy in plan.strategies:
                sets = history[strategy]
                # The first round may be shared with a strategy that is asked for later.
                needs = "nothing" if last else "scores" if not index else _needs(strategy)
                measured, computed = lab.measure(seed, sets, needs, f"{strategy}, seed {seed}, round {index + 1}")
                labelled = sets[-1]
                row = SimulatedRound(
                    strategy, seed, index, labelled, measured.mean_dice, measured.dice, measured.seconds
                )
                yield row, computed
                if not last:
                    chosen = choose(
                        strategy,
                        unlabelled=[name for name in names if name not in labelled],
                        labelled=labelled,
                        batch=plan.batch,
                        round_=index,
                        rng=np.random.default_rng([seed, index + 1]),
                        scores=measured.scores,
                        features=measured.features,
                    )
                    sets.append((*labelled, *chosen))
        lab.forget_weights(seed)


def _needs(strategy: str) -> str:
    return "scores" if strategy in NEEDS_SCORES else "features" if strategy == "typicality" else "nothing"


@dataclass(frozen=True)
class _Measurement:
    mean_dice: float
    dice: tuple[float, ...]
    seconds: float
    scores: Mapping[str, VolumeScores]
    features: Mapping[str, np.ndarray]


class _Laboratory:
    """Trains and tests on sets of volumes, and keeps the results in files."""

    def __init__(
        self,
        plan: SimulationPlan,
        pool: Sequence[Case],
        test: Sequence[Case],
        folder: Path,
        on_progress: Callable[[str, Progress], None] | None,
    ) -> None:
        self.plan, self.test, self.folder, self.on_progress = plan, test, folder, on_progress
        self.cases = {case.id: case for case in pool}
        start_from = plan.start_from
        self.settings: dict[str, Any] = {
            "recipe": plan.recipe.to_dict(),
            "prep": plan.prep.to_dict(),
            "labels": plan.labels,
            "preset": plan.preset,
            "start_from": hashlib.sha256(start_from.read_bytes()).hexdigest() if start_from else None,
            "pool": sorted(self.cases),
            "test": sorted(case.id for case in test),
        }
        if plan.continue_recipe is not None:
            self.settings["continue_recipe"] = plan.continue_recipe.to_dict()

    def start(self, strategy: str, seed: int) -> tuple[str, ...]:
        """Return the volumes that are labelled before the first training."""
        cold = strategy in _COLD_STARTS
        chosen = choose(
            strategy if cold else "random",
            unlabelled=sorted(self.cases),
            batch=self.plan.start,
            round_=0,
            rng=np.random.default_rng([seed, 0]),
            features=self._cold_features(seed) if cold else None,
        )
        return tuple(chosen)

    def measure(self, seed: int, sets: Sequence[tuple[str, ...]], needs: str, what: str) -> tuple[_Measurement, bool]:
        """Return test Dice of a training on the last set, what the next choice needs, and whether it is new."""
        what_counts = self._history(sets, self.plan.snapshots)
        path = self.folder / "measurements" / f"{self._key(seed, what_counts, needs)}.json"
        features = path.with_suffix(".safetensors")
        try:
            values = json.loads(path.read_text())
        except FileNotFoundError:
            values = None
        computed = values is None
        if values is None:
            values = self._measure(seed, sets, needs, features, what)
            write_text(path, json.dumps(values))
        return (
            _Measurement(
                mean_dice=_or_nan(values["mean_dice"]),
                dice=tuple(_or_nan(value) for value in values["dice"]),
                seconds=values["seconds"],
                scores={name: VolumeScores.from_dict(score) for name, score in values["scores"].items()},
                features=read_features(features),
            ),
            computed,
        )

    def forget_weights(self, seed: int) -> None:
        """Delete the kept weights of a seed that is finished."""
        for path in self._weights_folder.glob(f"{seed}-*.safetensors"):
            path.unlink()

    @property
    def _weights_folder(self) -> Path:
        return self.folder / "weights"

    def _measure(
        self, seed: int, sets: Sequence[tuple[str, ...]], needs: str, features_path: Path, what: str
    ) -> dict[str, Any]:
        plan = self.plan
        started = time.monotonic()
        network = self._train(seed, sets, what)
        dice = evaluate(network, self.test, plan.prep, n_labels=len(plan.labels), device=plan.device)
        seconds = time.monotonic() - started
        scores: dict[str, Any] = {}
        features: dict[str, np.ndarray] = {}
        labelled = set(sets[-1])
        if needs == "scores":
            rounds_before = range(len(sets) - 1, max(0, len(sets) - plan.snapshots), -1)
            earlier = [self._snapshot(seed, sets[:count], what) for count in rounds_before]
            for name, case in self.cases.items():
                if name not in labelled:
                    seen = observe(
                        [network, *earlier],
                        case.images,
                        plan.prep,
                        flip_axes=plan.recipe.flip_axes,
                        device=plan.device,
                    )
                    scores[name], features[name] = seen.scores.to_dict(), seen.features
        if needs != "nothing":
            for name, case in self.cases.items():
                if name not in features:
                    features[name] = encode(network, case.images, plan.prep, device=plan.device)
            write_features(features_path, features)
        per_label = np.array(list(dice.values()), dtype=float)
        present = ~np.isnan(per_label)
        with np.errstate(invalid="ignore"):
            means = np.where(present, per_label, 0).sum(0) / present.sum(0)
        return {
            "seed": seed,
            "labelled": sorted(labelled),
            "mean_dice": _or_none(mean_dice(per_label)),
            "dice": [_or_none(value) for value in means],
            "seconds": round(seconds, 1),
            "scores": scores,
        }

    def _train(self, seed: int, sets: Sequence[tuple[str, ...]], what: str) -> DeformUXNet:
        plan = self.plan
        labelled = set(sets[-1])
        if plan.continue_recipe is not None and len(sets) > 1:
            network, recipe, new = self._snapshot(seed, sets[:-1], what), plan.continue_recipe, labelled - {*sets[-2]}
        else:
            network, recipe, new = self._fresh(seed), plan.recipe, set()
        report = self.on_progress
        fit(
            network,
            # Their order must not matter: two strategies may reach the same set in different ways.
            [self.cases[name] for name in sorted(labelled)],
            recipe=recipe,
            prep=plan.prep,
            labels=plan.labels,
            new=new,
            device=plan.device,
            on_progress=None if report is None else lambda progress: report(what, progress),
            seed=seed,
        )
        if plan.snapshots > 1 or plan.continue_recipe is not None:
            state = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
            with replacing(self._weights_path(seed, sets)) as temporary:
                save_file(state, temporary)
        return network

    def _snapshot(self, seed: int, sets: Sequence[tuple[str, ...]], what: str) -> DeformUXNet:
        path = self._weights_path(seed, sets)
        if not path.is_file():
            return self._train(seed, sets, what)
        network = self._fresh(seed)
        network.load_state_dict(load_file(path))
        return network

    def _fresh(self, seed: int) -> DeformUXNet:
        torch.manual_seed(seed)
        network = DeformUXNet(self.plan.prep.channels, len(self.plan.labels) + 1, self.plan.preset)
        if self.plan.start_from is not None:
            warm_start(network, self.plan.start_from)
        return network

    def _cold_features(self, seed: int) -> dict[str, np.ndarray]:
        path = self.folder / "measurements" / f"{self._key(seed, (), 'features')}.safetensors"
        known = read_features(path)
        if known:
            return dict(known)
        network = self._fresh(seed)
        plan = self.plan
        features = {
            name: encode(network, case.images, plan.prep, device=plan.device) for name, case in self.cases.items()
        }
        write_features(path, features)
        return dict(features)

    def _weights_path(self, seed: int, sets: Sequence[tuple[str, ...]]) -> Path:
        return self._weights_folder / f"{seed}-{self._key(seed, self._history(sets, 1), 'weights')}.safetensors"

    def _history(self, sets: Sequence[tuple[str, ...]], rounds: int) -> Sequence[tuple[str, ...]]:
        """Return the labelled sets that a result depends on: of the last rounds, or all where trainings continue."""
        return sets[-rounds:] if self.plan.continue_recipe is None else sets

    def _key(self, seed: int, sets: Sequence[tuple[str, ...]], needs: str) -> str:
        identity = json.dumps([self.settings, seed, [sorted(names) for names in sets], needs], sort_keys=True)
        return hashlib.sha256(identity.encode()).hexdigest()[:20]


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
