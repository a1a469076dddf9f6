"""Settings of what a scan goes through besides the network: one definition for training, inference and the app."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

__all__ = ["FRAMES", "MODALITIES", "Preprocessing"]

MODALITIES = ("ct", "mr")
FRAMES = ("ras", "acquisition")


@dataclass(frozen=True)
class Preprocessing:
    """All that a scan goes through besides the network, before it and after. Stored in the model's card.

    Args:
        modality: ``ct`` clips to ``window_hu`` and scales to 0..1; ``mr`` clips to ``percentiles`` of the volume and
            standardises, since MR intensities have no unit.
        spacing_mm: voxel size along the frame's axes; None keeps the scan's own.
        patch_size: voxels of a training patch and of an inference window along the same axes.
        window_hu: Hounsfield units.
        percentiles: percent.
        frame: ``ras`` turns a scan to the nearest of right, anterior, superior; ``acquisition`` keeps the axes of the
            file, with the through-plane axis last (``deformux.data.frame``).
        sequences: names of several sequences, the network's channels; none for one. ``ct`` and ``mr``, or names such as
            ``ct:arterial`` and ``mr:flair``, give the modality of a sequence; others have ``modality``.
        missing_sequences: whether a scan may lack some sequences, since the network was trained with dropout of them.
        keep_largest: whether only the largest connected component of all labels together is kept of a segmentation.
        labels_center: where the centre of all labels usually lies, as shares (0..1) of the scan's sides along the
            frame's axes: components far from there count as smaller. None weighs none.

    Raises:
        ValueError: a value is out of range; the message lists the valid ones.
    """

    modality: str = "ct"
    spacing_mm: tuple[float, float, float] | None = None
    patch_size: tuple[int, int, int] = (96, 96, 96)
    window_hu: tuple[float, float] = (-175.0, 250.0)
    percentiles: tuple[float, float] = (0.5, 99.5)
    frame: str = "ras"
    sequences: tuple[str, ...] = ()
    missing_sequences: bool = False
    keep_largest: bool = False
    labels_center: tuple[float, float, float] | None = None

    def __post_init__(self) -> None:
        if self.modality not in MODALITIES:
            raise ValueError(f"modality must be one of {', '.join(MODALITIES)}; got {self.modality!r}")
        spacing = self.spacing_mm
        if spacing is not None and (len(spacing) != 3 or not all(0.05 <= s <= 50 for s in spacing)):
            raise ValueError(f"spacing must be 'native' or three sizes between 0.05 and 50 mm; got {spacing}")
        if len(self.patch_size) != 3 or not all(isinstance(p, int) and 1 <= p <= 512 for p in self.patch_size):
            raise ValueError(f"patch size must be three whole numbers between 1 and 512 voxels; got {self.patch_size}")
        if not self.window_hu[0] < self.window_hu[1]:
            raise ValueError(f"HU window must be (low, high) with low < high; got {self.window_hu}")
        if not 0 <= self.percentiles[0] < self.percentiles[1] <= 100:
            raise ValueError(f"percentiles must be (low, high) with 0 <= low < high <= 100; got {self.percentiles}")
        if len(self.sequences) == 1 or not all(isinstance(name, str) and name for name in self.sequences):
            raise ValueError(f"sequences must be the names of at least two, or none; got {self.sequences!r}")
        center = self.labels_center
        if center is not None and (len(center) != 3 or not all(0 <= share <= 1 for share in center)):
            raise ValueError(f"labels_center must be three shares from 0 to 1; got {center}")
        if self.frame not in FRAMES:
            raise ValueError(f"frame must be one of {', '.join(FRAMES)}; got {self.frame!r}")

    @property
    def channels(self) -> int:
        """Return the number of the network's input channels."""
        return max(1, len(self.sequences))

    @property
    def modalities(self) -> tuple[str, ...]:
        """Return the modality of each channel."""
        stated = [name.lower().partition(":")[0] for name in self.sequences]
        return tuple(word if word in MODALITIES else self.modality for word in stated) or (self.modality,)

    def with_dropout(self, probability: float) -> Preprocessing:
        """Return these settings after a training that drops sequences with a probability; scans may then lack some."""
        return replace(self, missing_sequences=probability > 0 and self.channels > 1)

    def without_output(self) -> Preprocessing:
        """Return these settings without what is kept of a result, which the network's input does not depend on."""
        return replace(self, keep_largest=False, labels_center=None)

    @classmethod
    def from_options(
        cls,
        modality: str,
        spacing: str,
        patch_size: str,
        *,
        window: str = "",
        percentiles: str = "",
        frame: str = "ras",
        keep_largest: str = "no",
    ) -> Preprocessing:
        """Parse what a user types: ``ct``, ``1.5,1.5,2`` (or ``native``), ``96,96,96``; raise ValueError on others.

        ``window`` and ``percentiles`` are pairs such as ``-175,250``; nothing keeps the defaults. ``keep_largest`` is
        ``yes`` or ``no``.
        """
        try:
            spacing_mm = None if spacing == "native" else tuple(float(part) for part in spacing.split(","))
        except ValueError as error:
            raise ValueError(
                f"spacing must be 'native' or three sizes in mm such as 1.5,1.5,2; got {spacing!r}"
            ) from error
        try:
            patch = tuple(int(part) for part in patch_size.split(","))
        except ValueError as error:
            raise ValueError(f"patch size must be three whole numbers such as 96,96,96; got {patch_size!r}") from error
        if keep_largest not in ("yes", "no"):
            raise ValueError(f"keep_largest must be yes or no; got {keep_largest!r}")
        values: dict[str, Any] = {"modality": modality, "spacing_mm": spacing_mm, "patch_size": patch, "frame": frame}
        values["keep_largest"] = keep_largest == "yes"
        if window.strip():
            values["window_hu"] = _pair("HU window", "-175,250", window)
        if percentiles.strip():
            values["percentiles"] = _pair("percentiles", "0.5,99.5", percentiles)
        return cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for the card, without defaults that older cards lack."""
        values = asdict(self)
        # Unchanged: this identifies checkpoints and simulations.
        if self.frame == "ras":
            del values["frame"]
        if not self.sequences:
            for name in ("sequences", "missing_sequences"):
                del values[name]
        if not self.keep_largest:
            del values["keep_largest"]
        if self.labels_center is None:
            del values["labels_center"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """Invert ``to_dict``; raise ValueError on a bad value."""
        tuples: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**tuples)


def _pair(what: str, example: str, text: str) -> tuple[float, float]:
    """Parse two numbers."""
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"{what} must be two numbers such as {example}; got {text!r}") from error
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{what} must be two numbers such as {example}; got {text!r}")
    return low, high
