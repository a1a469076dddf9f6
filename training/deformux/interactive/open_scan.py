"""A scan that is opened for edits: its image and its automatic segmentation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from monai.data import MetaTensor
from torch import Tensor, nn

from deformux.data.grid import ScanGrid
from deformux.data.preprocessing import Preprocessing
from deformux.data.sequences import ScanFiles
from deformux.inference.largest_component import classes_of_largest, keep_as_planned
from deformux.inference.slab_labels import SlabLabels
from deformux.inference.slabs import LogitSlab, SlabTaker, hand_on
from deformux.inference.sliding_window import load_scan, scan_slabs
from deformux.interactive.kept_logits import KeptLogits, LogitKeeper

__all__ = ["OpenScan", "open_scan", "scan_from_logits", "scan_from_slabs"]

# An axis is thick if its voxels are more than this many times as long as those of the finest.
_THICK = 2.0


@dataclass(frozen=True)
class OpenScan:
    """A scan and its automatic segmentation, from which edits start.

    Args:
        image: network input ``(channels, x, y, z)``.
        logits: of the network.
        network_classes: those of the highest logits, ``(x, y, z)``, uint8.
        classes: of the automatic mask on the network's grid: ``network_classes``, or those that were kept of it.
        labels: the automatic mask on the scan's grid, ``(X, Y, Z)``, uint8.
    """

    image: MetaTensor
    logits: KeptLogits
    network_classes: npt.NDArray[np.uint8]
    classes: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.uint8]

    @cached_property
    def grid(self) -> ScanGrid:
        """Return the scan's grid, relative to the network's."""
        return ScanGrid.of(self.image)

    @cached_property
    def coarseness(self) -> tuple[float, float, float]:
        """Return the length of a voxel along each axis of the network's grid in those of the finest; 1 up to twice it.

        Where voxels are nearly cubes, distances count voxels: errors of a network are as long as its voxels.
        """
        spacing = np.linalg.norm(np.asarray(self.image.affine, dtype=float)[:3, :3], axis=0)
        ratio = spacing / spacing.min()
        x, y, z = (float(r) if r > _THICK else 1.0 for r in ratio)
        return x, y, z

    @property
    def nbytes(self) -> int:
        """Return the bytes of memory that the scan takes."""
        kept = 0 if self.classes is self.network_classes else self.classes.nbytes
        return self.image.nbytes + self.logits.nbytes + self.network_classes.nbytes + kept + self.labels.nbytes


@torch.inference_mode()
def scan_from_slabs(
    image: MetaTensor,
    slabs: Iterable[LogitSlab],
    *,
    takers: Sequence[SlabTaker] = (),
    prep: Preprocessing | None = None,
) -> OpenScan:
    """Return a preprocessed scan, opened for edits, from the slabs of its logits.

    Args:
        image: result of ``inference_transforms``, ``(1, x, y, z)``.
        slabs: of the automatic segmentation, in order; each is dropped once it was reduced.
        takers: that take the slabs too.
        prep: of the model, which says what is kept of the labels; None keeps all.
    """
    grid = ScanGrid.of(image)
    labels, keeper = SlabLabels(grid), LogitKeeper(grid.network_size)
    hand_on(slabs, (labels, keeper, *takers))
    restored = np.ascontiguousarray(labels.labels.numpy(), dtype=np.uint8)
    classes = keeper.classes
    if prep is not None and prep.keep_largest:
        found = restored.copy()
        if keep_as_planned(restored, grid, prep):
            classes = classes_of_largest(classes, grid, found=found, kept=restored)
    return OpenScan(image.cpu(), keeper.kept(), network_classes=keeper.classes, classes=classes, labels=restored)


def scan_from_logits(image: MetaTensor, logits: Tensor) -> OpenScan:
    """Return a preprocessed scan ``(1, x, y, z)`` whose logits ``(C, x, y, z)`` are known, opened for edits."""
    return scan_from_slabs(image, [LogitSlab(0, 0, logits.float())])


def open_scan(
    network: nn.Module, path: ScanFiles, prep: Preprocessing, *, device: str | torch.device = "cpu"
) -> OpenScan:
    """Segment a scan automatically, as ``segment`` does, and keep what edits need.

    Raises:
        InvalidVolume: the file is not a usable scan.
    """
    image = load_scan(path, prep, device=device)
    slabs = scan_slabs(network, image, prep, device=device)
    return scan_from_slabs(image, slabs, prep=prep)
