"""Training recipes: every number of a training in one frozen object."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

__all__ = ["RECIPES", "Recipe"]

_DISK_GB = 100.0
_OF_UNLABELLED = ("unlabelled_scans", "unlabelled_start", "unlabelled_confidence")
# Time that unlabelled patches add to a step, in ordinary steps: they are drawn, and pass the network forward.
_EFFORT_OF_UNLABELLED = 0.45
SCHEDULES = ("plateau", "one_cycle", "cosine", "constant")


@dataclass(frozen=True)
class Recipe:
    """A training recipe; the defaults are the paper's (arXiv 2310.00199, appendix A.1, table 4).

    Args:
        steps: number of optimizer steps.
        batch_size: patches per step.
        patches_per_volume: patches cut from a volume each time it is drawn.
        epochs: number of parts into which the steps are divided for validation, schedule and progress.
        learning_rate: of AdamW; the peak with ``one_cycle`` and ``cosine``.
        weight_decay, betas, eps: of AdamW.
        schedule: ``plateau`` (factor 0.9, patience 10 epochs), ``one_cycle``, ``cosine`` (a twentieth of the steps to
            warm up, then down to 0) or ``constant``.
        gradient_clip: largest norm of the gradient; None for no limit.
        ema_decay: decay per step of the moving average of the weights that is kept as the result; None keeps the last.
        patience: epochs without a better validation Dice after which a run ends early; None for never.
        oversampling: draws of a new case for each draw of an old one.
        foreground_ratio: share of the patches that are centred on a labelled voxel.
        rotation_degrees, scaling: largest rotation, one for every axis or three about axes 0, 1 and 2 of the frame,
            and relative change of size.
        affine_probability: of rotating and scaling a patch.
        elastic_probability: of deforming a patch.
        elastic_sigma, elastic_magnitude: smoothness in voxels, and size, of the random displacements (MONAI's
            ``Rand3DElastic``), each drawn from its range.
        voxel_aspect: spacing along each axis, relative to the smallest: displacements are divided by it, and axes
            more than twice as coarse keep their resolution in simulated coarse scans.
        unlabelled_border: voxels that a rotation or deformation brings in from outside a patch are unlabelled, not
            background.
        flip_axes: axes of the frame (in ``ras``: 0 right, 1 anterior, 2 superior) that are mirrored half of the time;
            anatomy forbids most.
        intensity_shift, intensity_scale: largest offset and relative factor, in units of the preprocessed image.
        noise_std: largest standard deviation of Gaussian noise.
        gamma: contrast exponents drawn from this range.
        low_resolution: smallest zoom of a simulated coarse scan; 1 for none.
        intensity_probability: of each of the intensity changes.
        sequence_dropout: probability that each sequence of a case of several is taken from a patch; at least one stays.
            Above 0, the model also segments scans that lack sequences.
        clicks: largest number of clicks of a simulated annotator in a patch, for a network that takes guidance; 0 for
            a training without clicks.
        click_probability: share of the steps with clicks, once there are any. Such a step takes about twice as long.
        click_start: share of the training before the first clicks, since a network must find something before it can
            err.
        unlabelled_scans: largest number of scans without a label to learn from, where there are any; 0 for none.
        unlabelled_start: share of the training before unlabelled scans take part: what labels them must have learnt
            something.
        unlabelled_confidence: probability from which on a voxel's own answer counts as its label.
        mixed_precision: bfloat16 if the device has it.
        cache_gb: memory for preprocessed volumes.
        disk_gb: files for those that do not fit into memory; the rest is read again each time.

    Raises:
        ValueError: a value is out of range.
    """

    steps: int = 40_000
    batch_size: int = 2
    patches_per_volume: int = 2
    epochs: int = 100
    learning_rate: float = 1e-4
    weight_decay: float = 0.08
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    schedule: str = "plateau"
    gradient_clip: float | None = None
    ema_decay: float | None = None
    patience: int | None = None
    oversampling: int = 1
    foreground_ratio: float = 0.5
    rotation_degrees: float | tuple[float, float, float] = 30.0
    scaling: float = 0.1
    affine_probability: float = 0.5
    elastic_probability: float = 0.0
    elastic_sigma: tuple[float, float] = (5.0, 7.0)
    elastic_magnitude: tuple[float, float] = (50.0, 150.0)
    voxel_aspect: tuple[float, float, float] = (1.0, 1.0, 1.0)
    unlabelled_border: bool = False
    flip_axes: tuple[int, ...] = ()
    intensity_shift: float = 0.1
    intensity_scale: float = 0.0
    noise_std: float = 0.0
    gamma: tuple[float, float] = (1.0, 1.0)
    low_resolution: float = 1.0
    intensity_probability: float = 0.5
    sequence_dropout: float = 0.0
    clicks: int = 0
    # Clicks take time, a sixth more from scratch and a third from a version. When they began after a quarter of the
    # training instead of half, the demo's first round of 120 steps gave Dice 0.847 without clicks instead of 0.855.
    click_probability: float = 0.3
    click_start: float = 0.5
    unlabelled_scans: int = 0
    unlabelled_start: float = 0.4
    unlabelled_confidence: float = 0.8
    mixed_precision: bool = True
    cache_gb: float = 4.0
    disk_gb: float = _DISK_GB

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}; got {self.schedule!r}")
        for name in ("steps", "batch_size", "patches_per_volume", "epochs", "learning_rate", "oversampling"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not value > 0:
                raise ValueError(f"{name} must be a positive number; got {value!r}")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience must be at least 1 epoch, or none; got {self.patience!r}")
        for name in ("steps", "batch_size", "patches_per_volume", "epochs", "oversampling"):
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"{name} must be a whole number; got {getattr(self, name)!r}")
        if self.batch_size % self.patches_per_volume:
            raise ValueError(
                "batch_size must be a multiple of patches_per_volume; "
                f"got {self.batch_size} and {self.patches_per_volume}"
            )
        if not 0 <= self.foreground_ratio <= 1:
            raise ValueError(f"foreground_ratio must be between 0 and 1; got {self.foreground_ratio}")
        if not isinstance(self.clicks, int) or not 0 <= self.clicks <= 100:
            raise ValueError(f"clicks must be a whole number from 0 to 100; got {self.clicks!r}")
        if not isinstance(self.unlabelled_scans, int) or self.unlabelled_scans < 0:
            raise ValueError(f"unlabelled_scans must be a whole number of at least 0; got {self.unlabelled_scans!r}")
        if self.unlabelled_scans and self.ema_decay is None:
            raise ValueError("unlabelled_scans needs ema_decay: the moving average labels them")
        for name in ("sequence_dropout", "click_probability", "click_start", *_OF_UNLABELLED[1:]):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1; got {getattr(self, name)}")
        if not isinstance(self.flip_axes, tuple) or not set(self.flip_axes) <= {0, 1, 2}:
            raise ValueError(
                f"flip_axes must be some of 0, 1, 2, such as '0,' (and ',' for none); got {self.flip_axes!r}"
            )
        if not _is_triple(self.rotations, 0, 180):
            raise ValueError(
                f"rotation_degrees must be one number or three, between 0 and 180; got {self.rotation_degrees!r}"
            )
        if not _is_triple(self.voxel_aspect, 1, float("inf")):
            raise ValueError(f"voxel_aspect must be three numbers of at least 1; got {self.voxel_aspect!r}")

    @property
    def rotations(self) -> tuple[float, ...]:
        """Return the largest rotation about each axis, in degrees."""
        degrees = self.rotation_degrees
        return degrees if isinstance(degrees, tuple) else (degrees,) * 3

    def replace(self, **changes: Any) -> Recipe:
        """Return the recipe with some values changed; raise ValueError with the valid names if one is unknown."""
        names = [field.name for field in dataclasses.fields(self)]
        unknown = sorted(set(changes) - set(names))
        if unknown:
            raise ValueError(f"a recipe has no {', '.join(unknown)}; it has {', '.join(names)}")
        return dataclasses.replace(self, **changes)

    def effort(self, step: int) -> float:
        """Return the time of a training with guidance up to a step, in ordinary steps."""
        with_clicks = max(0.0, step - self.click_start * self.steps) if self.clicks else 0.0
        with_scans = max(0.0, step - self.unlabelled_start * self.steps) if self.unlabelled_scans else 0.0
        return step + self.click_probability * with_clicks + _EFFORT_OF_UNLABELLED * with_scans

    def in_steps(self, steps: int, *, epochs: int) -> Recipe:
        """Return this recipe with other steps and epochs (at least one), averaging over a tenth of the steps."""
        # An average over more than a tenth of the steps lags behind in a short training.
        return self.replace(steps=steps, epochs=max(1, epochs), ema_decay=1 - 1 / max(2.0, 0.1 * steps))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for the card, without later ones that change nothing."""
        values = dataclasses.asdict(self)
        # Unchanged since before there were clicks, frames and sequences: this identifies checkpoints and simulations.
        unused = [] if self.clicks else ["clicks", "click_probability", "click_start"]
        unused += [] if self.unlabelled_scans else _OF_UNLABELLED
        unused += [
            name
            for name in ("voxel_aspect", "unlabelled_border", "sequence_dropout", "disk_gb")
            if values[name] == _DEFAULTS[name]
        ]
        for name in unused:
            del values[name]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Invert ``to_dict``, also after JSON; raise ValueError on a bad value."""
        tuples: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in values.items()}
        return cls(**tuples)


def _is_triple(values: object, low: float, high: float) -> bool:
    """Return whether these are three numbers in a range."""
    if not isinstance(values, tuple) or len(values) != 3:
        return False
    return all(isinstance(value, (int, float)) and low <= value <= high for value in values)


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Recipe)}

_FEW = Recipe(
    steps=400,
    patches_per_volume=1,
    epochs=20,
    # Half of it gave 0.008 Dice less with one labelled hippocampus volume, 0.007 with ten, and 0.014 with 120; in
    # batches of one patch it was as good (quality_few_labels_at_0.002.md, quality_best_tiny_cpu.md and
    # learning_target_at_0.001.md in benchmarks/results).
    learning_rate=2e-3,
    weight_decay=0.01,
    schedule="one_cycle",
    gradient_clip=1.0,
    ema_decay=0.98,
    patience=8,
    oversampling=2,
    foreground_ratio=0.75,
    rotation_degrees=15.0,
    scaling=0.15,
    elastic_probability=0.2,
    intensity_scale=0.1,
    noise_std=0.1,
    gamma=(0.7, 1.5),
    low_resolution=0.5,
    intensity_probability=0.3,
    clicks=10,
)

RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "paper": Recipe(),
        # From scratch on few volumes, in minutes instead of days: a high, short cycle and stronger augmentation.
        "finetune": _FEW,
        # From a model that already works: a gentler, shorter cosine.
        "continue": _FEW.replace(steps=200, epochs=10, learning_rate=5e-4, schedule="cosine", click_start=0.0),
    }
)
