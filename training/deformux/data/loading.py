"""Dictionary transforms that read scans and labels into MONAI's tensors."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.utils import SpaceKeys

from deformux.data.header import InvalidVolume, geometry_difference
from deformux.data.label_values import check_label_values
from deformux.data.registration import on_grid
from deformux.data.volume_reader import Volume, open_volume

__all__ = ["LoadLabeld", "LoadVolumed", "MissingSequence", "filled_voxels", "missing_sequences"]


class MissingSequence(InvalidVolume):
    """A case lacks a sequence that the network needs."""


class LoadVolumed(MapTransform):
    """Read a scan as float32 ``(C, X, Y, Z)``, one channel for each sequence; a 2D image is a volume of one slice.

    The value is a path, or one for each sequence (``ScanFiles``). Sequences are resampled linearly to the grid of the
    first that exists. Voxels that are NaN or infinite, such as those outside a scanner's field of view, get the lowest
    finite intensity; ``meta["non_finite"]`` counts them. ``meta["missing"]`` holds number and name of missing
    sequences, whose channels are 0.

    Args:
        keys: keys of the scans.
        sequences: names of the sequences, for several; further files are not read.
        may_miss: whether sequences may be missing.

    Raises:
        InvalidVolume: unreadable, not one scalar volume, or without any contrast.
        MissingSequence: a sequence is missing, and may not be.
    """

    def __init__(
        self, keys: str | tuple[str, ...] = "image", *, sequences: Sequence[str] = (), may_miss: bool = False
    ) -> None:
        super().__init__(keys)
        self.sequences, self.may_miss = tuple(sequences), may_miss

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            given = d[key]
            files = [Path(given)] if isinstance(given, str | Path) else [Path(path) for path in given]
            d[key] = self._several(files) if self.sequences else _scan(files[0])
        return d

    def _several(self, files: Sequence[Path]) -> MetaTensor:
        present = {number: path for number, path in enumerate(files[: len(self.sequences)]) if path.is_file()}
        missing = {number: name for number, name in enumerate(self.sequences) if number not in present}
        if missing and (not present or not self.may_miss):
            number, name = next(iter(missing.items()))
            absent = f" ({files[number].name})" if number < len(files) else ""
            raise MissingSequence(
                f"{next(iter(present.values()), files[0]).name} comes without its sequence {name}{absent}; the model "
                f"needs all of {', '.join(self.sequences)}, unless it is trained with sequence_dropout"
            )
        scan: MetaTensor | None = None
        channels: list[torch.Tensor | None] = [None] * len(self.sequences)
        for number, path in present.items():
            read = _scan(path)
            scan = read if scan is None else scan
            values = on_grid(read[0].numpy(), read.affine.numpy(), tuple(scan.shape[1:]), scan.affine.numpy())
            channels[number] = torch.from_numpy(values)
            scan.meta["non_finite"] += read.meta["non_finite"] if read is not scan else 0
        assert scan is not None
        empty = torch.zeros(scan.shape[1:])
        stacked = torch.stack([empty if channel is None else channel for channel in channels])
        meta = {name: value for name, value in scan.meta.items() if name != "affine"}
        return MetaTensor(stacked, affine=scan.affine, meta={**meta, "missing": missing})


def missing_sequences(image: MetaTensor) -> str | None:
    """Describe which sequences a scan lacks, as a sentence without a full stop; None if none."""
    names = list(image.meta.get("missing", {}).values())
    if not names:
        return None
    return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} missing among the sequences of this scan"


def _scan(path: Path) -> MetaTensor:
    with open_volume(path) as opened:
        if opened.header.layers > 1:
            raise InvalidVolume(f"{path.name} is a segmentation of several layers; expected a scan")
        opened.refuse_constant()
        volume = opened.read()
    non_finite = _fill_non_finite(volume, path.name)
    if volume.values.min() == volume.values.max():
        raise InvalidVolume(f"{path.name} has the same intensity everywhere; expected a scan")
    return _tensor(volume, path, non_finite=non_finite)


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
