"""The plan of a project: every setting of a training, chosen from its scans and labels, with the reason for each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from deformux.data.fingerprint import Fingerprint
from deformux.data.frame import choose_frame, frame_axes, frame_grid
from deformux.data.planned_grid import (
    StageStrides,
    Voxels3,
    coarsened_spacing,
    nnunet_spacing,
    planned_patch,
    planned_strides,
)
from deformux.data.planned_intensities import planned_modality, planned_window
from deformux.data.preprocessing import Preprocessing

__all__ = ["Choices", "Plan", "Speed", "assumed_speed", "make_plan"]

_Triple: TypeAlias = tuple[float, float, float]

# Minutes of a training where none are given.
_MINUTES = {"cpu": 10.0, "gpu": 3.0}
# Steps that a training should have: up to here more steps gained more than larger patches
# (benchmarks/results/models.md). Fewer are taken, down to the second number, while a patch sees too little.
_STEPS = {"cpu": (500, 350), "gpu": (1500, 1000)}
# A patch that sees this part of the labels and their surroundings sees enough.
_ENOUGH_SEEN = 0.75
# The rest of the minutes goes to reading scans, drawing patches, clicks and validation.
_TRAINING_SHARE = 0.7
_BATCH, _MAX_BATCH = 2, 4
# A patch of fewer voxels sees too little whatever the device; more did not help a set yet.
_LEAST_PATCH, _MOST_PATCH = 32**3, 160**3
# What a patch should see beside the labels, on each side: a part of their extent, and at least some voxels.
_MARGIN, _MARGIN_VOX = 0.125, 4
# The field of view of all but a tenth of the labelled scans.
_FIELD_PERCENTILE = 90.0
# Spacing is coarsened until this many patches cover the field of view ...
_PATCHES = 2.0
# ... but not beyond this many times nnU-Net's, and while the thinnest label keeps this many voxels.
_MAX_COARSENING, _LEAST_CHORD_VOX = 3.0, 6.0
# Scans have the same spacing if it differs by less.
_SAME_SPACING = 0.01
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
class Choices:
    """What the user decided; None leaves a choice to the plan. ``native`` keeps each scan's own spacing."""

    modality: str | None = None
    window_hu: tuple[float, float] | None = None
    percentiles: tuple[float, float] | None = None
    frame: str | None = None
    spacing_mm: _Triple | Literal["native"] | None = None
    patch_size: Voxels3 | None = None
    preset: str | None = None
    batch_size: int | None = None


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
    strides: StageStrides
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


Measure: TypeAlias = Callable[[str, StageStrides], Speed]


def assumed_speed(device: str, preset: str) -> Speed:
    """Return the speed of a device that was not measured: two CPU cores, or a GPU of data centres."""
    per_second = {"tiny": 100e3, "small": 45e3, "base": 12e3} if device == "cpu" else {"tiny": 40e6, "small": 30e6}
    return Speed(per_second.get(preset, 18e6), measured=False)


