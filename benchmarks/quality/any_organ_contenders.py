"""What is compared: the plan, the fixed defaults, the plan without each of its parts, and two peers."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from benchmarks.quality.any_organ_deformux import Tell, deformux_segmenter, train_deformux
from benchmarks.quality.any_organ_dynunet import DynUNetContender
from benchmarks.quality.any_organ_fixed import Settings, fixed_settings
from benchmarks.quality.any_organ_monailabel import radiology_app
from benchmarks.quality.any_organ_records import OrganRun
from benchmarks.quality.any_organ_sets import Organ

from deformux.data.cases import Case, Scan
from deformux.data.fingerprint import read_fingerprint
from deformux.data.frame import frame_axes
from deformux.data.planning import Plan
from deformux.data.volume_reader import open_volume
from deformux.fitting.recipe import RECIPES
from deformux.fitting.speed import plan_on
from deformux.networks.deformux_net import PUBLISHED_STRIDES

__all__ = ["ABLATIONS", "CONTENDERS", "MAIN_CONTENDERS", "PLAN", "UNLABELLED", "Ready", "contender", "planned_by"]

PLAN = "plan"
_PARTS = ("frame", "spacing", "patch", "strides", "window", "augmentation", "largest")
_OPTIMIZERS = MappingProxyType({"dynunet": "sgd", "dynunet-adamw": "adamw"})
_APP = "monailabel"
_FIXED = "fixed"
UNLABELLED = f"{PLAN}-with-unlabelled"
MAIN_CONTENDERS = (PLAN, _FIXED, *_OPTIMIZERS, _APP)
ABLATIONS = tuple(f"{PLAN}-without-{part}" for part in _PARTS)
CONTENDERS = (*MAIN_CONTENDERS, UNLABELLED, *ABLATIONS)
_MOST_SCANS = 64

# Numbers of a recipe that change how patches are augmented.
_AUGMENTATION = (
    *("rotation_degrees", "scaling", "affine_probability", "elastic_probability", "elastic_sigma"),
    *("elastic_magnitude", "flip_axes", "intensity_shift", "intensity_scale", "noise_std", "gamma"),
    *("low_resolution", "intensity_probability", "voxel_aspect", "unlabelled_border"),
)


@dataclass(frozen=True)
class Ready:
    """A trained contender.

    Args:
        segment_case: from a case to its labels ``(X, Y, Z)`` on its own grid.
        steps, seconds: of its training, with the seconds of its plan.
        plan_seconds: of them.
        parameters: of its network.
        settings, reasons: what was chosen, and why.
    """

    segment_case: Callable[[Case], np.ndarray]
    steps: int
    seconds: float
    parameters: int
    settings: Mapping[str, Any]
    plan_seconds: float = 0.0
    reasons: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Planned:
    """A plan and the seconds that reading the scans, measuring and choosing took."""

    plan: Plan
    seconds: float


@contextmanager
def contender(
    run: OrganRun, organ: Organ, *, work: Path, earlier: Mapping[str, Any] | None, tell: Tell
) -> Iterator[Ready | None]:
    """Train a contender; yield it, or None where what it changes in the plan is as in the plan already.

    Args:
        run: which contender, and for how long.
        organ: the set.
        work: folder for files of its own.
        earlier: settings in the record of the plan for this set and seed: other contenders start from that plan.
        tell: called with what is done now, and the part of the training that is done.
    """
    seconds = 60 * run.minutes
    if run.contender == _APP:
        with radiology_app(organ, work / "monailabel", device=run.device, threads=run.threads) as app:
            steps, spent = app.train(seconds=seconds, tell=tell)
            yield Ready(app.segment_case, steps, spent, app.parameters(), app.facts())
        return
    if run.contender == _FIXED:
        yield _trained(run, organ, fixed_settings(organ.scans), seconds, tell)
        return
    planned = planned_by(earlier) or _make(run, organ, tell)
    if run.contender in _OPTIMIZERS:
        peer = DynUNetContender(
            organ.scans,
            sequences=organ.sequences,
            n_labels=len(organ.labels),
            voxels=_voxels(planned.plan),
            optimizer=_OPTIMIZERS[run.contender],
            seed=run.seed,
            device=run.device,
        )
        trained = peer.train(organ.train, seconds=seconds, tell=tell)
        yield Ready(peer.segment_case, trained.steps, trained.seconds, _parameters(peer.network), peer.facts())
        return
    settings = _settings(planned)
    scans: tuple[Scan, ...] = ()
    if run.contender == UNLABELLED:
        if not organ.unlabelled:
            yield None
            return
        scans = organ.unlabelled
        settings = dataclasses.replace(settings, recipe=settings.recipe.replace(unlabelled_scans=_MOST_SCANS))
    elif run.contender != PLAN:
        part = run.contender.removeprefix(f"{PLAN}-without-")
        changed = _without(part, settings, fixed_settings(organ.scans), organ.scans)
        if changed == settings:
            yield None
            return
        settings = changed
    ready = _trained(run, organ, settings, seconds, tell, scans)
    yield dataclasses.replace(ready, settings={**ready.settings, PLAN: planned.plan.to_dict()})


def planned_by(settings: Mapping[str, Any] | None) -> _Planned | None:
    """Return the plan that the settings of a record hold."""
    if settings is None or PLAN not in settings:
        return None
    return _Planned(Plan.from_dict(settings[PLAN]), float(settings["plan_seconds"]))


def _make(run: OrganRun, organ: Organ, tell: Tell) -> _Planned:
    tell("planning", 0.0)
    began = time.monotonic()
    plan = plan_on(
        run.device,
        read_fingerprint(organ.scans, organ.train),
        labels=organ.labels,
        minutes=run.minutes,
        sequences=organ.sequences,
    )
    return _Planned(plan, time.monotonic() - began)


def _settings(planned: _Planned) -> Settings:
    plan = planned.plan
    recipe = RECIPES["finetune"].replace(**plan.recipe_changes)
    strides = None if plan.strides == PUBLISHED_STRIDES else plan.strides
    return Settings(plan.preprocessing, plan.preset, strides, recipe, dict(plan.reasons), planned.seconds)


def _trained(
    run: OrganRun, organ: Organ, settings: Settings, seconds: float, tell: Tell, scans: Sequence[Scan] = ()
) -> Ready:
    trained = train_deformux(
        settings,
        organ.train,
        organ.labels,
        # A plan that takes longer than all the minutes leaves a moment.
        seconds=max(seconds - settings.seconds, 0.1 * seconds),
        seed=run.seed,
        device=run.device,
        tell=tell,
        scans=scans,
    )
    return Ready(
        segment_case=deformux_segmenter(trained.network, settings, run.device),
        steps=trained.steps,
        seconds=trained.seconds + settings.seconds,
        parameters=_parameters(trained.network),
        settings={**settings.facts(), "plan_seconds": settings.seconds},
        plan_seconds=settings.seconds,
        reasons=settings.reasons,
    )


def _without(part: str, planned: Settings, fixed: Settings, scans: Sequence[Path]) -> Settings:
    """Return a plan in which one part is as in the fixed defaults."""
    prep = planned.prep
    # From the axes of the plan's frame to right, anterior, superior, as most scans have it.
    to_ras = _axes_to_ras(prep.frame, scans)
    back = tuple(to_ras.index(axis) for axis in range(3))
    changes: dict[str, Any] = {}
    if part == "frame" and prep.frame != fixed.prep.frame:
        return _in_frame(planned, fixed.prep.frame, to_ras)
    if part == "spacing":
        coarse = fixed.prep.spacing_mm
        changes["spacing_mm"] = None if coarse is None else _ordered(coarse, back)
    elif part == "patch":
        changes["patch_size"] = _ordered(fixed.prep.patch_size, back)
        recipe = planned.recipe.replace(
            batch_size=fixed.recipe.batch_size, patches_per_volume=fixed.recipe.patches_per_volume
        )
        planned = dataclasses.replace(planned, recipe=recipe)
    elif part == "strides":
        return dataclasses.replace(planned, strides=fixed.strides)
    elif part == "window" and prep.modality == fixed.prep.modality:
        changes = {"window_hu": fixed.prep.window_hu, "percentiles": fixed.prep.percentiles}
    elif part == "largest":
        changes["keep_largest"] = False
    elif part == "augmentation":
        as_fixed = {name: getattr(fixed.recipe, name) for name in _AUGMENTATION}
        return dataclasses.replace(planned, recipe=planned.recipe.replace(**as_fixed))
    return dataclasses.replace(planned, prep=dataclasses.replace(prep, **changes))


def _in_frame(planned: Settings, frame: str, order: tuple[int, int, int]) -> Settings:
    """Return settings with the axes of another frame, which are those of the plan in this order."""
    prep, recipe = planned.prep, planned.recipe
    spacing = None if prep.spacing_mm is None else _ordered(prep.spacing_mm, order)
    turned = {"frame": frame, "patch_size": _ordered(prep.patch_size, order), "spacing_mm": spacing}
    changes: dict[str, Any] = {
        "voxel_aspect": _ordered(recipe.voxel_aspect, order),
        "flip_axes": tuple(sorted(order.index(axis) for axis in recipe.flip_axes)),
    }
    if isinstance(recipe.rotation_degrees, tuple):
        changes["rotation_degrees"] = _ordered(recipe.rotation_degrees, order)
    return dataclasses.replace(
        planned,
        prep=dataclasses.replace(prep, **turned),
        strides=planned.strides and tuple(_ordered(stage, order) for stage in planned.strides),
        recipe=recipe.replace(**changes),
    )


def _axes_to_ras(frame: str, scans: Sequence[Path]) -> tuple[int, int, int]:
    """Return the frame's axis along each of right, anterior, superior in most scans."""
    found: Counter[tuple[int, int, int]] = Counter()
    for scan in scans:
        with open_volume(scan) as opened:
            shape, affine = opened.header.shape, opened.header.affine
        own, ras = (frame_axes(name, shape, affine)[0] for name in (frame, "ras"))
        first, second, third = (own.index(axis) for axis in ras)
        found[first, second, third] += 1
    return found.most_common(1)[0][0]


def _ordered(values: Sequence[Any], order: Sequence[int]) -> tuple[Any, ...]:
    return tuple(values[axis] for axis in order)


def _voxels(plan: Plan) -> int:
    """Return the voxels in all patches of a step."""
    batch = int(plan.recipe_changes.get("batch_size", RECIPES["finetune"].batch_size))
    return batch * int(np.prod(plan.preprocessing.patch_size))


def _parameters(network: Any) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
