"""A fine grid to paint synthetic anatomy on, and smooth curves and fields to paint with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.interpolate import make_interp_spline

__all__ = ["SUPERSAMPLING", "BoolGrid", "Canvas", "FloatGrid", "PointsMm", "moved", "smooth_curve", "smooth_field"]

FloatGrid: TypeAlias = npt.NDArray[np.float32]
BoolGrid: TypeAlias = npt.NDArray[np.bool_]
# Points (P, 3) in millimetres, or one number for each of them.
PointsMm: TypeAlias = npt.NDArray[np.float64]

# Voxels of the canvas along each axis of an output voxel.
SUPERSAMPLING = 2


class Canvas:
    """A fine grid to paint on: HU and label of each sub-voxel, and its place in the patient's own, undeformed frame."""

    def __init__(
        self, rng: np.random.Generator, shape: tuple[int, int, int], spacing_mm: FloatGrid, wobble_mm: float
    ) -> None:
        self.fine_shape = tuple(n * SUPERSAMPLING for n in shape)
        self.step_mm = spacing_mm / SUPERSAMPLING
        self.first_mm = -(np.array(self.fine_shape, np.float32) - 1) / 2 * self.step_mm
        # random nodes about 60 mm apart, interpolated smoothly: neighbouring tissue moves together
        nodes = np.ceil(np.array(self.fine_shape) * self.step_mm / 60).astype(int) + 2
        self.shift_mm = [smooth_field(rng, nodes, self.fine_shape, wobble_mm) for _ in range(3)]
        axes = [
            self.first_mm[i] + self.step_mm[i] * np.arange(n, dtype=np.float32) for i, n in enumerate(self.fine_shape)
        ]
        grid = np.meshgrid(*axes, indexing="ij", sparse=True)
        self.x, self.y, self.z = (g + s for g, s in zip(grid, self.shift_mm, strict=True))
        self.hu: FloatGrid = np.full(self.fine_shape, -1000, np.float32)
        self.label = np.zeros(self.fine_shape, np.uint8)

    def paint(self, mask: BoolGrid, hu: float, label: int = 0) -> None:
        """Set HU and label where a mask is true."""
        self.hu[mask] = hu
        self.label[mask] = label

    def ellipsoid(self, centre: npt.ArrayLike, radii: npt.ArrayLike, tilt_deg: float = 0.0) -> FloatGrid:
        """Return the approximate signed distance (mm, negative inside) to an ellipsoid tilted in the coronal plane."""
        (cx, cy, cz), radii = np.asarray(centre, np.float32), np.asarray(radii, np.float32)
        dx, dy, dz = self.x - cx, self.y - cy, self.z - cz
        if tilt_deg:
            c, s = float(np.cos(np.deg2rad(tilt_deg))), float(np.sin(np.deg2rad(tilt_deg)))
            dx, dz = c * dx + s * dz, c * dz - s * dx
        norm = np.sqrt((dx / radii[0]) ** 2 + (dy / radii[1]) ** 2 + (dz / radii[2]) ** 2)
        return (norm - 1) * radii.min()

    def tube(
        self, points: PointsMm, radius_mm: PointsMm, hu: float, label: int = 0, within: BoolGrid | None = None
    ) -> None:
        """Paint balls along ``points`` (P, 3) in mm, only where ``within`` is true."""
        for centre, radius in zip(self.to_index(points), radius_mm, strict=True):
            reach = radius / self.step_mm
            low = np.maximum(np.floor(centre - reach), 0).astype(int)
            high = np.minimum(np.ceil(centre + reach) + 1, self.fine_shape).astype(int)
            if np.any(low >= high):
                continue
            box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
            offsets = np.ogrid[box]
            squares = [((o - c) / r) ** 2 for o, c, r in zip(offsets, centre, reach, strict=True)]
            ball = squares[0] + squares[1] + squares[2] <= 1
            if within is not None:
                ball &= within[box]
            self.hu[box][ball] = hu
            self.label[box][ball] = label

    def to_index(self, points: PointsMm) -> PointsMm:
        """Return the fine-grid indices (P, 3) of points given in the patient's frame."""
        index = (points - self.first_mm) / self.step_mm
        for _ in range(2):  # a smooth deformation is inverted well by two fixed-point steps
            shift = [ndimage.map_coordinates(s, index.T, order=1, mode="nearest") for s in self.shift_mm]
            index = (points - np.stack(shift, 1) - self.first_mm) / self.step_mm
        return index


def smooth_field(rng: np.random.Generator, nodes: Sequence[int], shape: tuple[int, ...], sd: float) -> FloatGrid:
    """Return a random field of ``shape``, cubic between ``nodes`` random values per axis."""
    field = rng.normal(0, sd, nodes)
    for n in shape:  # one small dense matrix per axis: ten times faster than zooming the volume
        basis = ndimage.zoom(np.eye(field.shape[0]), (1, n / field.shape[0]), order=3, grid_mode=True, mode="nearest")
        field = np.moveaxis(np.tensordot(field, basis, (0, 0)), -1, 0)
        field = np.moveaxis(field, 0, -1)
    return np.ascontiguousarray(field, np.float32)


def moved(points: PointsMm, *by_mm: float) -> PointsMm:
    """Return points shifted by a vector in mm."""
    return np.asarray(points + np.array(by_mm))


def smooth_curve(
    points: Sequence[npt.ArrayLike] | PointsMm, radii: Sequence[float], step_mm: float = 1.2
) -> tuple[PointsMm, PointsMm]:
    """Return a smooth curve through control points: points (P, 3) every ``step_mm`` and radii (P,), in mm."""
    control = np.asarray(points, np.float64)
    chord = np.r_[0, np.cumsum(np.linalg.norm(np.diff(control, axis=0), axis=1))]
    t = np.linspace(0, chord[-1], max(2, int(chord[-1] / step_mm)))
    curve = make_interp_spline(chord, control, k=min(3, len(control) - 1))(t)
    return curve, np.interp(t, np.linspace(0, chord[-1], len(radii)), radii)
