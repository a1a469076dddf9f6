"""Corrections by clicks: only windows around clicks are computed, and only what clicks ask for changes.

The result is a function of the scan, the weights, the mask to start from and the set of clicks. Neither their order nor
earlier results matter, so taking a click back gives the earlier mask exactly. Caches only save time.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from monai.data import MetaTensor
from torch import Tensor
from torch.nn import functional as F

from deformux.data.grid import Box, Index, slices, triple
from deformux.data.preprocessing import Preprocessing
from deformux.data.transforms import label_grid_transforms
from deformux.interactive.border_shift import border_evidence, border_reach
from deformux.interactive.click_regions import MaskChange, find_changes, mix, pieces, settle
from deformux.interactive.click_windows import Lattice, edit_window
from deformux.interactive.open_scan import OpenScan
from deformux.networks.guidance import encode_guidance
from deformux.networks.precision import mixed_precision

__all__ = ["ClickPoints", "Editor"]

# Label value (0 is background) to voxels of the scan.
ClickPoints = Mapping[int, Sequence[Sequence[int]]]
# From a window (1, 1, x, y, z) and its guidance to logits (1, C, x, y, z).
GuidedNetwork = Callable[[Tensor, Tensor], Tensor]

# Lead over all others to which the logit of a label is raised where the mask to start from has it.
_MARGIN = 1.0
# Voxels of the scan in a part that is restored at a time.
_PART_VOXELS = 2**21
# Parts that are restored at the same time, each in memory of its own.
_MOST_THREADS = 4


@dataclass(frozen=True)
class _Patch:
    """Effect of overlapping changes in a box of a mask: ``labels`` where ``won``, both inside ``box``."""

    box: Box
    won: npt.NDArray[np.bool_]
    labels: npt.NDArray[np.uint8]

    @property
    def nbytes(self) -> int:
        """Return the bytes of memory that the patch takes besides the changes."""
        return self.won.nbytes + self.labels.nbytes


# Key of changes and clicks to the changes, kept so that their ids stay unique, and their patches.
_Patches = dict[tuple[object, ...], tuple[Sequence[MaskChange], Sequence[_Patch]]]


class Editor:
    """Corrects the mask of one scan by clicks; for one thread at a time.

    A click belongs to a cell of a fixed lattice (``click_windows``). The network sees the window around that cell, with
    all clicks inside it and the mask to start from. Where clicks alone move a border (``border_shift``), that replaces
    the network's answer. Only changes connected with a click for them are kept: voxels of one new label, one of them
    clicked with that label, that touch or leave gaps of at most two. Everything else stays the same, to the voxel, so
    that a label loses voxels only to clicks of other labels.

    Args:
        scan: the scan and its automatic segmentation.
        network: takes a window ``(1, 1, x, y, z)`` and its guidance, and returns logits; on ``device``.
        prep: the model's preprocessing.
        device: where the network is.
        mask: label values ``(X, Y, Z)`` on the scan's grid to start from, instead of the automatic mask.
        cache_bytes: memory for results of windows; beyond it, the least recently used are dropped.

    Raises:
        ValueError: the mask has another size than the scan, or values that are not labels.
    """

    def __init__(
        self,
        scan: OpenScan,
        network: GuidedNetwork,
        prep: Preprocessing,
        *,
        device: str | torch.device = "cpu",
        mask: npt.NDArray[np.integer] | None = None,
        cache_bytes: int = 128 * 2**20,
    ) -> None:
        self.scan, self.network, self.device = scan, network, torch.device(device)
        self.n_labels = scan.logits.n_classes - 1
        self.windows_computed = 0
        self._cache_bytes = cache_bytes
        self._windows: OrderedDict[tuple[object, ...], list[MaskChange]] = OrderedDict()
        # Of the last call only: the next one mostly has the same pieces.
        self._patches: _Patches = {}
        # By window: what its starting logits say about the surroundings of clicks.
        self._surroundings: dict[Box, dict[tuple[int, ...], npt.NDArray[np.float32]]] = {}
        size = scan.grid.network_size
        self._lattice = Lattice(size, edit_window(prep.patch_size))
        self._mask, self._start = scan.labels, scan.classes
        if mask is not None:
            self._mask = self._checked(mask)
            self._start = _on_network_grid(self._mask, scan, prep)

    @property
    def nbytes(self) -> int:
        """Return the bytes of memory that the editor takes besides its scan."""
        own = 0 if self._mask is self.scan.labels else self._mask.nbytes + self._start.nbytes
        return own + self._other_bytes() + sum(_nbytes(changes) for changes in self._windows.values())

    @torch.inference_mode()
    def apply(self, points: ClickPoints) -> npt.NDArray[np.uint8]:
        """Return the mask ``(X, Y, Z)`` on the scan's grid with all clicks of ``points``; each gets its label.

        Raises:
            ValueError: a click is outside the scan or has an unknown label, or two labels are clicked at one voxel.
        """
        self.windows_computed = 0
        clicks = self._checked_points(points)
        result = self._mask.copy()
        if not clicks:
            return result
        moved = {label: np.unique(self.scan.grid.nearest(voxels), axis=0) for label, voxels in clicks.items()}
        cells = sorted({self._lattice.cell(voxel) for voxels in moved.values() for voxel in voxels})
        before, self._patches = self._patches, {}
        for piece in pieces([change for cell in cells for change in self._window(cell, moved)]):
            self._edit(piece, moved, before, result)
        for label, voxels in clicks.items():
            result[tuple(voxels.T)] = label
        self._forget()
        return result

    def _window(self, cell: Index, clicks: Mapping[int, npt.NDArray[np.int64]]) -> list[MaskChange]:
        seen = {label: _inside(voxels, self._lattice.sight(cell)) for label, voxels in sorted(clicks.items())}
        key = (cell, *((label, voxels.tobytes()) for label, voxels in seen.items() if len(voxels)))
        if key in self._windows:
            self._windows.move_to_end(key)
            return self._windows[key]
        self.windows_computed += 1
        box = self._lattice.inside(cell)
        size, origin = np.array(self._lattice.window), np.array(self._lattice.origin(cell))
        start, stop = np.array(box)
        before, after = start - origin, origin + size - stop
        margins = [int(n) for axis in (2, 1, 0) for n in (before[axis], after[axis])]
        # Training repeats the scan's border beyond the volume, and leaves the mask empty there.
        image = self.scan.image.as_tensor()[(slice(None), *slices(box))]
        image = F.pad(image[None], margins, mode="replicate").to(self.device)
        mask = F.pad(torch.from_numpy(self._start[slices(box)]), margins).to(self.device)
        guidance = encode_guidance(seen, mask, n_labels=self.n_labels, size=triple(size), origin=triple(origin))
        with mixed_precision(self.device):
            logits = self.network(image, guidance[None])[0].float()
        inner = tuple(slice(int(a), int(a + b - c)) for a, b, c in zip(before, stop, start, strict=True))
        # The network may have kept the tensor.
        read = self._with_borders(logits[(slice(None), *inner)].clone(), box, seen)
        changes = find_changes(read, self._start[slices(box)], seen, triple(start), self._lattice.weights(cell))
        self._windows[key] = changes
        return changes

    def _with_borders(self, logits: Tensor, box: Box, clicks: Mapping[int, npt.NDArray[np.int64]]) -> Tensor:
        """Replace the network's logits ``(C, x, y, z)`` of a box, in place, where clicks alone move a border."""
        here = {label: _inside(voxels, box) for label, voxels in clicks.items()}
        places = np.concatenate([*here.values(), np.empty((0, 3), np.int64)])
        if not len(places):
            return logits
        far = border_reach(self.scan.coarseness)
        low = np.maximum(places.min(0) - far, box[0])
        near: Box = (triple(low), triple(np.minimum(places.max(0) + far + 1, box[1])))
        start, classes = self._starting_box(near), self._start[slices(near)]
        # Several times as fast as numpy with many classes.
        most = start.amax(0).numpy()
        values = start.numpy()
        moved = np.zeros(classes.shape, dtype=bool)
        evidence = border_evidence(
            values,
            {label: voxels - low for label, voxels in here.items()},
            known=self._surroundings.setdefault(box, {}),
            origin=triple(low),
            coarseness=self.scan.coarseness,
        )
        for label, added in evidence.items():
            raised = values[label] + added
            wins = raised > most
            moved = np.where(wins, classes != label, moved)
            most = np.where(wins, raised, most)
        corrected = values[:, moved]
        for label, added in evidence.items():
            corrected[label] += added[moved]
        x, y, z = (torch.from_numpy(index).to(logits.device) for index in (np.argwhere(moved) + (low - box[0])).T)
        logits[:, x, y, z] = torch.from_numpy(corrected).to(logits.device)
        return logits

    def _edit(
        self,
        piece: Sequence[MaskChange],
        clicks: Mapping[int, npt.NDArray[np.int64]],
        known: _Patches,
        result: npt.NDArray[np.uint8],
    ) -> None:
        """Write the effect of overlapping changes into the mask; ``known`` are patches of an earlier call."""
        within: Box = (
            triple(np.min([change.voxels.min(0) for change in piece], axis=0)),
            triple(np.max([change.voxels.max(0) for change in piece], axis=0) + 1),
        )
        here = {label: _inside(clicked, within) for label, clicked in clicks.items()}
        key = (*map(id, piece), *((label, clicked.tobytes()) for label, clicked in here.items() if len(clicked)))
        _, patches = self._patches[key] = known.get(key) or (piece, self._effect(piece, within, here))
        for patch in patches:
            np.copyto(result[slices(patch.box)], patch.labels, where=patch.won)

    def _effect(
        self, piece: Sequence[MaskChange], within: Box, clicks: Mapping[int, npt.NDArray[np.int64]]
    ) -> list[_Patch]:
        """Return the effect of overlapping changes in a box on the mask."""
        voxels, logits, weights = mix(piece)
        logits = (logits + np.maximum(0, 1 - weights) * self._starting_logits(voxels)) / np.maximum(1, weights)
        # A click in this box may belong to another piece, whose voxels lie around or between these.
        own = np.zeros(np.subtract(within[1], within[0]), dtype=bool)
        own[tuple((voxels - within[0]).T)] = True
        here = {label: clicked[own[tuple((clicked - within[0]).T)]] for label, clicked in clicks.items()}
        here = {label: clicked for label, clicked in here.items() if len(clicked)}
        start = self._start[tuple(voxels.T)]
        settled = settle(voxels, logits, start, here, coarseness=self.scan.coarseness)
        if not settled.changed.any():
            return []
        changed, taken = voxels[settled.changed], settled.taken
        box = self.scan.grid.reached((triple(changed.min(0)), triple(changed.max(0) + 1)))
        places, values = voxels[taken], settled.logits[:, taken]

        # The mode of this thread is not that of others.
        @torch.inference_mode()
        def restored(part: Box) -> _Patch:
            return self._restored(part, places, values, tuple(here))

        parts = self._parts(box, places)
        if len(parts) == 1:
            return [restored(parts[0])]
        with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as threads:
            return list(threads.map(restored, parts))

    def _starting_logits(self, voxels: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Return the network's logits ``(C, n)`` at voxels ``(n, 3)``, made to agree with the mask to start from."""
        index = tuple(voxels.T)
        logits = self.scan.logits.at(voxels)
        if self._start is not self.scan.network_classes:
            _agree(logits, self._start[index], self.scan.network_classes[index])
        return logits

    def _parts(self, box: Box, voxels: npt.NDArray[np.int64]) -> list[Box]:
        """Return the parts of a box of the scan that depend on some voxels of the network's grid.

        A correction is often a thin shell, and its box on a large scan as large as an organ.
        """
        grid = self.scan.grid
        if np.prod(np.subtract(box[1], box[0])) <= _PART_VOXELS:
            return [box]
        # As many voxels of the network's grid along each axis as have a part's voxels in the scan.
        finer = np.abs(np.linalg.inv(grid.to_network[:3, :3])).sum(0)
        side = np.maximum(1, np.rint(_PART_VOXELS ** (1 / 3) / finer)).astype(np.int64)
        cells = np.unique(voxels // side, axis=0) * side
        reached = [grid.reached((triple(cell), triple(np.minimum(cell + side, grid.network_size)))) for cell in cells]
        low = [triple(np.maximum(part[0], box[0])) for part in reached]
        high = [triple(np.minimum(part[1], box[1])) for part in reached]
        return [(a, b) for a, b in zip(low, high, strict=True) if all(np.less(a, b))]

    def _restored(
        self,
        box: Box,
        voxels: npt.NDArray[np.int64],
        logits: npt.NDArray[np.float32],
        clicked: Sequence[int],
    ) -> _Patch:
        """Restore new logits ``(C, n)`` to a box of the scan's grid, where voxels are won by clicked labels."""
        grid = self.scan.grid
        origin, stop = np.array(needed := grid.needed(box))
        before = self._starting_box(needed)
        after = before.clone()
        here = ((voxels >= origin) & (voxels < stop)).all(1)
        replaced = tuple((voxels[here] - origin).T)
        after[(slice(None), *replaced)] = torch.from_numpy(logits[:, here])
        among = np.zeros(before.shape[1:], dtype=bool)
        among[replaced] = True
        old, new = (
            grid.labels(values, box=box, origin=triple(origin), among=among).numpy() for values in (before, after)
        )
        # Interpolation between two classes may give a third, which was not clicked.
        won = np.zeros(new.shape, dtype=bool)
        for label in clicked:
            won |= new == label
        won &= new != old
        return _Patch(box, won, new)

    def _starting_box(self, box: Box) -> Tensor:
        logits = self.scan.logits.in_box(box)
        if self._start is not self.scan.network_classes:
            flat = logits.reshape(len(logits), -1).numpy()
            _agree(flat, self._start[slices(box)].ravel(), self.scan.network_classes[slices(box)].ravel())
            return torch.from_numpy(flat).reshape(logits.shape)
        return logits

    def _forget(self) -> None:
        held = sum(_nbytes(changes) for changes in self._windows.values())
        if held + self._other_bytes() > self._cache_bytes:
            # They are quick to recompute, and patches hold changes too.
            self._patches.clear()
            self._surroundings.clear()
        while held > self._cache_bytes:
            _, oldest = self._windows.popitem(last=False)
            held -= _nbytes(oldest)

    def _other_bytes(self) -> int:
        around = sum(values.nbytes for known in self._surroundings.values() for values in known.values())
        return around + sum(patch.nbytes for _, patches in self._patches.values() for patch in patches)

    def _checked(self, mask: npt.NDArray[np.integer]) -> npt.NDArray[np.uint8]:
        if mask.shape != self.scan.labels.shape:
            raise ValueError(f"mask: got {mask.shape} voxels, expected the scan's {self.scan.labels.shape}")
        if mask.min() < 0 or mask.max() > self.n_labels:
            raise ValueError(f"mask: got values {mask.min()} to {mask.max()}, expected 0 to {self.n_labels}")
        return np.array(mask, dtype=np.uint8)

    def _checked_points(self, points: ClickPoints) -> dict[int, npt.NDArray[np.int64]]:
        size = self.scan.grid.size
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


def _on_network_grid(mask: npt.NDArray[np.uint8], scan: OpenScan, prep: Preprocessing) -> npt.NDArray[np.uint8]:
    volume = MetaTensor(torch.from_numpy(mask)[None].float(), affine=torch.as_tensor(scan.grid.affine))
    for transform in label_grid_transforms(prep, "label"):
        volume = cast(MetaTensor, transform({"label": volume})["label"])
    return volume[0].to(torch.uint8).numpy()


def _agree(logits: npt.NDArray[np.float32], wanted: npt.NDArray[np.uint8], found: npt.NDArray[np.uint8]) -> None:
    """Raise the logits ``(C, n)``, in place, of classes that the mask has and the network did not find."""
    (differ,) = np.nonzero(wanted != found)
    logits[wanted[differ], differ] = logits[:, differ].max(0, initial=-np.inf) + _MARGIN


def _nbytes(changes: Sequence[MaskChange]) -> int:
    return sum(change.nbytes for change in changes)


def _inside(voxels: npt.NDArray[np.int64], box: Box) -> npt.NDArray[np.int64]:
    return voxels[((voxels >= box[0]) & (voxels < box[1])).all(1)]
