"""From a scan on disk to network input and back to its grid: one definition for training, inference and the app."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from monai.data import MetaTensor
from monai.transforms import (
    ClipIntensityPercentilesd,
    MapTransform,
    NormalizeIntensityd,
    Orientationd,
    ScaleIntensityRanged,
    Spacingd,
    Transform,
)
from monai.utils import SpaceKeys
from nibabel.affines import voxel_sizes
from nibabel.orientations import io_orientation

from deformux.data.grid import ScanGrid
from deformux.data.header import max_voxels, shown_shape
from deformux.data.volume_reader import InvalidVolume, Volume, open_volume

__all__ = [
    "MODALITIES",
    "UNLABELLED",
    "InvalidVolume",
    "LoadLabeld",
    "LoadVolumed",
    "Preprocessing",
    "RestoreGridd",
    "apply",
    "check_label_values",
    "filled_voxels",
    "geometry_difference",
    "inference_transforms",
    "label_grid_transforms",
    "labelled_transforms",
    "restore_transforms",
]

MODALITIES = ("ct", "mr")
# The value of voxels that nobody has labelled: neither background nor any structure.
UNLABELLED = 255
# Positions that differ by less than this are the same position.
GEOMETRY_TOLERANCE_MM = 1e-3
# Values of a label above this are not shown: they can be anything.
_LARGEST_SHOWN = 65_535


@dataclass(frozen=True)
class Preprocessing:
    """Everything that turns a scan into network input; stored in the model's card.

    Args:
        modality: ``ct`` clips to ``window_hu`` and scales to 0..1; ``mr`` clips to ``percentiles`` of the volume and
            standardises, since MR intensities have no unit.
        spacing_mm: voxel size along the axes right, anterior, superior; None keeps the scan's own.
        patch_size: voxels of a training patch and of an inference window along the same axes.
        window_hu: Hounsfield units.
        percentiles: percent.

    Raises:
        ValueError: a value is out of range; the message lists the valid ones.
    """

    modality: str = "ct"
    spacing_mm: tuple[float, float, float] | None = None
    patch_size: tuple[int, int, int] = (96, 96, 96)
    window_hu: tuple[float, float] = (-175.0, 250.0)
    percentiles: tuple[float, float] = (0.5, 99.5)

    def __post_init__(self) -> None:
        if self.modality not in MODALITIES:
            raise ValueError(f"modality must be one of {', '.join(MODALITIES)}; got {self.modality!r}")
        spacing = self.spacing_mm
        if spacing is not None and (len(spacing) != 3 or not all(0.05 <= s <= 50 for s in spacing)):
            raise ValueError(f"spacing must be 'native' or three sizes between 0.05 and 50 mm; got {spacing}")
        if len(self.patch_size) != 3 or not all(isinstance(p, int) and 16 <= p <= 512 for p in self.patch_size):
            raise ValueError(f"patch size must be three whole numbers between 16 and 512 voxels; got {self.patch_size}")
        if not self.window_hu[0] < self.window_hu[1]:
            raise ValueError(f"HU window must be (low, high) with low < high; got {self.window_hu}")
        if not 0 <= self.percentiles[0] < self.percentiles[1] <= 100:
            raise ValueError(f"percentiles must be (low, high) with 0 <= low < high <= 100; got {self.percentiles}")

    @classmethod
    def from_options(cls, modality: str, spacing: str, patch_size: str) -> Preprocessing:
        """From what a user types: ``ct``, ``1.5,1.5,2`` (or ``native``), ``96,96,96``; raises ValueError on others."""
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
        return cls.from_json({"modality": modality, "spacing_mm": spacing_mm, "patch_size": patch})

    def to_json(self) -> dict[str, Any]:
        """Plain values for the card."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Preprocessing:
        """The inverse of ``to_json``; raises ValueError on a bad value."""
        tuples: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**tuples)


