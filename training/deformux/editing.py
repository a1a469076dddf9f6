"""Corrections by clicks: only what the clicks touch is computed, and only what they ask for changes.

The result is a function of the scan, the weights, the mask to start from and the set of clicks: neither their order
nor earlier results matter, so taking a click back gives the earlier mask exactly. What is kept saves time only.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from monai.data import MetaTensor
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional as F

from deformux.grids import Box, Index, ScanGrid, slices, triple
from deformux.guidance import CLICK_REACH, encode_guidance
from deformux.inference import mixed_precision, volume_logits
from deformux.lattice import Lattice, edit_window
from deformux.transforms import Preprocessing, label_grid_transforms

__all__ = ["Editor", "Points", "Study", "open_study", "study_from_logits"]

# Label value (0 is background) to voxels of the scan.
Points = Mapping[int, Sequence[Sequence[int]]]
# From a window (1, 1, x, y, z) and its guidance to logits (1, C, x, y, z).
GuidedNetwork = Callable[[Tensor, Tensor], Tensor]

# How far beyond all others the logit of a clicked label is raised where the mask to start from, or a click, decides.
_MARGIN = 1.0
# A click that the network ignores still counts as evidence for its neighbours: standard deviation in voxels.
_EVIDENCE_SIGMA = 1.0
_EVIDENCE_REACH = 2
# Voxels that change together touch by a face, an edge or a corner.
_TOUCHING = np.ones((3, 3, 3), dtype=bool)


@dataclass(frozen=True)
class Study:
    """A scan and its automatic segmentation: what edits of it start from.

    Args:
        image: network input ``(1, x, y, z)``.
        logits: of the automatic segmentation, ``(C, x, y, z)``, float16 on the CPU.
        classes: the highest of them, ``(x, y, z)``, uint8.
        labels: the automatic mask on the scan's grid, ``(X, Y, Z)``, uint8.
    """

    image: MetaTensor
    logits: Tensor
    classes: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.uint8]

    @cached_property
    def grid(self) -> ScanGrid:
        """Where the scan's voxels lie on the network's grid."""
        return ScanGrid.of(self.image)

    @property
    def nbytes(self) -> int:
        """Memory that the study takes."""
        return self.image.nbytes + self.logits.nbytes + self.classes.nbytes + self.labels.nbytes


@torch.inference_mode()
def study_from_logits(image: MetaTensor, logits: Tensor, *, labels: npt.NDArray[np.uint8] | None = None) -> Study:
    """The study of a preprocessed scan ``(1, x, y, z)`` whose logits ``(C, x, y, z)`` are known.

    Args:
        image: what ``inference_transforms`` made of the scan.
        logits: of the automatic segmentation.
        labels: these restored to the scan's grid ``(X, Y, Z)``, where that has been done already.
    """
    restored = ScanGrid.of(image).labels(logits.float()).numpy() if labels is None else labels
    return Study(
        image=image.cpu(),
        logits=logits.to("cpu", torch.float16),
        classes=logits.argmax(0).to("cpu", torch.uint8).numpy(),
        labels=np.ascontiguousarray(restored, dtype=np.uint8),
    )


def open_study(network: nn.Module, path: Path, prep: Preprocessing, *, device: str | torch.device = "cpu") -> Study:
    """Segment a scan automatically, as ``inference.segment`` does, and keep what edits need.

    Raises:
        InvalidVolume: the file is not a usable scan.
    """
    return study_from_logits(*volume_logits(network, path, prep, device=device))


@dataclass(frozen=True)
class _Window:
    """What the network makes of one window: its logits ``(C, *size)`` in the volume, and where they change a class."""

    box: Box
    weights: tuple[npt.NDArray[np.float32], ...]
    logits: Tensor
    changed: npt.NDArray[np.bool_]


class Editor:
    """Corrects the mask of one study by clicks; for one thread at a time.

    A click belongs to a cell of a fixed lattice (``deformux.lattice``), and the network sees the window around that
    cell with all clicks inside it and the mask to start from. Of what it would change, only that is taken over what is
    connected with a click for it: voxels of one new label that touch each other, one of them clicked with that label.
    All else stays as it was, to the voxel. Thus a label loses voxels only to clicks of other labels.

    Args:
        study: the scan and its automatic segmentation.
        network: takes a window ``(1, 1, x, y, z)`` and its guidance, and returns logits; on ``device``.
        prep: the model's preprocessing.
        device: where the network is.
        mask: label values ``(X, Y, Z)`` on the scan's grid to start from, instead of the automatic ones.
        cache_bytes: memory for the results of windows; beyond it, those that were not used for longest are dropped.

    Raises:
        ValueError: the mask has another size than the scan, or holds values that are no label.
    """

    def __init__(
        self,
        study: Study,
        network: GuidedNetwork,
        prep: Preprocessing,
        *,
        device: str | torch.device = "cpu",
        mask: npt.NDArray[np.integer] | None = None,
        cache_bytes: int = 128 * 2**20,
    ) -> None:
        self.study, self.network, self.device = study, network, torch.device(device)
        self.n_labels = study.logits.shape[0] - 1
        self.windows_computed = 0
        self._cache_bytes = cache_bytes
        self._windows: OrderedDict[tuple[object, ...], _Window] = OrderedDict()
        size = study.grid.network_size
        self._lattice = Lattice(size, edit_window(prep.patch_size))
        self._mask, self._start = study.labels, study.classes
        if mask is not None:
            self._mask = self._checked(mask)
            self._start = _on_network_grid(self._mask, study, prep)

    @property
    def nbytes(self) -> int:
        """Memory that the editor takes beside its study."""
        own = 0 if self._mask is self.study.labels else self._mask.nbytes + self._start.nbytes
        return own + sum(_nbytes(window) for window in self._windows.values())

    @torch.inference_mode()
    def apply(self, points: Points) -> npt.NDArray[np.uint8]:
        """The mask ``(X, Y, Z)`` on the scan's grid with all clicks of ``points``, which always keep their label.

        Raises:
            ValueError: a click outside the scan, of an unknown label, or of two labels at one voxel.
        """
        self.windows_computed = 0
        clicks = self._checked_points(points)
        result = self._mask.copy()
        if not clicks:
            return result
        moved = {label: np.unique(self.study.grid.nearest(voxels), axis=0) for label, voxels in clicks.items()}
        for group in self._groups(moved):
            self._edit(group, moved, result)
        for label, voxels in clicks.items():
            result[tuple(voxels.T)] = label
        self._forget()
        return result

    def _groups(self, clicks: Mapping[int, npt.NDArray[np.int64]]) -> list[list[_Window]]:
        """The windows of all cells with a click, those that overlap together."""
        cells = sorted({self._lattice.cell(voxel) for voxels in clicks.values() for voxel in voxels})
        groups: list[list[_Window]] = []
        for window in [self._window(cell, clicks) for cell in cells]:
            touching = [group for group in groups if any(_overlap(window.box, other.box) for other in group)]
            groups = [group for group in groups if not any(group is other for other in touching)]
            groups.append([member for group in touching for member in group] + [window])
        return groups

    def _window(self, cell: Index, clicks: Mapping[int, npt.NDArray[np.int64]]) -> _Window:
        size, origin = np.array(self._lattice.window), np.array(self._lattice.origin(cell))
        seen = {
            label: voxels[((voxels > origin - CLICK_REACH - 1) & (voxels < origin + size + CLICK_REACH)).all(1)]
            for label, voxels in sorted(clicks.items())
        }
        key = (cell, *((label, voxels.tobytes()) for label, voxels in seen.items() if len(voxels)))
        if key in self._windows:
            self._windows.move_to_end(key)
            return self._windows[key]
        self.windows_computed += 1
        box = self._lattice.inside(cell)
        start, stop = np.array(box)
        before, after = start - origin, origin + size - stop
        margins = [int(n) for axis in (2, 1, 0) for n in (before[axis], after[axis])]
        # Beyond the volume the network has learnt to see the scan's border repeated, and an empty mask.
        image = self.study.image.as_tensor()[(slice(None), *slices(box))]
        image = F.pad(image[None], margins, mode="replicate").to(self.device)
        mask = F.pad(torch.from_numpy(self._start[slices(box)]), margins)
        guidance = encode_guidance(seen, mask, n_labels=self.n_labels, size=triple(size), origin=triple(origin))
        with mixed_precision(self.device):
            logits = self.network(image, guidance[None].to(self.device))[0].float()
        inner = tuple(slice(int(a), int(a + b - c)) for a, b, c in zip(before, stop, start, strict=True))
        logits = logits[(slice(None), *inner)].cpu()
        changed = logits.argmax(0).to(torch.uint8).numpy() != self._start[slices(box)]
        window = _Window(box, self._lattice.weights(cell), logits.half(), changed)
        self._windows[key] = window
        return window

    def _edit(
        self, group: Sequence[_Window], clicks: Mapping[int, npt.NDArray[np.int64]], result: npt.NDArray[np.uint8]
    ) -> None:
        """Write what a group of overlapping windows changes into the mask."""
        low = np.min([window.box[0] for window in group], axis=0)
        high = np.max([window.box[1] for window in group], axis=0)
        region: Box = (triple(low), triple(high))
        start = self._start[slices(region)]
        own = {label: voxels[_within_any(voxels, group)] - low for label, voxels in clicks.items()}
        own = {label: voxels for label, voxels in own.items() if len(voxels)}
        # A mixture of logits that agree on a class agrees too: only where some window differs is there more to know.
        candidates = np.zeros(start.shape, dtype=bool)
        for window in group:
            candidates[slices(_moved(window.box, -low))] |= window.changed
        for voxels in own.values():
            for voxel in voxels:
                candidates[slices(_around(voxel, start.shape, _EVIDENCE_REACH))] = True
        # Interpolation mixes a changed voxel with its neighbours.
        candidates = ndimage.binary_dilation(candidates, _TOUCHING)
        voxels = np.argwhere(candidates)
        logits = self._evidence(self._blend(group, voxels + low), voxels, own)
        classes = start.copy()
        classes[candidates] = logits.argmax(0).astype(np.uint8)
        for label, clicked in own.items():
            classes[tuple(clicked.T)] = label
        changed = classes != start
        accepted = np.zeros_like(changed)
        pieces: list[Box] = []
        for label, clicked in own.items():
            numbered, _ = ndimage.label(changed & (classes == label), _TOUCHING)
            wanted = np.unique(numbered[tuple(clicked.T)])
            wanted = wanted[wanted > 0]
            accepted |= np.isin(numbered, wanted)
            boxes = ndimage.find_objects(numbered)
            pieces += [(triple(s.start for s in boxes[n - 1]), triple(s.stop for s in boxes[n - 1])) for n in wanted]
        kept = ndimage.binary_dilation(accepted, _TOUCHING) & (accepted | ~changed)
        taken = kept[candidates]
        self._restore(pieces, low, voxels[taken], logits[:, taken], result)

    def _blend(self, group: Sequence[_Window], voxels: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Logits ``(C, n)`` at voxels ``(n, 3)`` of the network's grid: of the windows, fading to their borders."""
        base = self._starting_logits(voxels)
        total = np.zeros(len(voxels), np.float32)
        mixed = np.zeros_like(base)
        for window in group:
            start, stop = np.array(window.box)
            here = np.flatnonzero(((voxels >= start) & (voxels < stop)).all(1))
            x, y, z = (voxels[here] - start).T
            wx, wy, wz = window.weights
            weight = wx[x] * wy[y] * wz[z]
            total[here] += weight
            mixed[:, here] += weight * window.logits.numpy()[:, x, y, z].astype(np.float32)
        return (mixed + np.maximum(0, 1 - total) * base) / np.maximum(1, total)

    def _starting_logits(self, voxels: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """The automatic logits ``(C, n)`` at voxels ``(n, 3)``, made to agree with the mask to start from."""
        index = tuple(voxels.T)
        logits = self.study.logits.numpy()[(slice(None), *index)].astype(np.float32)
        if self._start is not self.study.classes:
            _agree(logits, self._start[index], self.study.classes[index])
        return logits

    def _evidence(
        self,
        logits: npt.NDArray[np.float32],
        voxels: npt.NDArray[np.int64],
        clicks: Mapping[int, npt.NDArray[np.int64]],
    ) -> npt.NDArray[np.float32]:
        """Raise the logit of a clicked label until it wins at the click, and by a Gaussian of that around it."""
        raised = logits.copy()
        for label, clicked in clicks.items():
            bump = np.zeros(len(voxels), np.float32)
            others = np.delete(logits, label, axis=0).max(0)
            for click in clicked:
                near = np.flatnonzero((np.abs(voxels - click) <= _EVIDENCE_REACH).all(1))
                distance = ((voxels[near] - click) ** 2).sum(1)
                at = near[np.argmin(distance)]
                missing = max(0.0, float(others[at] - logits[label, at]) + _MARGIN)
                bump[near] = np.maximum(bump[near], missing * np.exp(-distance / (2 * _EVIDENCE_SIGMA**2)))
            raised[label] += bump
        return raised

    def _restore(
        self,
        pieces: Sequence[Box],
        low: npt.NDArray[np.int64],
        voxels: npt.NDArray[np.int64],
        logits: npt.NDArray[np.float32],
        result: npt.NDArray[np.uint8],
    ) -> None:
        """Write changes of the network's grid into the scan's, where they make a difference."""
        grid = self.study.grid
        for piece in pieces:
            box = grid.reached(_moved(piece, low))
            origin, stop = np.array(needed := grid.needed(box))
            before = self._starting_box(needed)
            after = before.clone()
            here = ((voxels + low >= origin) & (voxels + low < stop)).all(1)
            after[(slice(None), *(voxels[here] + low - origin).T)] = torch.from_numpy(logits[:, here])
            old, new = (grid.labels(values, box=box, origin=triple(origin)).numpy() for values in (before, after))
            result[slices(box)] = np.where(new != old, new, result[slices(box)])

    def _starting_box(self, box: Box) -> Tensor:
        logits = self.study.logits[(slice(None), *slices(box))].float()
        if self._start is not self.study.classes:
            flat = logits.reshape(len(logits), -1).numpy()
            _agree(flat, self._start[slices(box)].ravel(), self.study.classes[slices(box)].ravel())
            return torch.from_numpy(flat).reshape(logits.shape)
        return logits

    def _forget(self) -> None:
        held = sum(_nbytes(window) for window in self._windows.values())
        while held > self._cache_bytes:
            _, oldest = self._windows.popitem(last=False)
            held -= _nbytes(oldest)

    def _checked(self, mask: npt.NDArray[np.integer]) -> npt.NDArray[np.uint8]:
        if mask.shape != self.study.labels.shape:
            raise ValueError(f"mask: got {mask.shape} voxels, expected the scan's {self.study.labels.shape}")
        if mask.min() < 0 or mask.max() > self.n_labels:
            raise ValueError(f"mask: got values {mask.min()} to {mask.max()}, expected 0 to {self.n_labels}")
        return np.array(mask, dtype=np.uint8)

    def _checked_points(self, points: Points) -> dict[int, npt.NDArray[np.int64]]:
        size = self.study.grid.size
        owner: dict[Index, int] = {}
        for label in sorted(points):
            if not 0 <= label <= self.n_labels:
                raise ValueError(f"clicks: got label {label}, expected 0 (background) to {self.n_labels}")
            for point in points[label]:
                voxel = triple(point)
                if not all(0 <= at < length for at, length in zip(voxel, size, strict=True)):
                    raise ValueError(f"clicks: got voxel {voxel}, expected one inside the scan's {size}")
                if owner.setdefault(voxel, label) != label:
                    raise ValueError(f"clicks: got labels {owner[voxel]} and {label} at voxel {voxel}, expected one")
        clicks: dict[int, list[Index]] = {}
        for voxel, label in sorted(owner.items()):
            clicks.setdefault(label, []).append(voxel)
        return {label: np.array(clicks[label], dtype=np.int64) for label in sorted(clicks)}


def _on_network_grid(mask: npt.NDArray[np.uint8], study: Study, prep: Preprocessing) -> npt.NDArray[np.uint8]:
    volume = MetaTensor(torch.from_numpy(mask)[None].float(), affine=torch.as_tensor(study.grid.affine))
    for transform in label_grid_transforms(prep, "label"):
        volume = cast(MetaTensor, transform({"label": volume})["label"])
    return volume[0].to(torch.uint8).numpy()


def _agree(logits: npt.NDArray[np.float32], wanted: npt.NDArray[np.uint8], found: npt.NDArray[np.uint8]) -> None:
    """Raise, in place, the logits ``(C, n)`` of classes that a mask wants but the network did not find."""
    (differ,) = np.nonzero(wanted != found)
    logits[wanted[differ], differ] = logits[:, differ].max(0, initial=-np.inf) + _MARGIN


def _nbytes(window: _Window) -> int:
    return window.logits.nbytes + window.changed.nbytes


def _overlap(a: Box, b: Box) -> bool:
    return all(max(x, y) < min(p, q) for x, y, p, q in zip(a[0], b[0], a[1], b[1], strict=True))


def _within_any(voxels: npt.NDArray[np.int64], group: Sequence[_Window]) -> npt.NDArray[np.bool_]:
    inside = [((voxels >= window.box[0]) & (voxels < window.box[1])).all(1) for window in group]
    return np.logical_or.reduce(inside)


def _moved(box: Box, by: npt.NDArray[np.int64]) -> Box:
    return triple(np.add(box[0], by)), triple(np.add(box[1], by))


def _around(voxel: npt.NDArray[np.int64], size: Sequence[int], reach: int) -> Box:
    return triple(np.maximum(voxel - reach, 0)), triple(np.minimum(voxel + reach + 1, size))
