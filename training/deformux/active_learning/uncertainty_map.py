"""Map of a model's uncertainty over a scan, and the voxel to look at next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from monai.data import MetaTensor
from nibabel.affines import apply_affine, voxel_sizes
from scipy import ndimage
from torch import Tensor

from deformux.active_learning.uncertainty_scores import label_sums, uncertainty_of_sums, voxel_entropy
from deformux.data.grid import Index, ScanGrid
from deformux.inference.slabs import LogitSlab

__all__ = ["Uncertainty", "UncertaintySlabs", "find_uncertainty", "look_next", "uncertainty_map"]

# A map that stays below this shows nothing worth a look.
_LEAST = 1.0


@dataclass(frozen=True)
class Uncertainty:
    """Where a model is unsure of a scan.

    Args:
        map: ``(X, Y, Z)``, uint8, 0 (sure) to 100, on the scan's grid.
        look_next: the voxel of the scan at the centre of the most uncertain region; None if there is none.
        mean: 0 to 100, the volume's uncertainty in active learning (``volume_uncertainty``).
    """

    map: npt.NDArray[np.uint8]
    look_next: Index | None
    mean: float


class UncertaintySlabs:
    """Reduces the slabs of a scan's logits to its uncertainty.

    Args:
        image: the preprocessed scan.
    """

    def __init__(self, image: MetaTensor) -> None:
        self.image = image
        self._map = torch.zeros(image.shape[1:])
        self._weights: Tensor | None = None
        self._entropies: Tensor | None = None

    @torch.inference_mode()
    def add(self, slab: LogitSlab) -> None:
        """Take the next slab.

        Raises:
            ValueError: the logits are not ``(C >= 2, x, y, z)`` or not finite.
        """
        probabilities = slab.logits.float().softmax(0)
        part = [slice(None)] * 3
        part[slab.axis] = slice(slab.start, slab.stop)
        self._map[tuple(part)] = uncertainty_map(probabilities).cpu()
        weights, entropies = label_sums(probabilities)
        if self._weights is None or self._entropies is None:
            self._weights, self._entropies = weights, entropies
        else:
            self._weights, self._entropies = self._weights + weights, self._entropies + entropies

    def found(self) -> Uncertainty:
        """Return the uncertainty once every slab was added."""
        assert self._weights is not None
        assert self._entropies is not None
        grid = ScanGrid.of(self.image)
        place = look_next(self._map, voxel_sizes(np.asarray(self.image.affine, dtype=float)))
        return Uncertainty(
            map=grid.interpolate(self._map[None], lambda values: values[0].round()).numpy(),
            look_next=None if place is None else _nearest(place, grid),
            mean=100 * uncertainty_of_sums(self._weights, self._entropies),
        )


def find_uncertainty(logits: Tensor, image: MetaTensor) -> Uncertainty:
    """Find where a model is unsure of a scan, from the logits ``(C, x, y, z)`` of its preprocessed ``image``.

    Raises:
        ValueError: the logits are not ``(C >= 2, x, y, z)`` or not finite.
    """
    slabs = UncertaintySlabs(image)
    slabs.add(LogitSlab(0, 0, logits))
    return slabs.found()


def uncertainty_map(probabilities: Tensor) -> Tensor:
    """Return each voxel's entropy where labels may be, ``(x, y, z)``, float32: 0 is sure, 100 is undecided.

    100 stands for the entropy of two equally likely classes, or more, however many labels there are: at the edge of an
    organ two compete. A voxel that is more likely background than not counts less in proportion, as in
    ``label_uncertainty``, so that a scan's many nearly sure background voxels do not veil the doubtful ones.

    Args:
        probabilities: ``(C, x, y, z)``, summing to 1 over the classes; class 0 is background.

    Raises:
        ValueError: a wrong number of dimensions, fewer than two classes, or values that are not probabilities.
    """
    entropy = voxel_entropy(probabilities) / math.log(2)
    labelled = 1 - probabilities[0].float()
    return 100 * entropy.clamp(max=1) * (2 * labelled).clamp(0, 1)


def look_next(unsure: Tensor, spacing_mm: Sequence[float] = (1.0, 1.0, 1.0)) -> Index | None:
    """Return the voxel at the centre of a map's most uncertain region, or None if the map is empty.

    Regions are connected voxels (by their faces) of at least half the map's maximum; the most uncertain one has the
    highest sum. Its centre is the voxel farthest from its border, of equally far ones the most uncertain.

    Args:
        unsure: ``(x, y, z)`` of ``uncertainty_map``.
        spacing_mm: voxel size.
    """
    values = unsure.cpu().numpy()
    highest = float(values.max(initial=0))
    if highest < _LEAST:
        return None
    regions, n_regions = ndimage.label(values >= highest / 2)
    sums = ndimage.sum_labels(values, regions, range(1, n_regions + 1))
    most = int(np.argmax(sums)) + 1
    around = ndimage.find_objects(regions, max_label=most)[most - 1]
    inside = regions[around] == most
    # The faces of the volume are borders too, except along an axis of one voxel, where all would be border.
    margin = [(1, 1) if n > 1 else (0, 0) for n in values.shape]
    depth = ndimage.distance_transform_edt(np.pad(inside, margin), sampling=spacing_mm)
    depth = depth[tuple(slice(before, before + n) for (before, _), n in zip(margin, inside.shape, strict=True))]
    deepest = depth >= depth.max() * (1 - 1e-6)
    place = np.unravel_index(np.argmax(np.where(deepest, values[around], -1)), inside.shape)
    i, j, k = (int(n) + part.start for n, part in zip(place, around, strict=True))
    return i, j, k


def _nearest(index: Index, grid: ScanGrid) -> Index:
    """Return the scan's voxel nearest to a voxel of the network's grid."""
    nearest = np.rint(apply_affine(np.linalg.inv(grid.to_network), index)).astype(int)
    i, j, k = (int(n) for n in np.clip(nearest, 0, np.array(grid.size) - 1))
    return i, j, k