class LoadVolumed(MapTransform):
    """Read a single-channel volume as float32 ``(1, X, Y, Z)``; a 2D image is a volume of one slice.

    Voxels that are NaN or infinite, such as those outside a scanner's field of view, get the lowest finite intensity;
    ``meta["non_finite"]`` counts them.

    Raises:
        InvalidVolume: unreadable, not one scalar volume, or without any contrast.
    """

    def __init__(self, keys: str | tuple[str, ...] = "image") -> None:
        super().__init__(keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            path = Path(d[key])
            with open_volume(path) as opened:
                if opened.header.layers > 1:
                    raise InvalidVolume(f"{path.name} is a segmentation of several layers; expected a scan")
                opened.refuse_constant()
                volume = opened.read()
            non_finite = _fill_non_finite(volume, path.name)
            if volume.values.min() == volume.values.max():
                raise InvalidVolume(f"{path.name} has the same intensity everywhere; expected a scan")
            d[key] = _tensor(volume, path, non_finite=non_finite)
        return d


class LoadLabeld(MapTransform):
    """Read a label volume ``(1, X, Y, Z)`` that must lie on the image's grid and hold whole numbers 0..n_labels.

    With ``unlabelled`` a label may also hold 255, for voxels that nobody has labelled.

    Raises:
        InvalidVolume: another grid, other values, or unreadable.
    """

    def __init__(
        self,
        keys: str | tuple[str, ...] = "label",
        *,
        n_labels: int,
        image_key: str = "image",
        unlabelled: bool = False,
    ) -> None:
        super().__init__(keys)
        self.n_labels = n_labels
        self.unlabelled = unlabelled
        self.image_key = image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        image = d[self.image_key]
        for key in self.key_iterator(d):
            path = Path(d[key])
            with open_volume(path) as opened:
                header = opened.header
                difference = geometry_difference(image.shape[1:], image.affine, header.shape, header.affine)
                # Before anything is decompressed.
                if difference:
                    raise InvalidVolume(f"label {path.name} is not on its image's grid: {difference}")
                if header.layers > 1:
                    raise InvalidVolume(f"label {path.name} has several layers of segments; expected one volume")
                volume = opened.read()
            check_label_values(path.name, volume.values, self.n_labels, unlabelled=self.unlabelled)
            label = _tensor(volume, path)
            # The same file geometry, up to rounding in the header, so that both are resampled alike.
            label.affine = image.affine
            d[key] = label
        return d


def filled_voxels(image: MetaTensor, of: str = "") -> str | None:
    """How many voxels of a scan ``LoadVolumed`` gave an intensity, as a sentence without a full stop; None for none.

    Args:
        image: the scan, or what ``RestoreGridd`` made of it.
        of: words that name the scan, such as ``of this scan``.
    """
    n = int(image.meta.get("non_finite", 0))
    if not n:
        return None
    voxels = " ".join(filter(None, ("1 voxel" if n == 1 else f"{n} voxels", of)))
    return f"{voxels} {'is' if n == 1 else 'are'} NaN or infinite and taken for its lowest intensity"


def check_label_values(name: str, values: npt.NDArray, n_labels: int, *, unlabelled: bool) -> None:
    """Refuse a label with other values than 0..n_labels, and 255 where ``unlabelled`` says so.

    Raises:
        InvalidVolume: it has others, or nothing but 255.
    """
    found = _distinct(values)
    if unlabelled:
        found = found[found != UNLABELLED]
    if len(found) == 0:
        raise InvalidVolume(f"label {name} has no labelled voxel; expected at least one that is not 255")
    # Not a number is not a whole one either.
    if not (found == np.round(found)).all() or found.min() < 0 or found.max() > n_labels:
        raise InvalidVolume(f"label {name} holds {_shown_values(found)}; expected whole numbers from 0 to {n_labels}")


def geometry_difference(
    image_shape: Any,
    image_affine: Any,
    label_shape: Any,
    label_affine: Any,
    tolerance_mm: float = GEOMETRY_TOLERANCE_MM,
) -> str | None:
    """What sets two grids apart, in words, or None: shapes in voxels, else the largest corner distance in mm."""
    if tuple(image_shape) != tuple(label_shape):
        return f"the image has {tuple(image_shape)} voxels, the label {tuple(label_shape)}"
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in image_shape], indexing="ij")).reshape(3, -1)
    homogeneous = np.vstack([corners, np.ones(8)])
    offset = (np.asarray(image_affine, dtype=float) - np.asarray(label_affine, dtype=float)) @ homogeneous
    distance = float(np.linalg.norm(offset[:3], axis=0).max())
    if distance > tolerance_mm:
        return f"their corners lie up to {distance:.3g} mm apart"
    return None


class RestoreGridd(MapTransform):
    """Logits ``(C, x, y, z)`` of the preprocessed image to labels ``(1, X, Y, Z)``, uint8, on the scan's own grid."""

    def __init__(self, keys: str | tuple[str, ...] = "pred", *, image_key: str = "image") -> None:
        super().__init__(keys)
        self.image_key = image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        image = d[self.image_key]
        grid = ScanGrid.of(image)
        for key in self.key_iterator(d):
            labels = grid.labels(torch.as_tensor(d[key]).float())
            meta = {name: value for name, value in image.meta.items() if name != "affine"}
            d[key] = MetaTensor(labels[None], affine=torch.as_tensor(grid.affine), meta=meta)
        return d


def inference_transforms(prep: Preprocessing, *, device: str | torch.device = "cpu") -> list[Transform]:
    """Dictionary transforms that turn the path under ``image`` into network input ``(1, x, y, z)``, float32.

    On a GPU all but the reading is computed there and the result stays there, if there is enough memory.
    """
    steps = [*_to_network_grid(prep, ("image",)), *_intensity(prep)]
    if torch.device(device).type == "cuda":
        steps = [_OnDevice(steps, device)]
    return [LoadVolumed("image"), _BoundedGrid(prep), *steps]