def make_plan(
    fingerprint: Fingerprint,
    *,
    labels: Sequence[str],
    given: Choices = Choices(),
    device: str = "cpu",
    minutes: float | None = None,
    gpu_gigabytes: float | None = None,
    measure: Measure | None = None,
) -> Plan:
    """Choose every setting of a training.

    Args:
        fingerprint: facts of all scans, and of all labels there are.
        labels: names of labels 1..N.
        given: what the user decided, which is taken as it is.
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
    kind = "cpu" if device.startswith("cpu") else "gpu"
    minutes = _MINUTES[kind] if minutes is None else minutes
    reasons: dict[str, str] = {}
    values = _intensity_settings(fingerprint, given, reasons)
    frame, reasons["frame"] = _given(given.frame) or choose_frame(fingerprint.affines, fingerprint.shapes)
    preset, reasons["preset"] = _given(given.preset) or _preset(kind, gpu_gigabytes)
    scans = _Scans.of(fingerprint, frame, len(labels))
    speed = measure(preset, scans.first_strides(given)) if measure else assumed_speed(kind, preset)
    batch = given.batch_size or _BATCH
    seconds = 60 * minutes * _TRAINING_SHARE
    wanted, fewest = _STEPS[kind]
    budget, most = (_voxels_per_patch(speed, seconds / steps, batch) for steps in (wanted, fewest))
    reasons["budget"] = (
        f"{speed.voxels_per_second / 1e3:,.0f} thousand voxels a second "
        f"{'measured' if speed.measured else 'assumed'}: in {minutes:g} minutes {wanted} steps of {batch} patches of "
        f"{budget:,.0f} voxels, or {fewest} of {most:,.0f}"
    )
    spacing, native = _spacing(scans, given, budget, reasons)
    patch, strides = _patch(scans, given, spacing, (budget, most), reasons)
    reasons["strides"] = _why_strides(strides)
    if given.batch_size is None and kind == "gpu":
        batch = int(min(_MAX_BATCH, max(_BATCH, _BATCH * budget // math.prod(patch))))
    reasons["batch_size"] = "given" if given.batch_size else "one patch from each of several scans"
    per_step = batch * math.prod(patch) / speed.voxels_per_second
    return Plan(
        preprocessing=Preprocessing.from_dict(
            {**values, "frame": frame, "spacing_mm": None if native else spacing, "patch_size": patch}
        ),
        preset=preset,
        strides=strides,
        recipe_changes={"batch_size": batch, "patches_per_volume": 1},
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
            "steps": max(1, int(seconds / per_step)),
        },
    )


@dataclass(frozen=True)
class _Scans:
    """Sizes of a project's scans and labels along the axes of its frame.

    Args:
        spacing_mm: nnU-Net's.
        thick: the axis of thick slices, or None.
        same: whether all scans have this spacing.
        image_mm: median size of the scans.
        field_mm: size of the box around all labels in most of the labelled scans; None without any.
        chord_mm: how thick the thinnest label is along each axis.
    """

    spacing_mm: _Triple
    thick: int | None
    same: bool
    image_mm: _Triple
    field_mm: _Triple | None
    chord_mm: _Triple | None

    @classmethod
    def of(cls, fingerprint: Fingerprint, frame: str, n_labels: int) -> _Scans:
        """Bring all facts to the frame's axes."""
        grids = [frame_grid(frame, scan.shape, scan.affine) for scan in fingerprint.scans.values()]
        shapes, spacings = (np.array(values, dtype=float) for values in zip(*grids, strict=True))
        spacing, thick = nnunet_spacing(spacings, shapes)
        same = bool((np.abs(spacings / np.array(spacing) - 1) < _SAME_SPACING).all())
        known = range(1, n_labels + 1)
        fields: list[npt.NDArray[np.float64]] = []
        chords: dict[int, list[npt.NDArray[np.float64]]] = {}
        for scan, label in fingerprint.labelled:
            box = label.union(known)
            if box is None:
                continue
            order = list(frame_axes(frame, scan.shape, scan.affine)[0])
            own = np.array(frame_grid(frame, scan.shape, scan.affine)[1])
            fields.append((np.array(box[1]) - box[0])[order] * own)
            for n, chord in label.chords_vox.items():
                if n in known:
                    chords.setdefault(n, []).append(np.array(chord)[order] * own)
        return cls(
            spacing_mm=spacing,
            thick=thick,
            same=same,
            image_mm=_triple(np.median(shapes * spacings, axis=0)),
            field_mm=_triple(np.percentile(fields, _FIELD_PERCENTILE, axis=0)) if fields else None,
            # A label's thickness is its median over the scans; the thinnest label counts.
            chord_mm=_triple(np.min([np.median(own, axis=0) for own in chords.values()], axis=0)) if chords else None,
        )

    def need_mm(self, spacing_mm: _Triple) -> _Triple:
        """Return what a patch should see: the labels with a margin, within the scans; all of them without labels."""
        image = np.array(self.image_mm)
        if self.field_mm is None:
            return self.image_mm
        field_ = np.array(self.field_mm)
        margin = np.maximum(_MARGIN * field_, _MARGIN_VOX * np.array(spacing_mm))
        # Along thick slices the same millimetres are fewer voxels.
        margin = np.minimum(margin, margin.min() + np.array(spacing_mm))
        return _triple(np.minimum(field_ + 2 * margin, image))

    def first_strides(self, given: Choices) -> StageStrides:
        """Return the strides to measure with, before spacing and patch are known."""
        spacing = self.spacing_mm if given.spacing_mm in (None, "native") else given.spacing_mm
        assert not isinstance(spacing, str)
        return planned_strides(spacing, [mm / s for mm, s in zip(self.image_mm, spacing, strict=True)])


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


def _spacing(scans: _Scans, given: Choices, budget: float, reasons: dict[str, str]) -> tuple[_Triple, bool]:
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
    if scans.field_mm is not None and scans.chord_mm is not None:
        coarsest = np.minimum(_MAX_COARSENING * np.array(start), np.array(scans.chord_mm) / _LEAST_CHORD_VOX)
        need = scans.need_mm(start)
        spacing = coarsened_spacing(start, need, most_voxels=_PATCHES * budget, coarsest_mm=_triple(coarsest))
    if np.allclose(spacing, start, rtol=_SAME_SPACING):
        reasons["spacing_mm"] = f"{_mm(start)}, {'the same in all scans' if scans.same else why}, as nnU-Net"
        return start, scans.same
    rounded = _triple([float(f"{s:.3g}") for s in spacing])
    wanted = f"so that {_PATCHES:g} patches see all labels ({_mm(need)})"
    if math.prod(n / s for n, s in zip(need, rounded, strict=True)) > 1.05 * _PATCHES * budget:
        wanted = f"as far as the thinnest label keeps {_LEAST_CHORD_VOX:g} voxels, at most {_MAX_COARSENING:g} times"
    reasons["spacing_mm"] = f"coarser than nnU-Net's {_mm(start)} ({why}), {wanted}"
    return rounded, False


def _patch(
    scans: _Scans, given: Choices, spacing: _Triple, budgets: tuple[float, float], reasons: dict[str, str]
) -> tuple[Voxels3, StageStrides]:
    """Return the patch and its strides: of the larger budget only as much as it takes to see enough."""
    if given.patch_size is not None:
        reasons["patch_size"] = "given"
        return given.patch_size, planned_strides(spacing, given.patch_size)
    need = scans.need_mm(spacing)
    need_vox, image_vox = ([mm / s for mm, s in zip(sizes, spacing, strict=True)] for sizes in (need, scans.image_mm))
    for budget in np.linspace(*budgets, 5):
        patch, strides = planned_patch(spacing, need_vox, image_vox, most_voxels=float(budget))
        seen = math.prod(min(1.0, p / n) for p, n in zip(patch, need_vox, strict=True))
        if seen >= _ENOUGH_SEEN:
            break
    what = "the labels with a margin" if scans.field_mm is not None else "the scans, as long as there are no labels"
    reasons["patch_size"] = f"{math.prod(patch):,} voxels, which see {100 * seen:.0f} % of {what} ({_mm(need)})"
    return patch, strides


def _why_strides(strides: StageStrides) -> str:
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
