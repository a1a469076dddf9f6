"""A scan's voxels on the network's grid, and values back from there."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch
from monai.data import MetaTensor
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Box", "Index", "Logits", "ScanGrid", "Voxels", "bounding_box", "grown", "highest", "slices", "triple"]

Index: TypeAlias = tuple[int, int, int]
# The first voxel of a box, and the one after its last along every axis.
Box: TypeAlias = tuple[Index, Index]
# Indices of voxels, (n, 3).
Voxels: TypeAlias = npt.NDArray[np.int64]
# Logits on the network's grid, (C, x, y, z), or at voxels, (C, n).
Logits: TypeAlias = npt.NDArray[np.float32]

# Coordinates for a whole volume would take three float32 per voxel and class: work in slabs.
_SLAB_VOXELS = 1_000_000
# Grids are the same if their voxels lie less than this part of a voxel apart.
_SAME_VOXEL = 1e-3


@dataclass(frozen=True)
class ScanGrid:
    """The grid of a scan's file, relative to the network's.

    Args:
        size: voxels of the file.
        affine: from its voxels to RAS millimetres, ``(4, 4)``.
        network_size: voxels of the network's grid.
        to_network: from a voxel index of the file to one of the network's grid, ``(4, 4)``.
    """

    size: Index
    affine: npt.NDArray[np.float64]
    network_size: Index
    to_network: npt.NDArray[np.float64]

    @classmethod
    def of(cls, image: MetaTensor) -> ScanGrid:
        """Return the grid of the file from which ``inference_transforms`` made an image ``(1, x, y, z)``."""
        affine = np.asarray(image.meta["original_affine"], dtype=float)
        return cls(
            size=triple(image.meta["spatial_shape"]),
            affine=affine,
            network_size=triple(image.shape[1:]),
            to_network=np.linalg.inv(np.asarray(image.affine, dtype=float)) @ affine,
        )

    @cached_property
    def _from_network(self) -> npt.NDArray[np.float64]:
        return np.linalg.inv(self.to_network)

    def nearest(self, voxels: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Return the voxels of the network's grid nearest to voxels ``(n, 3)`` of the file."""
        index = np.asarray(voxels, dtype=float).reshape(-1, 3)
        moved = index @ self.to_network[:3, :3].T + self.to_network[:3, 3]
        return np.clip(np.rint(moved), 0, np.array(self.network_size) - 1).astype(np.int64)

    def at_network(self, values: npt.NDArray[np.uint8], part: tuple[slice, slice, slice]) -> npt.NDArray[np.uint8]:
        """Return the file's values ``(X, Y, Z)`` nearest to the voxels of a part of the network's grid."""
        # The axes of the grids are parallel.
        order = np.abs(self._from_network[:3, :3]).argmax(0)
        nearest = []
        for axis, own in enumerate(order):
            along = (
                self._from_network[own, axis] * np.arange(part[axis].start, part[axis].stop)
                + self._from_network[own, 3]
            )
            nearest.append(np.clip(np.rint(along), 0, self.size[own] - 1).astype(np.int64))
        return values.transpose(order)[np.ix_(*nearest)]

    def reached(self, box: Box) -> Box:
        """Return the box of the file whose interpolated values depend on a box of the network's grid."""
        # One voxel for interpolation; at the border one more, for what lies beyond it.
        low = [start - (2 if start == 0 else 1) for start in box[0]]
        high = [stop + (stop == n) for stop, n in zip(box[1], self.network_size, strict=True)]
        return _moved_box((low, high), self._from_network, self.size, margin=0)

    def needed(self, box: Box) -> Box:
        """Return the box of the network's grid that interpolation in a box of the file reads."""
        last = [stop - 1 for stop in box[1]]
        return _moved_box((box[0], last), self.to_network, self.network_size, margin=1)

    def interpolate(
        self,
        values: Tensor,
        finish: Callable[[Tensor], Tensor],
        *,
        box: Box | None = None,
        origin: Sequence[int] = (0, 0, 0),
    ) -> Tensor:
        """Interpolate values ``(C, x, y, z)`` linearly at the file's voxels; return uint8 ``(X, Y, Z)`` on the CPU.

        Args:
            values: any floating type; on any device.
            finish: from interpolated values ``(C, n, Y, Z)``, float32, to ``(n, Y, Z)`` in 0..255; applied to slabs.
            box: the part of the file's grid that is wanted; None for all of it.
            origin: the voxel of the network's grid at which the values begin.
        """
        start, stop = box or ((0, 0, 0), self.size)
        # On the values' device, so that a GPU makes the host wait once.
        size = [b - a for a, b in zip(start, stop, strict=True)]
        found = torch.empty(size, dtype=torch.uint8, device=values.device)
        step = max(1, _SLAB_VOXELS // max(1, found[0].numel()))
        sample = (
            self._same_voxels(values, origin)
            or self._axis_by_axis(values, origin)
            or self._between_voxels(values, origin)
        )
        for done in range(0, len(found), step):
            part = ((start[0] + done, *start[1:]), (min(start[0] + done + step, stop[0]), *stop[1:]))
            found[done : done + step] = finish(sample(part).float()).to(torch.uint8)
        return found.cpu()

    def _same_voxels(self, values: Tensor, origin: Sequence[int]) -> Callable[[Box], Tensor] | None:
        """Return a reader of values in a box if the grids differ only in order and direction of axes; exact."""
        matrix, shift = np.rint(self.to_network[:3, :3]), np.rint(self.to_network[:3, 3])
        off = np.abs(self.to_network[:3, :3] - matrix) @ np.array(self.size) + np.abs(self.to_network[:3, 3] - shift)
        if off.max() > _SAME_VOXEL or not np.array_equal(np.abs(matrix).sum(0), np.ones(3)):
            return None
        order = np.abs(matrix).argmax(1)  # the file's axis along each axis of the network's grid

        def read(box: Box) -> Tensor:
            part = values
            for axis, (own, length) in enumerate(zip(order, values.shape[1:], strict=True)):
                along = int(matrix[axis, own]) * torch.arange(box[0][own], box[1][own])
                index = (along + int(shift[axis] - origin[axis])).clamp(0, length - 1)
                part = part.index_select(axis + 1, index.to(values.device))
            return part.permute(0, *(int(axis) + 1 for axis in np.argsort(order)))

        return read

    def _axis_by_axis(self, values: Tensor, origin: Sequence[int]) -> Callable[[Box], Tensor] | None:
        """Return a linear interpolator of values in a box for a CPU and parallel axes, several times as fast."""
        if values.is_cuda or (own := self._own_axes) is None:
            return None
        source = values.float().permute(0, *(axis + 1 for axis in own))

        def read(box: Box) -> Tensor:
            first, second, third = self._places(own, box, origin, source.shape[1:])
            # A slab needs few planes, so its own axis comes last.
            start = int(first.below.min())
            part = source[:, start : int(first.below.max()) + 2]
            part = third.between(second.between(part, 2), 3)
            return _Places(first.below - start, first.share).between(part, 1)

        return read

    @cached_property
    def _own_axes(self) -> tuple[int, ...] | None:
        """Return the network's axis along each of the file's, or None if the axes of the grids are not parallel."""
        matrix = np.abs(self.to_network[:3, :3])
        order = matrix.argmax(1)
        turned = np.where(np.arange(3) == order[:, None], 0.0, matrix) @ np.array(self.size)
        if turned.max() > _SAME_VOXEL or len(set(order.tolist())) < 3:
            return None
        return triple(np.argsort(order))

    def _places(
        self, own: Sequence[int], box: Box, origin: Sequence[int], shape: Sequence[int]
    ) -> tuple[_Places, _Places, _Places]:
        """Return where the file's voxels of a box lie, along each of its axes, between values that begin at a voxel.

        A voxel has the same place in every box, bit for bit.
        """
        places = []
        for axis, along in enumerate(own):
            last = self.network_size[along] - 1
            at = self.to_network[along, axis] * np.arange(box[0][axis], box[1][axis]) + self.to_network[along, 3]
            at = np.clip(at, 0, last)
            below = np.minimum(at.astype(np.int64), max(last - 1, 0))
            places.append(_Places(np.clip(below - origin[along], 0, shape[axis] - 1), (at - below).astype(np.float32)))
        x, y, z = places
        return x, y, z

    def _between_voxels(self, values: Tensor, origin: Sequence[int]) -> Callable[[Box], Tensor]:
        """Return a linear interpolator of values in a box."""
        device, source = values.device, values.float()[None]
        # From a voxel index of the scan to grid_sample's -1..1 over the values; its last coordinate comes first.
        extent = np.array([max(n - 1, 1) for n in values.shape[1:]], dtype=float)
        matrix = torch.tensor(2 * self.to_network[:3, :3] / extent[:, None], dtype=torch.float32, device=device)
        shift = 2 * (self.to_network[:3, 3] - np.asarray(origin)) / extent - 1
        offset = torch.tensor(shift, dtype=torch.float32, device=device)

        def read(box: Box) -> Tensor:
            first, rows, columns = (
                torch.arange(*ends, dtype=torch.float32, device=device) for ends in zip(*box, strict=True)
            )
            plane = rows[:, None, None] * matrix[:, 1] + columns[None, :, None] * matrix[:, 2] + offset
            grid = (first[:, None, None, None] * matrix[:, 0] + plane).flip(-1)
            return F.grid_sample(source, grid[None], mode="bilinear", padding_mode="border", align_corners=True)[0]

        return read

    def labels(
        self,
        logits: Tensor,
        *,
        box: Box | None = None,
        origin: Sequence[int] = (0, 0, 0),
        among: npt.NDArray[np.bool_] | None = None,
    ) -> Tensor:
        """Return the class of the highest logit ``(C, x, y, z)`` at the file's voxels; arguments as ``interpolate``.

        Logits are interpolated first and compared afterwards, so that edges stay smooth on a scan finer than the
        network's spacing. ``among`` are the voxels ``(x, y, z)`` of which the effect is wanted: on a CPU, what lies
        between others only is not interpolated, but has the class of one of them.
        """
        kernel = None if logits.is_cuda or self._own_axes is None else _label_kernel()
        if kernel is None or self._own_axes is None or self._same_voxels(logits, origin) is not None:
            return self.interpolate(logits, highest, box=box, origin=origin)
        return self._labels_at_edges(kernel, self._own_axes, logits, box or ((0, 0, 0), self.size), origin, among)

    def _labels_at_edges(
        self,
        kernel: Callable[..., None],
        own: Sequence[int],
        logits: Tensor,
        box: Box,
        origin: Sequence[int],
        among: npt.NDArray[np.bool_] | None,
    ) -> Tensor:
        source = logits.float().permute(0, *(axis + 1 for axis in own))
        # Plane by plane: the indices of a whole slab take eight bytes each.
        classes = torch.stack([highest(plane).to(torch.uint8) for plane in source.unbind(1)]).numpy()
        wanted = np.broadcast_to(np.True_, classes.shape) if among is None else among.transpose(own)
        places = self._places(own, box, origin, classes.shape)
        below, share = tuple(place.below for place in places), tuple(place.share for place in places)
        found = np.empty([b - a for a, b in zip(*box, strict=True)], dtype=np.uint8)
        kernel(source.numpy(), classes, wanted, below, share, found)
        return torch.from_numpy(found)


@dataclass(frozen=True)
class _Places:
    """Places along an axis: beyond the values number ``below``, by a ``share`` (0..1) of the way to the next."""

    below: npt.NDArray[np.int64]
    share: npt.NDArray[np.float32]

    def between(self, values: Tensor, axis: int) -> Tensor:
        """Return values at all places, interpolated along an axis."""
        index = torch.from_numpy(self.below)
        share = torch.from_numpy(self.share).reshape([-1 if a == axis else 1 for a in range(values.ndim)])
        low = values.index_select(axis, index)
        return low.lerp_(values.index_select(axis, (index + 1).clamp(max=values.shape[axis] - 1)), share)


@cache
def _label_kernel() -> Callable[..., None] | None:
    """Return the compiled interpolation of labels, or None where Numba cannot be loaded: it only saves time."""
    try:
        module = importlib.import_module("deformux.data.label_interpolation")
    except Exception:  # a broken Numba fails in many ways: wrong NumPy, no LLVM library, no cache folder
        return None
    return cast(Callable[..., None], module.interpolate_labels)


def highest(values: Tensor) -> Tensor:
    """Return the index ``(x, y, z)`` of the highest of values ``(C, x, y, z)``, the first on a tie, as argmax does."""
    # On a CPU max takes a fifth of argmax's time along the outermost axis; on a GPU it may name any on a tie.
    return values.argmax(0) if values.is_cuda else values.max(0).indices


def slices(box: Box) -> tuple[slice, slice, slice]:
    """Return a box as an index of an array."""
    (a, b, c), (d, e, f) = box
    return slice(a, d), slice(b, e), slice(c, f)


def grown(box: Box, margin: int, size: Sequence[int]) -> Box:
    """Return a box with a margin on all sides, within the volume."""
    start, stop = box
    return triple(max(0, a - margin) for a in start), triple(
        min(n, b + margin) for b, n in zip(stop, size, strict=True)
    )


def bounding_box(mask: npt.NDArray[np.bool_]) -> Box | None:
    """Return the smallest box around the true voxels ``(x, y, z)``, or None if there are none."""
    start, stop = [], []
    for axis in range(3):
        found = np.flatnonzero(mask.any(axis=tuple(other for other in range(3) if other != axis)))
        if not len(found):
            return None
        start.append(int(found[0]))
        stop.append(int(found[-1]) + 1)
    return triple(start), triple(stop)


def _moved_box(
    corners: tuple[Sequence[int], Sequence[int]], matrix: npt.NDArray[np.float64], size: Sequence[int], *, margin: int
) -> Box:
    """Map a box by an affine; return the box of whole voxels around it, with a margin, inside a volume."""
    index = np.array(np.meshgrid(*zip(*corners, strict=True), indexing="ij"), dtype=float).reshape(3, -1)
    moved = matrix[:3, :3] @ index + matrix[:3, 3:]
    # Rounding must not lose a voxel that lies exactly on the box.
    low = np.floor(moved.min(axis=1) + 1e-4).astype(int) - margin
    high = np.ceil(moved.max(axis=1) - 1e-4).astype(int) + margin + 1
    start = np.clip(low, 0, np.array(size) - 1)
    return triple(start), triple(np.maximum(np.clip(high, 0, size), start + 1))


def triple(values: Iterable[Any]) -> Index:
    """Return three whole numbers, such as an index or a size."""
    x, y, z = (int(value) for value in values)
    return x, y, z
