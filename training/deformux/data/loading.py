"""Dictionary transforms that read scans and labels into MONAI's tensors."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.utils import SpaceKeys

from deformux.data.header import InvalidVolume, geometry_difference
from deformux.data.label_values import check_label_values
from deformux.data.volume_reader import Volume, open_volume

__all__ = ["LoadLabeld", "LoadVolumed", "filled_voxels"]


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

    With ``unlabelled`` a label may also hold 255, for unlabelled voxels.

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
                # Check before decompressing anything.
                if difference:
                    raise InvalidVolume(f"label {path.name} is not on its image's grid: {difference}")
                if header.layers > 1:
                    raise InvalidVolume(f"label {path.name} has several layers of segments; expected one volume")
                volume = opened.read()
            check_label_values(path.name, volume.values, self.n_labels, unlabelled=self.unlabelled)
            label = _tensor(volume, path)
            # They agree up to rounding in the header; take one affine, so that both are resampled alike.
            label.affine = image.affine
            d[key] = label
        return d


def filled_voxels(image: MetaTensor, of: str = "") -> str | None:
    """Describe how many voxels of a scan ``LoadVolumed`` filled, as a sentence without a full stop; None if none.

    Args:
        image: the scan, or the result of ``RestoreGridd``.
        of: words that name the scan, such as ``of this scan``.
    """
    n = int(image.meta.get("non_finite", 0))
    if not n:
        return None
    voxels = " ".join(filter(None, ("1 voxel" if n == 1 else f"{n} voxels", of)))
    return f"{voxels} {'is' if n == 1 else 'are'} NaN or infinite and treated as its lowest intensity"


def _tensor(volume: Volume, path: Path, **meta: Any) -> MetaTensor:
    """Return a volume ``(1, X, Y, Z)`` with its affine in RAS millimetres."""
    meta |= {
        "filename_or_obj": str(path),
        "original_affine": volume.affine,
        "spatial_shape": np.array(volume.values.shape),
        "space": SpaceKeys.RAS,
    }
    return MetaTensor(torch.from_numpy(volume.values)[None], affine=torch.as_tensor(volume.affine), meta=meta)


def _fill_non_finite(volume: Volume, name: str) -> int:
    """Give non-finite voxels the lowest intensity of the others; return how many there are."""
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