def labelled_transforms(prep: Preprocessing, *, n_labels: int) -> list[Transform]:
    """As ``inference_transforms``, with the path under ``label`` on the same grid: the fixed part of training."""
    return [
        LoadVolumed("image"),
        _BoundedGrid(prep),
        LoadLabeld("label", n_labels=n_labels, unlabelled=True),
        *_to_network_grid(prep, ("image", "label")),
        *_intensity(prep),
    ]


def label_grid_transforms(prep: Preprocessing, key: str = "label") -> list[Transform]:
    """Dictionary transforms that bring label values ``(1, X, Y, Z)`` on a scan's grid to the network's."""
    return _to_network_grid(prep, (key,))


def apply(transforms: Sequence[Transform], data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
    """Run transforms one after another; what they raise stays what it is, unlike under MONAI's Compose."""
    d = dict(data)
    for transform in transforms:
        d = transform(d)
    return d


def restore_transforms() -> list[Transform]:
    """Dictionary transforms that turn the logits under ``pred`` into labels on the original grid of ``image``."""
    return [RestoreGridd("pred")]


class _OnDevice(Transform):
    """Runs other transforms of an image on a GPU, or where it is if the GPU has too little memory."""

    def __init__(self, steps: Sequence[Transform], device: str | torch.device) -> None:
        self.steps, self.device = steps, device

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        try:
            return apply(self.steps, {**data, "image": data["image"].to(self.device)})
        except torch.OutOfMemoryError:
            return apply(self.steps, data)


class _BoundedGrid(Transform):
    """Refuses a scan that would be too large once it is resampled, such as one whose voxels are metres wide."""

    def __init__(self, prep: Preprocessing) -> None:
        self.prep = prep

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        image = data["image"]
        if self.prep.spacing_mm is not None:
            ras = io_orientation(np.asarray(image.affine))[:, 0].astype(int)
            extent = np.array(image.shape[1:]) * voxel_sizes(np.asarray(image.affine))
            size = np.ceil(extent / np.array(self.prep.spacing_mm)[ras])
            if size.prod() > max_voxels():
                name, mm = Path(image.meta["filename_or_obj"]).name, shown_shape([f"{length:.4g}" for length in extent])
                raise InvalidVolume(
                    f"{name} measures {mm} mm, too large for the spacing of {shown_shape(self.prep.spacing_mm)} mm: "
                    f"these are {size.prod():.2g} voxels, at most {max_voxels():,} are read (option max-voxels)"
                )
        return dict(data)


def _to_network_grid(prep: Preprocessing, keys: tuple[str, ...]) -> list[Transform]:
    axes = (("L", "R"), ("P", "A"), ("I", "S"))
    transforms: list[Transform] = [Orientationd(keys, axcodes="RAS", labels=axes)]
    if prep.spacing_mm is not None:
        mode = tuple("bilinear" if key == "image" else "nearest" for key in keys)
        transforms.append(Spacingd(keys, pixdim=prep.spacing_mm, mode=mode, padding_mode="border", dtype=np.float32))
    return transforms


def _intensity(prep: Preprocessing) -> list[Transform]:
    if prep.modality == "ct":
        low, high = prep.window_hu
        return [ScaleIntensityRanged("image", a_min=low, a_max=high, b_min=0.0, b_max=1.0, clip=True)]
    lower, upper = prep.percentiles
    return [ClipIntensityPercentilesd("image", lower=lower, upper=upper), NormalizeIntensityd("image")]


def _tensor(volume: Volume, path: Path, **meta: Any) -> MetaTensor:
    """A volume ``(1, X, Y, Z)`` with its affine in RAS millimetres."""
    meta |= {
        "filename_or_obj": str(path),
        "original_affine": volume.affine,
        "spatial_shape": np.array(volume.values.shape),
        "space": SpaceKeys.RAS,
    }
    return MetaTensor(torch.from_numpy(volume.values)[None], affine=torch.as_tensor(volume.affine), meta=meta)


def _fill_non_finite(volume: Volume, name: str) -> int:
    """Give voxels that are not finite the lowest intensity of the others, and return their number."""
    if volume.header.is_whole:
        return 0
    values = volume.values
    finite = np.isfinite(values)
    n = values.size - int(finite.sum())
    if n == values.size:
        raise InvalidVolume(f"{name} has no voxel with a finite intensity, all are NaN or infinite; expected a scan")
    if n:
        values[~finite] = values.min(where=finite, initial=np.inf)
    return n


def _distinct(values: npt.NDArray) -> npt.NDArray:
    """The different values, without sorting where they are what labels have."""
    with np.errstate(invalid="ignore"):
        whole = values.astype(np.uint16)
    if (whole == values).all():
        return np.flatnonzero(np.bincount(whole.ravel())).astype(float)
    return np.unique(values)


def _shown_values(values: npt.NDArray, most: int = 6) -> str:
    """The first values, where they can be those of a label."""
    if not (values == np.round(values)).all() or np.abs(values).max() > _LARGEST_SHOWN:
        return "values that no label has"
    text = ", ".join(f"{value:g}" for value in values[:most])
    return f"the values {text}" + (", …" if len(values) > most else "")
