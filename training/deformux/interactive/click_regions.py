"""What clicks change in a mask: which voxels, as far as they hang together with a click for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from torch import Tensor

from deformux.data.grid import Logits, Voxels, bounding_box, grown, highest, slices, triple

__all__ = ["MaskChange", "Settled", "find_changes", "mix", "pieces", "settle"]

# How far the logit of a clicked label is raised beyond all others at the click.
_MARGIN = 1.0
# A click that the network ignores still counts as evidence for its neighbours: standard deviation in voxels.
_EVIDENCE_SIGMA = 1.0
_EVIDENCE_REACH = 2
# Voxels touch by a face, an edge or a corner.
_TOUCHING = np.ones((3, 3, 3), dtype=bool)


@dataclass(frozen=True)
class MaskChange:
    """A connected set of voxels that a window may change, in the volume.

    Args:
        voxels: ``(n, 3)``.
        logits: the window's, ``(C, n)``, float16.
        weights: how much they count against the mask to start from, ``(n,)``.
    """

    voxels: Voxels
    logits: npt.NDArray[np.float16]
    weights: npt.NDArray[np.float32]

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return self.voxels.nbytes + self.logits.nbytes + self.weights.nbytes


def find_changes(
    logits: Tensor,
    start: npt.NDArray[np.uint8],
    clicks: Mapping[int, Voxels],
    origin: Sequence[int],
    profiles: Sequence[npt.NDArray[np.float32]],
) -> list[MaskChange]:
    """What a window's logits ``(C, x, y, z)`` change, connected with a click for it; and the click's neighbourhood.

    Args:
        logits: of the part of the window that lies in the volume; on any device.
        start: the mask to start from, there.
        clicks: by label, in the volume; those outside this part are left out.
        origin: where it lies in the volume.
        profiles: weights along each axis, which multiply.
    """
    classes = _highest(logits)
    wanted = np.zeros(start.shape, dtype=bool)
    for label, voxels in clicks.items():
        clicked = voxels - origin
        clicked = clicked[((clicked >= 0) & (clicked < start.shape)).all(1)]
        if not len(clicked):
            continue
        asked = (classes == label) & (start != label)
        for voxel in clicked:
            low, high = np.maximum(voxel - _EVIDENCE_REACH, 0), voxel + _EVIDENCE_REACH + 1
            asked[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = True
        wanted |= _connected(asked, clicked)
    box = bounding_box(wanted)
    if box is None:
        return []
    # Interpolation mixes a changed voxel with those that touch it.
    box = grown(box, 1, wanted.shape)
    numbered, _ = ndimage.label(_dilated(wanted[slices(box)]), _TOUCHING)
    changes = []
    for number, part in enumerate(ndimage.find_objects(numbered), start=1):
        first = [low + axis.start for low, axis in zip(box[0], part, strict=True)]
        voxels = np.argwhere(numbered[part] == number) + first
        x, y, z = voxels.T
        weights = profiles[0][x] * profiles[1][y] * profiles[2][z]
        changes.append(MaskChange(voxels + origin, _at(logits, voxels), weights))
    return changes


def _at(logits: Tensor, voxels: Voxels) -> npt.NDArray[np.float16]:
    """Logits ``(C, n)`` at voxels ``(n, 3)``."""
    if not logits.is_cuda:
        x, y, z = voxels.T
        return logits.numpy()[:, x, y, z].astype(np.float16)
    places = torch.from_numpy(np.ravel_multi_index(tuple(voxels.T), logits.shape[1:]))
    return logits.flatten(1).index_select(1, places.to(logits.device)).to("cpu", torch.float16).numpy()


def _highest(logits: Tensor) -> npt.NDArray[np.uint8]:
    """The class ``(x, y, z)`` of the highest of logits ``(C, x, y, z)``, the first of equal ones."""
    if logits.is_cuda:
        return highest(logits).to(torch.uint8).cpu().numpy()
    # Faster than PyTorch's where there are few classes.
    first, *others = logits.numpy()
    most, classes = first.copy(), np.zeros(first.shape, np.uint8)
    for label, values in enumerate(others, start=1):
        np.putmask(classes, values > most, label)
        np.maximum(most, values, out=most)
    return classes


def pieces(changes: Sequence[MaskChange]) -> list[list[MaskChange]]:
    """Changes whose bounding boxes overlap, directly or through others, together."""
    low = np.array([change.voxels.min(0) for change in changes]).reshape(-1, 3)
    high = np.array([change.voxels.max(0) for change in changes]).reshape(-1, 3)
    meet = ((low[:, None] <= high) & (low <= high[:, None])).all(-1)
    found, left = [], np.ones(len(changes), dtype=bool)
    while left.any():
        piece = np.zeros_like(left)
        piece[np.argmax(left)] = True
        while (reached := meet[piece].any(0)).sum() > piece.sum():
            piece = reached
        left &= ~piece
        found.append([changes[i] for i in np.flatnonzero(piece)])
    return found


def mix(piece: Sequence[MaskChange]) -> tuple[Voxels, Logits, npt.NDArray[np.float32]]:
    """The voxels ``(n, 3)`` of several changes, the weighted sum of their logits ``(C, n)``, and of the weights."""
    if len(piece) == 1:
        return piece[0].voxels, piece[0].logits * piece[0].weights, piece[0].weights
    first = np.min([change.voxels.min(0) for change in piece], axis=0)
    shape = np.max([change.voxels.max(0) for change in piece], axis=0) - first + 1
    # Numbered in a box instead of sorted, which takes ten times as long.
    places = [tuple((change.voxels - first).T) for change in piece]
    inside = np.zeros(shape, dtype=bool)
    for place in places:
        inside[place] = True
    voxels = np.argwhere(inside) + first
    numbers = np.zeros(shape, np.int32)
    numbers[inside] = np.arange(len(voxels))
    logits = np.zeros((len(piece[0].logits), len(voxels)), np.float32)
    weights = np.zeros(len(voxels), np.float32)
    for change, place in zip(piece, places, strict=True):
        here = numbers[place]
        logits[:, here] += change.weights * change.logits
        weights[here] += change.weights
    return voxels, logits, weights


@dataclass(frozen=True)
class Settled:
    """What becomes of a piece.

    Args:
        logits: new ones, ``(C, n)``.
        changed: voxels with another class than in the mask to start from, ``(n,)``.
        taken: these, and those that touch them and keep their class: where the new logits replace the old, ``(n,)``.
    """

    logits: Logits
    changed: npt.NDArray[np.bool_]
    taken: npt.NDArray[np.bool_]


def settle(voxels: Voxels, logits: Logits, start: npt.NDArray[np.uint8], clicks: Mapping[int, Voxels]) -> Settled:
    """Let clicks win where they are, and keep of a piece's changes those that hang together with a click for them.

    Args:
        voxels: ``(n, 3)``, in the order of their index.
        logits: ``(C, n)``.
        start: classes of the mask to start from, ``(n,)``.
        clicks: by label, all among the voxels.
    """
    first = voxels.min(0)
    index = tuple((voxels - first).T)
    shape = triple(voxels.max(0) - first + 1)
    raised = _with_evidence(voxels, logits, clicks)
    classes = np.zeros(shape, np.uint8)
    classes[index] = raised.argmax(0)
    for label, clicked in clicks.items():
        classes[tuple((clicked - first).T)] = label
    differs = np.zeros(shape, dtype=bool)
    differs[index] = classes[index] != start
    kept = np.zeros(shape, dtype=bool)
    for label, clicked in clicks.items():
        kept |= _connected(differs & (classes == label), clicked - first)
    taken = _dilated(kept) & (kept | ~differs)
    return Settled(raised, kept[index], taken[index])


def _with_evidence(voxels: Voxels, logits: Logits, clicks: Mapping[int, Voxels]) -> Logits:
    """Raise the logit of a clicked label until it wins at the click, and by a Gaussian of that around it."""
    raised = logits.copy()
    for label, clicked in clicks.items():
        bump = np.zeros(len(voxels), np.float32)
        for click in clicked:
            near = np.flatnonzero((np.abs(voxels - click) <= _EVIDENCE_REACH).all(1))
            distance = ((voxels[near] - click) ** 2).sum(1)
            at = logits[:, near[np.argmin(distance)]]
            missing = max(0.0, float(np.delete(at, label).max() - at[label]) + _MARGIN)
            bump[near] = np.maximum(bump[near], missing * np.exp(-distance / (2 * _EVIDENCE_SIGMA**2)))
        raised[label] += bump
    return raised


def _dilated(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """The mask and all voxels that touch it; many times as fast as scipy's."""
    for axis in range(3):
        grown = mask.copy()
        lines, source = np.moveaxis(grown, axis, 0), np.moveaxis(mask, axis, 0)
        lines[1:] |= source[:-1]
        lines[:-1] |= source[1:]
        mask = grown
    return mask


def _connected(mask: npt.NDArray[np.bool_], voxels: Voxels) -> npt.NDArray[np.bool_]:
    """The parts of a mask that hold one of the voxels ``(n, 3)``, or are at most two voxels away from such a part.

    A correction is often a thin shell, which the grid breaks into pieces: without the bridges five clicks bring 0.004
    less Dice on the hippocampus data.
    """
    result = np.zeros_like(mask)
    box = bounding_box(mask)
    if box is None:
        return result
    box = grown(box, 1, mask.shape)
    part = mask[slices(box)]
    numbered, count = ndimage.label(_dilated(part), _TOUCHING)
    chosen = np.zeros(count + 1, dtype=bool)
    inside = voxels[((voxels >= box[0]) & (voxels < box[1])).all(1)] - box[0]
    chosen[numbered[tuple(inside.T)]] = True
    chosen[0] = False
    result[slices(box)] = chosen[numbered] & part
    return result
