"""The plan of a project: every setting of a training, chosen from its scans and labels, with the reason for each."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from deformux.data.choices import Choices
from deformux.data.fingerprint import Fingerprint
from deformux.data.frame import AUGMENTATION_REASONS, choose_frame, frame_augmentation
from deformux.data.planned_grid import (
    PlannedStrides,
    Voxels3,
    coarsened_spacing,
    planned_patch,
    planned_strides,
)
from deformux.data.planned_intensities import planned_modality, planned_window
from deformux.data.planned_output import planned_output
from deformux.data.preprocessing import Preprocessing
from deformux.data.scan_sizes import ScanSizes

__all__ = ["Plan", "Speed", "assumed_speed", "default_minutes", "make_plan"]

_Triple: TypeAlias = tuple[float, float, float]

# Minutes of a training where none are given.
_MINUTES = {"cpu": 10.0, "gpu": 3.0}
# Steps that a training should have, and the fewest that are acceptable while a patch sees too little. On a CPU many
# steps on coarse patches that see an organ are worth more than few on fine ones that see half of it
# (benchmarks/results/plan_trials.md).
_STEPS = {"cpu": (1000, 550), "gpu": (1500, 1000)}
# A patch that sees this part of the labels and their surroundings sees enough.
_ENOUGH_SEEN = 0.75
# The rest of the minutes goes to reading scans, drawing patches, clicks and validation.
_TRAINING_SHARE = 0.7
# On a CPU each patch of a step has a thread: with two cores, steps of two take little longer than steps of one.
_BATCH, _MAX_BATCH = 2, 4
# A patch of fewer voxels sees too little whatever the device; more did not help a set yet.
_LEAST_PATCH, _MOST_PATCH = 32**3, 160**3
# Spacing is coarsened until one patch covers what it should see, but no label that is thicker than a quarter of them
# (``ScanSizes.chord_mm``) gets thinner than this many voxels. Where every label kept six, Dice after as much computing
# was lower by 0.29 to 0.39 on three organs (benchmarks/results/plan_trials.md).
_LEAST_CHORD_VOX = 2.0
# A spacing that differs by less is the same.
_SAME_SPACING = 0.01
# Probability that a training step goes without a sequence, where there are several.
_SEQUENCE_DROPOUT = 0.1
# Part of a GPU's free memory that a step may take.
_MEMORY_SHARE = 0.6
# GPU memory from which a preset is chosen, largest first.
_PRESETS_BY_GIGABYTES = (("base", 20.0), ("small", 8.0), ("tiny", 0.0))


@dataclass(frozen=True)
class Speed:
    """What a device does in training.

    Args:
        voxels_per_second: of all patches of a step, forward and backward.
        bytes_per_voxel: memory of a step for each of them.
        free_bytes: memory that steps may take; None for no limit.
        measured: on this device; else assumed.
    """

    voxels_per_second: float
    bytes_per_voxel: float = 0.0
    free_bytes: float | None = None
    measured: bool = True


@dataclass(frozen=True)
class Plan:
    """Settings of a training.

    Args:
        preprocessing: how scans become network input.
        preset: size of the network.
        strides: of its four stages.
        recipe_changes: fields of a ``Recipe`` and their values.
        reasons: one sentence without a full stop for each choice, in the order of a table.
        facts: numbers behind them, such as ``nnunet_spacing_mm``, ``steps`` and ``voxels_per_second``.
    """

    preprocessing: Preprocessing
    preset: str
    strides: PlannedStrides
    recipe_changes: Mapping[str, Any]
    reasons: Mapping[str, str]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "preprocessing": self.preprocessing.to_dict(),
            "preset": self.preset,
            "strides": [list(stride) for stride in self.strides],
            "recipe_changes": {k: list(v) if isinstance(v, tuple) else v for k, v in self.recipe_changes.items()},
            "reasons": dict(self.reasons),
            "facts": {k: list(v) if isinstance(v, tuple) else v for k, v in self.facts.items()},
        }

    def rows(self) -> list[tuple[str, str, str]]:
        """Return name, value and reason of each choice, as a table shows them."""
        return [(name, self._shown(name), reason) for name, reason in self.reasons.items()]

    def _shown(self, name: str) -> str:
        if name == "budget":
            return f"{self.facts['steps']} steps of {self.facts['seconds_per_step']:.2f} s"
        if name == "spacing_mm" and self.preprocessing.spacing_mm is None:
            return "native"
        if name == "keep_largest":
            return "yes" if self.preprocessing.keep_largest else "no"
        if name == "strides":
            return " ".join("".join(map(str, stride)) for stride in self.strides)
        for values in (self.preprocessing.to_dict(), self.recipe_changes, {"preset": self.preset, "frame": "ras"}):
            if name in values:
                value = values[name]
                return ",".join(f"{v:g}" for v in value) or "none" if isinstance(value, (tuple, list)) else str(value)
        return ""

    def with_sequences(self, sequences: tuple[str, ...]) -> Plan:
        """Return the plan for cases of several sequences, some of which a scan may lack; itself for one."""
        if not sequences:
            return self
        return dataclasses.replace(
            self,
            preprocessing=dataclasses.replace(self.preprocessing, sequences=sequences),
            recipe_changes={**self.recipe_changes, "sequence_dropout": _SEQUENCE_DROPOUT},
            reasons={
                **self.reasons,
                "sequence_dropout": "clinical cases lack a sequence now and then, and Slicer uploads one volume",
            },
        )

    def for_card(self) -> dict[str, Any]:
        """Return what a model's card keeps besides network and input: reasons, facts and changes of the recipe."""
        return {part: value for part, value in self.to_dict().items() if part in ("reasons", "facts", "recipe_changes")}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """Invert ``to_dict``, also after JSON; raise ValueError on a bad value."""
        try:
            first, second, third, fourth = (_voxels(stride) for stride in values["strides"])
            return cls(
                preprocessing=Preprocessing.from_dict(values["preprocessing"]),
                preset=str(values["preset"]),
                strides=(first, second, third, fourth),
                recipe_changes=_with_tuples(values["recipe_changes"]),
                reasons={str(name): str(reason) for name, reason in values["reasons"].items()},
                facts=_with_tuples(values.get("facts", {})),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"a plan cannot be read: {type(error).__name__} {error}") from error


