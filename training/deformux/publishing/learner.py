"""One round of learning: from all labels so far to a new version, published unless it is clearly worse."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from deformux.data.cases import Case, Scan
from deformux.data.planning import Plan
from deformux.data.preprocessing import Preprocessing
from deformux.fitting.checkpoint import label_checksum
from deformux.fitting.fit import Progress, TrainingError
from deformux.fitting.locator_training import fit_locator
from deformux.networks.deformux_net import PUBLISHED_STRIDES
from deformux.networks.model_file import InvalidModel, ModelCard, network_options, read_card
from deformux.publishing.learning_round import Outcome, Round, RoundPlan
from deformux.publishing.model_versions import ModelVersions
from deformux.publishing.project_plan import FixedPlan, Planner
from deformux.publishing.publish_gate import Decision, Scores, decide
from deformux.publishing.round_folder import RoundFolder
from deformux.publishing.round_training import FOREIGN, RoundTrainings, Trained, Training
from deformux.publishing.score_cache import ScoreCache
from deformux.publishing.validation_split import MIN_CASES_TO_VALIDATE, Assignment

__all__ = ["Learner", "Outcome", "Round"]

logger = logging.getLogger(__name__)


class Learner:
    """Learns a project's labels round by round; keeps versions, validation split, scores and the round under way.

    Everything lies in one folder and is written by rename. A killed round is resumed from its last checkpoint when the
    next one has the same labels and options; if its version was already written, it is only published.

    Args:
        root: the project's state folder.
        labels: names of labels 1..N.
        preprocessing: how scans become network input.
        preset: size of the network.
        keep: number of newest versions to keep, besides those that ``ModelVersions.prune`` keeps.
        planner: decides on network and input of each training, instead of ``preprocessing`` and ``preset``.

    Raises:
        ValueError: neither ``preprocessing`` nor ``planner`` is given.
    """

    def __init__(
        self,
        root: Path,
        *,
        labels: Sequence[str],
        preprocessing: Preprocessing | None = None,
        preset: str = "tiny",
        keep: int = 5,
        planner: Planner | None = None,
    ) -> None:
        if planner is None and preprocessing is None:
            raise ValueError("a learner needs preprocessing or a planner")
        self.root = Path(root)
        self.labels, self.keep = tuple(labels), keep
        self.planner = planner or FixedPlan(Plan(preprocessing or Preprocessing(), preset, PUBLISHED_STRIDES, {}, {}))
        self.versions = ModelVersions(self.root / "versions")
        self.assignment = Assignment(self.root / "assignment.json", self._sides_in_cards)
        self.round_folder = RoundFolder(self.root / "training")
        self.scores = ScoreCache(self.root, self.labels)
        self.trainings = RoundTrainings(self.root, self.labels, self.planner, self.round_folder)

    def learn(
        self,
        cases: Sequence[Case],
        options: Round | None = None,
        *,
        scans: Sequence[Scan] = (),
        on_progress: Callable[[Progress], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> Outcome:
        """Train on all labelled cases, write a version, and publish it if the gate lets it through.

        Args:
            cases: every labelled volume of the project.
            options: how this round is trained.
            scans: other volumes of the project, from which a recipe with ``unlabelled_scans`` learns too: those that
                neither validate nor will, by their ids.
            on_progress, stop: as for ``fit``.

        Raises:
            TrainingStopped: ``stop`` returned true; the next call resumes the round.
            TrainingError: nothing to train on, or the training diverged; nothing was published.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.root / "training.lock").acquire(blocking=False):
                return self._learn(cases, options or Round(), scans, on_progress, stop)
        except Timeout as error:
            raise TrainingError("another training of this project is running; wait for it, or stop it") from error

    def _learn(
        self,
        cases: Sequence[Case],
        options: Round,
        scans: Sequence[Scan],
        on_progress: Callable[[Progress], None] | None,
        stop: Callable[[], bool] | None,
    ) -> Outcome:
        for warning in self.versions.warnings():
            logger.warning("The models: %s", warning)
        interrupted = self._publish_interrupted()
        plan = self._plan(cases, options)
        if interrupted is not None and interrupted.card.training_labels == plan.training_labels:
            return interrupted
        run_id = self.round_folder.begin({**plan.identity(options), "given": self.planner.given()})
        if any(recipe.unlabelled_scans for recipe in plan.recipes):
            plan = dataclasses.replace(plan, scans=self._unlabelled(scans, cases))
        trainings = [self.trainings.prepared(plan, options, part, stop) for part in range(len(plan.recipes))]
        trained = self._train(trainings, plan, options, on_progress, stop)
        decision = self._compare(trained.result.per_case, plan, options)
        name, card = self._write(trained, decision, plan, options, run_id, stop)
        return self._publish(name, card, decision, plan.set_aside)

    def _publish_interrupted(self) -> Outcome | None:
        """Publish the version of a round that was killed after writing it; return its outcome, or None without one."""
        run_id = self.round_folder.under_way()
        written = next((info for info in self.versions.infos() if run_id and info.card.run == run_id), None)
        if written is None or self.versions.fault(written.name):
            return None
        # The decision, with its numbers, is in the card.
        decision = Decision.from_dict(written.card.gate)
        if written.ever_published:
            # It was published already, and may have been rolled back since.
            self.round_folder.end()
            return Outcome(written.name, written.published, decision, written.card)
        return self._publish(written.name, written.card, decision, {})

    def _plan(self, cases: Sequence[Case], options: Round) -> RoundPlan:
        if not cases:
            raise TrainingError("there are no labelled volumes to train on")
        checksums = {case.id: label_checksum(case) for case in cases}
        facts = self.scores.facts(cases, checksums)
        set_aside = {case: fact.fault for case, fact in facts.items() if fact.fault}
        for case, reason in set_aside.items():
            logger.warning("The label of %s is not used: %s", case, reason)
        usable = sorted((case for case in cases if case.id not in set_aside), key=lambda case: case.id)
        if not usable:
            case, reason = next(iter(set_aside.items()))
            raise TrainingError(f"no label can be learnt from; {case}: {reason}")
        self.assignment.assign(case.id for case in usable)
        validates = {case.id: self.assignment.validates(case.id) for case in usable}
        training = tuple(case for case in usable if not validates[case.id])
        can_validate = len(usable) >= MIN_CASES_TO_VALIDATE
        validation = tuple(case for case in usable if validates[case.id]) if can_validate else ()
        if not training:
            raise TrainingError(
                f"the only labelled volumes are kept for validation ({', '.join(validates)}); label one more"
            )
        parent, path = self._start(options)
        logger.info(
            "Training on %d volumes, validating on %d, starting from %s",
            len(training),
            len(validation),
            parent or "scratch",
        )
        last = self._last_from_scratch()
        doubled = bool(parent and validation and last and len(training) >= 2 * last)
        of_project = parent is not None and not parent.startswith(FOREIGN)
        recipe = options.continue_recipe if of_project else options.scratch_recipe
        return RoundPlan(
            training=training,
            validation=validation,
            checksums=checksums,
            facts=facts,
            set_aside=set_aside,
            parent=parent,
            parent_path=path,
            parent_labels=read_card(path).training_labels if path is not None else {},
            recipes=(recipe, options.scratch_recipe) if doubled else (recipe,),
            last_from_scratch=last,
            seed=options.seed,
        )

    def _unlabelled(self, scans: Sequence[Scan], cases: Sequence[Case]) -> tuple[Scan, ...]:
        """Return the scans to learn from without a label; the same as before where a round is resumed."""
        others = {case.id for case in cases} | self.assignment.may_validate(scan.id for scan in scans)
        usable = {scan.id: scan for scan in scans if scan.id not in others}
        kept = self.round_folder.kept("scans", lambda: {"ids": sorted(usable)})
        return tuple(usable[name] for name in kept["ids"] if name in usable)

    def _start(self, options: Round) -> tuple[str | None, Path | None]:
        """Return name and file of the weights to start from; None if there are none, or of another architecture."""
        published = self.versions.published() if not options.from_start else None
        path = self.versions.path(published) if published is not None else options.start
        if path is None or options.from_scratch:
            return None, None
        try:
            self.trainings.network(self.planner.continued(path), path, 0)
        except InvalidModel as error:
            logger.warning("Starting from scratch: %s", error)
            return None, None
        return published or f"{FOREIGN}{path.stem}", path

    def _sides_in_cards(self) -> dict[str, str]:
        """Return the sides of cases by the cards of all versions: a case that was ever trained on stays in training."""
        cards = [info.card for info in self.versions.infos()]
        validating = {case: "validation" for card in cards for case in card.validation.get("per_case") or {}}
        return validating | {case: "training" for card in cards for case in card.training_cases}

    def _last_from_scratch(self) -> int:
        """Return the number of training cases of the last training from scratch; 0 before the first training."""
        return max((info.card.scratch_cases for info in self.versions.infos()), default=0)

    def _train(
        self,
        trainings: Sequence[Training],
        plan: RoundPlan,
        options: Round,
        on_progress: Callable[[Progress], None] | None,
        stop: Callable[[], bool] | None,
    ) -> Trained:
        """Train, also from scratch if the labels have doubled, and return the better of the two."""
        first = self.trainings.fit(trainings, plan, options, 0, on_progress, stop)
        if len(trainings) == 1:
            return first
        logger.info("The labels have doubled since the last training from scratch: training from scratch too")
        second = self.trainings.fit(trainings, plan, options, 1, on_progress, stop)
        # The gate's own comparison, with the fine-tuned model as the incumbent.
        preferred = self._decide(second.result.per_case, first.result.per_case, plan, provisional=False)
        logger.info("From scratch: %s", preferred.reason)
        better = preferred.publish and (preferred.candidate or 0) > (preferred.incumbent or 0)
        return dataclasses.replace(second if better else first, seconds=first.seconds + second.seconds)

    def _compare(self, candidate: Scores, plan: RoundPlan, options: Round) -> Decision:
        """Compare with the model that is served now, which may differ from the parent."""
        published = self.versions.published()
        path = self.versions.path(published) if published is not None else options.served
        card = read_card(path) if path is not None else None
        if path is None or card is None or card.labels != self.labels:
            return self._decide(candidate, None, plan, provisional=True)
        provisional = card.provisional or published is None
        if not candidate:
            if provisional:
                return self._decide(candidate, None, plan, provisional=True)
            return Decision(
                False, f"not measured: no validation case is labelled any more; {published} stays published"
            )
        name = published or f"{FOREIGN}{path.stem}"
        scores = self.scores.scores(name, path, plan.validation, plan.checksums, device=options.device)
        champion = self._champion(card, plan, options)
        decision = self._decide(candidate, scores, plan, provisional=provisional, champion=champion)
        # The best of incumbent, champion and candidate is the champion of the next round.
        if decision.candidate is None:
            return dataclasses.replace(decision, champion=champion[0] if champion else name)
        if decision.candidate >= (decision.best or 0):
            return dataclasses.replace(decision, champion=None)
        return dataclasses.replace(decision, champion=decision.champion or name)

    def _champion(self, card: ModelCard, plan: RoundPlan, options: Round) -> tuple[str, Scores] | None:
        """Return name and scores of the best model before the published one, if it beat the published one, else None.

        The card of the published version names it, so that a rollback also restores the champion.
        """
        name = card.gate.get("champion")
        if name is None:
            return None
        served = options.served
        foreign = served is not None and name == f"{FOREIGN}{served.stem}"
        try:
            path = served if foreign and served is not None else self.versions.path(name)
            if read_card(path).labels != self.labels:
                raise ValueError(f"{name} has other labels")
            return name, self.scores.scores(name, path, plan.validation, plan.checksums, device=options.device)
        except ValueError as error:
            logger.warning("Cannot compare with the best model so far: %s", error)
            return None

    def _decide(
        self,
        candidate: Scores,
        incumbent: Scores | None,
        plan: RoundPlan,
        *,
        provisional: bool,
        champion: tuple[str, Scores] | None = None,
    ) -> Decision:
        shares = {case.id: plan.facts[case.id].shares for case in plan.validation}
        return decide(
            candidate,
            incumbent,
            labels=self.labels,
            shares=shares,
            champion=champion,
            incumbent_is_provisional=provisional,
        )

    def _write(
        self,
        trained: Trained,
        decision: Decision,
        plan: RoundPlan,
        options: Round,
        run_id: str,
        stop: Callable[[], bool] | None,
    ) -> tuple[str, ModelCard]:
        """Write the version and its scores; return its name and its card."""
        result, setup = trained.result, trained.training.setup
        fitted = fit_locator(
            plan.training,
            prep=setup.preprocessing,
            labels=self.labels,
            val_cases=plan.validation,
            sequence_dropout=trained.training.recipe.sequence_dropout,
            device=options.device,
            seed=plan.seed,
            stop=stop,
        )
        card = ModelCard(
            labels=self.labels,
            preprocessing=setup.preprocessing.with_dropout(trained.training.recipe.sequence_dropout),
            preset=setup.preset,
            in_channels=setup.preprocessing.channels,
            network_options=network_options(trained.network),
            plan=setup.for_card(),
            parent=trained.training.parent,
            training_cases=tuple(case.id for case in plan.training),
            training_labels=plan.training_labels,
            recipe=trained.training.recipe.to_dict(),
            seed=plan.seed,
            validation={"mean_dice": result.best_dice, "per_case": result.per_case},
            gate=decision.to_dict(),
            provisional=decision.provisional,
            scratch_cases=plan.scratch_cases,
            run=run_id,
            seconds=trained.seconds,
            device=", ".join(options.devices) or options.device,
            locator=fitted.facts,
        )
        try:
            name = self.versions.write(trained.network, card, locator=fitted.locator)
            # As it was written, with the checksum of the weights.
            card = self.versions.card(name)
        except (OSError, SafetensorError) as error:
            raise TrainingError(f"the new version cannot be written, and nothing was published: {error}") from error
        served = [f"{FOREIGN}{options.served.stem}"] if options.served is not None else []
        self.scores.remember(name, result.per_case, plan.checksums, keep=[*self.versions.names(), *served])
        return name, card

    def _publish(self, name: str, card: ModelCard, decision: Decision, set_aside: Mapping[str, str]) -> Outcome:
        published = decision.publish and self.versions.publish_trained(name, decision.reason)
        if decision.publish and not published:
            pinned = self.versions.pinned()
            decision = dataclasses.replace(decision, publish=False, reason=f"{pinned} is pinned; {decision.reason}")
        logger.info("%s is %s: %s", name, "published" if published else "not published", decision.reason)
        for case, reason in decision.doubtful.items():
            logger.warning("Validation case %s did not count: %s", case, reason)
        self.round_folder.end()
        self.versions.prune(self.keep)
        return Outcome(name, published, decision, card, set_aside)