Measure: TypeAlias = Callable[[str, PlannedStrides], Speed]


def assumed_speed(device: str, preset: str) -> Speed:
    """Return the speed of a device that was not measured: two CPU cores, or a GPU of data centres."""
    per_second = {"tiny": 100e3, "small": 45e3, "base": 12e3} if device == "cpu" else {"tiny": 40e6, "small": 30e6}
    return Speed(per_second.get(preset, 18e6), measured=False)


def default_minutes(device: str) -> float:
    """Return the minutes of a training from scratch where none are given: 10 on a CPU, 3 on a GPU."""
    return _MINUTES["cpu" if device.startswith("cpu") else "gpu"]


def make_plan(
    fingerprint: Fingerprint,
    *,
    labels: Sequence[str],
    given: Choices | None = None,
    device: str = "cpu",
    minutes: float | None = None,
    gpu_gigabytes: float | None = None,
    measure: Measure | None = None,
) -> Plan:
    """Choose every setting of a training.

    Args:
        fingerprint: facts of all scans, and of all labels there are.
        labels: names of labels 1..N.
        given: what the user decided, which is taken as it is; None for nothing.
        device: where the training runs.
        minutes: it may take; None for 10 on a CPU and 3 on a GPU.
        gpu_gigabytes: memory of the GPU; None where it is not known.
        measure: returns the device's speed with a preset and strides, such as ``fitting.speed.measure_speed``; None
            assumes one.

    Raises:
        ValueError: there are no scans, or a given value is out of range.
    """
    if not fingerprint.scans:
        raise ValueError("there are no usable scans to plan from; expected at least one")
    given = given or Choices()
    kind = "cpu" if device.startswith("cpu") else "gpu"
    minutes = default_minutes(device) if minutes is None else minutes
    reasons: dict[str, str] = {}
    values = _intensity_settings(fingerprint, given, reasons)
    frame, reasons["frame"] = _given(given.frame) or choose_frame(fingerprint.affines, fingerprint.shapes)
    preset, reasons["preset"] = _given(given.preset) or _preset(kind, gpu_gigabytes)
    scans = ScanSizes.of(fingerprint, frame, len(labels))
    first = given.spacing_mm if isinstance(given.spacing_mm, tuple) else scans.spacing_mm
    strides = planned_strides(first, [mm / s for mm, s in zip(scans.image_mm, first, strict=True)])
    speed = measure(preset, strides) if measure else assumed_speed(kind, preset)
    budget = _Budget.of(speed, kind, minutes, given.batch_size or _BATCH)
    reasons["budget"] = budget.reason
    spacing, native = _spacing(scans, given, budget, reasons)
    patch, strides = _patch(scans, given, spacing, budget, reasons)
    reasons["strides"] = _why_strides(strides)
    batch = budget.batch
    if given.batch_size is None and kind == "gpu":
        batch = int(min(_MAX_BATCH, max(batch, batch * budget.voxels // math.prod(patch))))
    reasons["batch_size"] = "given" if given.batch_size else "one patch from each of several scans"
    kept, reasons["keep_largest"] = planned_output(fingerprint, frame, len(labels), keep_largest=given.keep_largest)
    augmentation = frame_augmentation(frame, spacing)
    reasons |= {name: AUGMENTATION_REASONS[name] for name in augmentation}
    per_step = batch * math.prod(patch) / speed.voxels_per_second
    settings = {**values, **kept, "frame": frame, "spacing_mm": None if native else spacing, "patch_size": patch}
    return Plan(
        preprocessing=Preprocessing.from_dict(settings),
        preset=preset,
        strides=strides,
        recipe_changes={"batch_size": batch, "patches_per_volume": 1, **augmentation},
        reasons=reasons,
        facts={
            "scans": len(fingerprint.scans),
            "labelled": len(fingerprint.labels),
            "minutes": minutes,
            "spacing_mm": spacing,
            "nnunet_spacing_mm": scans.spacing_mm,
            "field_of_view_mm": scans.field_mm,
            "voxels_per_second": speed.voxels_per_second,
            "seconds_per_step": per_step,
            "steps": max(1, int(budget.seconds / per_step)),
        },
    )


@dataclass(frozen=True)
class _Budget:
    """What a training may compute.

    Args:
        seconds: of training steps.
        batch: patches of a step.
        voxels: of a patch with which there is time for all steps that are wanted.
        most_voxels: with which there is time for the fewest that are acceptable.
        reason: how these follow from the speed.
    """

    seconds: float
    batch: int
    voxels: float
    most_voxels: float
    reason: str

    @classmethod
    def of(cls, speed: Speed, kind: str, minutes: float, batch: int) -> _Budget:
        """Divide what the device computes in the minutes among steps and patches."""
        seconds = 60 * minutes * _TRAINING_SHARE
        steps = _STEPS[kind]
        wanted, most = (_voxels_per_patch(speed, seconds / n, batch) for n in steps)
        reason = (
            f"{speed.voxels_per_second / 1e3:,.0f} thousand voxels a second, "
            f"{'measured' if speed.measured else 'assumed'}: in {minutes:g} minutes {steps[0]} steps of {batch} "
            f"patches of {wanted:,.0f} voxels, or {steps[1]} of {most:,.0f}"
        )
        return cls(seconds, batch, wanted, most, reason)


def _intensity_settings(fingerprint: Fingerprint, given: Choices, reasons: dict[str, str]) -> dict[str, Any]:
    """Choose modality, HU window and percentiles."""
    modality, reasons["modality"] = _given(given.modality) or planned_modality(fingerprint)
    values: dict[str, Any] = {"modality": modality}
    if modality == "ct":
        values["window_hu"], reasons["window_hu"] = _given(given.window_hu) or planned_window(fingerprint)
    elif given.window_hu:
        values["window_hu"] = given.window_hu
    if given.percentiles:
        values["percentiles"] = given.percentiles
    if modality == "mr":
        reasons["percentiles"] = "given" if given.percentiles else "each scan by its own, since MR has no unit"
    return values


def _preset(kind: str, gigabytes: float | None) -> tuple[str, str]:
    if kind == "cpu":
        return "tiny", "a CPU trains the smallest network in minutes"
    if gigabytes is None:
        return "small", "fits any GPU"
    name = next(name for name, least in _PRESETS_BY_GIGABYTES if gigabytes >= least)
    return name, f"the largest network for a GPU of {gigabytes:.0f} GB"


def _voxels_per_patch(speed: Speed, seconds_per_step: float, batch: int) -> float:
    """Return the voxels of a patch that device, time and memory allow."""
    most = speed.voxels_per_second * seconds_per_step / batch
    if speed.free_bytes is not None and speed.bytes_per_voxel > 0:
        most = min(most, _MEMORY_SHARE * speed.free_bytes / speed.bytes_per_voxel / batch)
    return float(min(max(most, _LEAST_PATCH), _MOST_PATCH))


def _spacing(scans: ScanSizes, given: Choices, budget: _Budget, reasons: dict[str, str]) -> tuple[_Triple, bool]:
    """Return the spacing to plan with, and whether each scan keeps its own."""
    if given.spacing_mm is not None:
        reasons["spacing_mm"] = "given"
        native = given.spacing_mm == "native"
        return scans.spacing_mm if isinstance(given.spacing_mm, str) else given.spacing_mm, native
    start = scans.spacing_mm
    why = "the median of all scans"
    if scans.thick is not None:
        why = f"the median of all scans, and the 10th percentile between thick slices (axis {scans.thick + 1})"
    spacing = start

    def seen(spacing: _Triple) -> bool:
        return _best_patch(scans, spacing, budget)[2] >= _ENOUGH_SEEN

    if scans.chord_mm is not None and not seen(start):
        coarsest = _triple(np.array(scans.chord_mm) / _LEAST_CHORD_VOX)
        need = scans.need_mm(start)
        spacing = coarsened_spacing(start, need, most_voxels=budget.voxels, coarsest_mm=coarsest, seen=seen)
    if np.allclose(spacing, start, rtol=_SAME_SPACING):
        reasons["spacing_mm"] = f"{_mm(start)}, {'the same in all scans' if scans.same else why}, as nnU-Net"
        # Named even where all scans agree: one that comes later may have another.
        return start, False
    rounded = _triple([float(f"{s:.3g}") for s in spacing])
    wanted = f"so that one patch sees all labels ({_mm(need)})"
    if math.prod(n / s for n, s in zip(need, rounded, strict=True)) > 1.05 * budget.voxels:
        wanted = f"as far as three quarters of the labels stay {_LEAST_CHORD_VOX:g} voxels thick"
    elif not seen(rounded):
        wanted = f"so that all labels ({_mm(need)}) have no more voxels than a patch"
    reasons["spacing_mm"] = f"coarser than nnU-Net's {_mm(start)} ({why}), {wanted}"
    return rounded, False


def _patch(
    scans: ScanSizes, given: Choices, spacing: _Triple, budget: _Budget, reasons: dict[str, str]
) -> tuple[Voxels3, PlannedStrides]:
    """Return the patch and its strides: of the larger budget only as much as it takes to see enough."""
    if given.patch_size is not None:
        reasons["patch_size"] = "given"
        return given.patch_size, planned_strides(spacing, given.patch_size)
    patch, strides, seen = _best_patch(scans, spacing, budget)
    what = "the labels with a margin" if scans.field_mm is not None else "the scans, as long as there are no labels"
    need = _mm(scans.need_mm(spacing))
    reasons["patch_size"] = f"{math.prod(patch):,} voxels, which see {100 * seen:.0f} % of {what} ({need})"
    return patch, strides


def _best_patch(scans: ScanSizes, spacing: _Triple, budget: _Budget) -> tuple[Voxels3, PlannedStrides, float]:
    """Return the smallest patch within the budget that sees enough, else the largest; its strides; how much it sees."""
    need = scans.need_mm(spacing)
    need_vox, image_vox = ([mm / s for mm, s in zip(sizes, spacing, strict=True)] for sizes in (need, scans.image_mm))
    for voxels in np.linspace(budget.voxels, budget.most_voxels, 5):
        patch, strides = planned_patch(spacing, need_vox, image_vox, most_voxels=float(voxels))
        seen = math.prod(min(1.0, p / n) for p, n in zip(patch, need_vox, strict=True))
        if seen >= _ENOUGH_SEEN:
            break
    return patch, strides, seen


def _why_strides(strides: PlannedStrides) -> str:
    if all(step == 2 for stride in strides for step in stride):
        return "the published network's: all axes have about the same spacing"
    kept = [axis + 1 for axis in range(3) if any(stride[axis] == 1 for stride in strides)]
    axes = " and ".join(map(str, kept))
    return f"axis {axes} is not halved while it is twice as coarse as the others or has few voxels"


def _given(value: Any) -> tuple[Any, str] | None:
    return None if value is None else (value, "given")


def _mm(sizes: Sequence[float]) -> str:
    return " × ".join(f"{size:.3g}" for size in sizes) + " mm"


def _with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _triple(values: Any) -> _Triple:
    x, y, z = (float(value) for value in values)
    return x, y, z


def _voxels(values: Any) -> Voxels3:
    x, y, z = (int(value) for value in values)
    return x, y, z
