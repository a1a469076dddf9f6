"""Synthetic abdominal CT volumes with exact labels: a phantom cohort for demos and tests.

Every patient is drawn from one seed: body habitus, organ position, size and shape (a smooth random
deformation of everything), enhancement per organ, a branching arterial tree, noise and voxel grid.
Organs are implicit shapes in millimetres (x to the patient's right, y anterior, z superior), painted on
a grid twice as fine as the output and averaged down, so that borders show partial volume as in a scanner.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.interpolate import make_interp_spline

__all__ = ["LABELS", "SyntheticVolume", "synthetic_volume", "write_cohort"]

LABELS = ("liver", "spleen", "kidneys", "vessels")
"""Names of the label values 1..4; all other structures are unlabelled distractors."""

Array = npt.NDArray[np.float32]
Labels = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
Points = npt.NDArray[np.float64]
Vector = npt.ArrayLike

_SUPERSAMPLING = 2
_ORIENTATIONS = ("RAS", "LPS", "LAS", "RAI")  # scanners, converters and archives differ: so does the cohort
_LIVER, _SPLEEN, _KIDNEYS, _VESSELS = (LABELS.index(name) + 1 for name in ("liver", "spleen", "kidneys", "vessels"))


@dataclass(frozen=True)
class SyntheticVolume:
    """One patient: `image` (X, Y, Z) int16 in HU, `label` (X, Y, Z) uint8 in 0..4, their 4x4 `affine` to RAS in mm."""

    image: npt.NDArray[np.int16]
    label: Labels
    affine: Points


class _Canvas:
    """A fine grid to paint on: HU and label per sub-voxel, and where it lies in the patient's own, undeformed frame."""

    def __init__(
        self, rng: np.random.Generator, shape: tuple[int, int, int], spacing_mm: Array, wobble_mm: float
    ) -> None:
        self.fine_shape = tuple(n * _SUPERSAMPLING for n in shape)
        self.step_mm = spacing_mm / _SUPERSAMPLING
        self.first_mm = -(np.array(self.fine_shape, np.float32) - 1) / 2 * self.step_mm
        # random nodes about 60 mm apart, interpolated smoothly: neighbouring tissue moves together
        nodes = np.ceil(np.array(self.fine_shape) * self.step_mm / 60).astype(int) + 2
        self.shift_mm = [_smooth_field(rng, nodes, self.fine_shape, wobble_mm) for _ in range(3)]
        axes = [
            self.first_mm[i] + self.step_mm[i] * np.arange(n, dtype=np.float32) for i, n in enumerate(self.fine_shape)
        ]
        grid = np.meshgrid(*axes, indexing="ij", sparse=True)
        self.x, self.y, self.z = (g + s for g, s in zip(grid, self.shift_mm, strict=True))
        self.hu: Array = np.full(self.fine_shape, -1000, np.float32)
        self.label = np.zeros(self.fine_shape, np.uint8)

    def paint(self, mask: Mask, hu: float, label: int = 0) -> None:
        self.hu[mask] = hu
        self.label[mask] = label

    def ellipsoid(self, centre: Vector, radii: Vector, tilt_deg: float = 0.0) -> Array:
        """Return the approximate signed distance (mm, negative inside) to an ellipsoid tilted in the coronal plane."""
        (cx, cy, cz), radii = np.asarray(centre, np.float32), np.asarray(radii, np.float32)
        dx, dy, dz = self.x - cx, self.y - cy, self.z - cz
        if tilt_deg:
            c, s = float(np.cos(np.deg2rad(tilt_deg))), float(np.sin(np.deg2rad(tilt_deg)))
            dx, dz = c * dx + s * dz, c * dz - s * dx
        norm = np.sqrt((dx / radii[0]) ** 2 + (dy / radii[1]) ** 2 + (dz / radii[2]) ** 2)
        return (norm - 1) * radii.min()

    def tube(self, points: Points, radius_mm: Points, hu: float, label: int = 0, within: Mask | None = None) -> None:
        """Paint balls along `points` (P, 3) in mm, only where `within` is true."""
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

    def to_index(self, points: Points) -> Points:
        """Return the fine-grid indices (P, 3) of points given in the patient's frame."""
        index = (points - self.first_mm) / self.step_mm
        for _ in range(2):  # a smooth deformation is inverted well by two fixed-point steps
            moved = [ndimage.map_coordinates(s, index.T, order=1, mode="nearest") for s in self.shift_mm]
            index = (points - np.stack(moved, 1) - self.first_mm) / self.step_mm
        return index


def _smooth_field(rng: np.random.Generator, nodes: Sequence[int], shape: tuple[int, ...], sd: float) -> Array:
    """Return a random field of `shape`, cubic between `nodes` random values per axis."""
    field = rng.normal(0, sd, nodes)
    for n in shape:  # one small dense matrix per axis: ten times faster than zooming the volume
        basis = ndimage.zoom(np.eye(field.shape[0]), (1, n / field.shape[0]), order=3, grid_mode=True, mode="nearest")
        field = np.moveaxis(np.tensordot(field, basis, (0, 0)), -1, 0)
        field = np.moveaxis(field, 0, -1)
    return np.ascontiguousarray(field, np.float32)


def _move(points: Points, *by_mm: float) -> Points:
    return np.asarray(points + np.array(by_mm))


def _curve(points: Sequence[Vector] | Points, radii: Sequence[float], step_mm: float = 1.2) -> tuple[Points, Points]:
    """Return a smooth curve through control points: points (P, 3) every `step_mm` and radii (P,), in mm."""
    control = np.asarray(points, np.float64)
    chord = np.r_[0, np.cumsum(np.linalg.norm(np.diff(control, axis=0), axis=1))]
    t = np.linspace(0, chord[-1], max(2, int(chord[-1] / step_mm)))
    curve = make_interp_spline(chord, control, k=min(3, len(control) - 1))(t)
    return curve, np.interp(t, np.linspace(0, chord[-1], len(radii)), radii)


def synthetic_volume(seed: int, *, voxel_scale: float = 1.0) -> SyntheticVolume:
    """Draw one patient; the same seed gives the same volume.

    `voxel_scale` > 1 makes every voxel larger and the grid smaller (for quick tests). Raises ValueError below 0.5.
    """
    if not voxel_scale >= 0.5:
        raise ValueError(f"voxel_scale: got {voxel_scale}, expected at least 0.5")
    rng = np.random.default_rng([seed, 2310])
    size = rng.uniform(0.92, 1.07)
    fat_mm = rng.uniform(6, 26)
    half_mm = np.array([rng.uniform(122, 134), rng.uniform(84, 95)]) * size  # muscle wall, without the fat around it
    spacing = np.array([0.0, 0.0, rng.choice([4.5, 5.0, 5.5])], np.float32)
    columns = int(rng.choice([80, 84, 88]))
    spacing[:2] = 2 * (half_mm[0] + fat_mm + 10) / columns  # the operator fits the field of view to the patient
    rows = int(np.ceil(2 * (half_mm[1] + fat_mm + 12) / spacing[1]))
    slices = round(rng.uniform(176, 186) / float(spacing[2]))
    shape = tuple(round(n / voxel_scale) for n in (columns, rows, slices))
    spacing = (spacing * voxel_scale).astype(np.float32)

    canvas = _Canvas(rng, (shape[0], shape[1], shape[2]), spacing, wobble_mm=3.5)
    wall_mm = _paint_trunk(canvas, rng, half_mm, fat_mm, size)
    cavity = wall_mm < -10
    _paint_gut(canvas, rng, size, cavity)
    _paint_solid_organs(canvas, rng, size, cavity)
    centreline = _paint_vessels(canvas, rng, size)

    image = _scan(canvas, rng, spacing)
    label = _label_on_voxels(canvas, shape, centreline)
    return _in_scanner_orientation(image, label, spacing, rng)


def _paint_trunk(canvas: _Canvas, rng: np.random.Generator, half_mm: Array, fat_mm: float, size: float) -> Array:
    """Paint body outline, fat, muscle, bones, heart and lung bases; return the distance (mm) to the muscle wall."""
    x, y, z = canvas.x, canvas.y, canvas.z
    radius = (np.abs(x / half_mm[0]) ** 2.5 + np.abs(y / half_mm[1]) ** 2.5) ** np.float32(1 / 2.5)
    wall_mm = (radius - 1) * np.float32(half_mm[1])
    fat, muscle = rng.normal(-103, 5), rng.normal(55, 5)
    canvas.paint(wall_mm < fat_mm, rng.normal(20, 5))  # skin
    canvas.paint(wall_mm < fat_mm - 2, fat)
    canvas.paint(wall_mm < 0, muscle)
    canvas.paint(wall_mm < -10, fat)
    # ribs run down towards the front and end at the costal margin
    along = z - 0.45 * y + rng.uniform(-13, 13)
    rib = np.abs(np.mod(along, 27 * size) - 13.5 * size)
    in_wall = (np.abs(wall_mm + 5) < 3.6) & (z > -45 + 0.55 * y)
    canvas.paint(in_wall & (rib < 5.5), 420)
    canvas.paint(in_wall & (rib < 2.5) & (np.abs(wall_mm + 5) < 2), 220)
    chest_wall = np.hypot(x, np.minimum(y + 46 * size, 0) * 0.6 + np.maximum(y + 46 * size, 0))  # spine and its muscles
    for side, height in ((1, 55), (-1, 48)):
        dome = canvas.ellipsoid((side * 62 * size, 5, -35), (74 * size, 95 * size, (height + 38) * size))
        lung = (wall_mm < -11) & (dome > 3) & (z > 15) & (side * x > 9 + 0.1 * (y + 30)) & (chest_wall > 28 * size)
        canvas.paint(lung, rng.normal(-840, 20))
    heart = _heart(canvas, size)
    canvas.paint((heart < 0) & (wall_mm < -12), 60)
    canvas.paint((heart < -9) & (wall_mm < -12), rng.normal(165, 10))
    for side in (-1, 1):
        back = canvas.ellipsoid((side * 30 * size, -72 * size, 0), (24 * size, 15 * size, 900))
        canvas.paint((back < 0) & (wall_mm < 0), muscle + 3)
        psoas_x = side * (36 * size - 0.12 * z)
        psoas = np.hypot((x - psoas_x) / 1.0, (y + 42 * size) / 1.25) - (13 - 0.11 * z) * size
        canvas.paint((psoas < 0) & (z < 25), muscle + 2)
    _paint_spine(canvas, rng, size)
    return wall_mm


def _heart(canvas: _Canvas, size: float) -> Array:
    return canvas.ellipsoid((-18 * size, 30, 100), (46 * size, 42 * size, 44))


def _paint_spine(canvas: _Canvas, rng: np.random.Generator, size: float) -> None:
    x, y, z = canvas.x, canvas.y, canvas.z
    spine_y = -46 * size
    height = 34 * size
    phase = np.abs(np.mod(z + rng.uniform(0, height), height) - height / 2)  # 0 mid vertebra, height / 2 mid disc
    body = np.hypot(x / 1.2, y - spine_y) - (16 + 1.5 * phase / height) * size
    canvas.paint(body < 0, rng.normal(85, 5))
    canvas.paint((body < 0) & (phase < height / 2 - 4), 430)
    canvas.paint((body < -2.5) & (phase < height / 2 - 6.5), rng.normal(190, 25))
    arch = np.hypot(x, y - spine_y + 25 * size)
    spinous = (np.abs(x) < 3.5) & (np.abs(y - spine_y + 42 * size) < 13) & (phase < 9)
    transverse = (np.abs(x) < 36 * size) & (np.abs(y - spine_y + 22 * size) < 4.5) & (phase < 6)
    canvas.paint(((arch < 14 * size) & (phase < 12)) | spinous | transverse, 380)
    canvas.paint(arch < 9.5 * size, 25)  # canal


def _paint_gut(canvas: _Canvas, rng: np.random.Generator, size: float, cavity: Mask) -> None:
    """Paint stomach, pancreas, small bowel and colon: soft distractors, some filled with fluid or gas."""
    wall = rng.normal(55, 5)
    for side in (-1, 1):  # ascending and descending colon: gas and stool
        heights = (-105, -80, -52, -40 - 5 * side)
        course = [(side * rng.uniform(82, 92) * size, rng.uniform(-20, 10) * size, h) for h in heights]
        curve, radius = _curve(course, [17, 14, 16, 13])
        canvas.tube(curve, radius, wall, within=cavity)
        canvas.tube(curve, radius - 3.5, rng.choice([-700, 10, 30]), within=cavity)
    for _ in range(7):  # small bowel: loops in the lower front
        centre = np.array([rng.uniform(-60, 60), rng.uniform(10, 55), rng.uniform(-85, -38)]) * size
        points = centre + rng.normal(0, 20, (5, 3)) * (1, 0.8, 0.7)
        curve, radius = _curve(points, [9, 11, 9])
        canvas.tube(curve, radius, wall + 15, within=cavity)
        canvas.tube(curve, radius - 3, rng.normal(18, 8), within=cavity)
    fundus = np.array([-52, 5, 48]) * size + rng.normal(0, 5, 3)
    curve, radius = _curve([fundus, (-58, 32, 18), (-30, 50, -12), (6, 46, -10)], [27, 24, 17, 11])
    canvas.tube(curve, radius, wall + 10, within=cavity)
    canvas.tube(curve, radius - 4, rng.normal(15, 8), within=cavity)
    top = slice(len(curve) // 2)
    canvas.tube(_move(curve[top], 0, 9, 0), radius[top] * 0.45, -900, within=cavity)  # gas rises
    curve, radius = _curve([(32, 18, -22), (8, 16, -2), (-30, 4, 8), (-72, -18, 22)], [13, 9, 9, 7])
    canvas.tube(curve * size, radius, rng.normal(95, 8), within=cavity)


def _paint_solid_organs(canvas: _Canvas, rng: np.random.Generator, size: float, cavity: Mask) -> None:
    """Paint inferior vena cava, liver with its veins, gallbladder, spleen and kidneys."""
    ivc, ivc_radius = _curve([(19, -20, -110), (18, -20, -30), (22, -12, 30), (20, -5, 70)], [11, 11, 13, 14])
    venous = rng.normal(145, 10)
    canvas.tube(ivc * size, ivc_radius, venous)
    _paint_liver(canvas, rng, size, cavity, venous)

    centre = np.array([-86, -30, 30]) * size + rng.normal(0, 4, 3)
    length = rng.uniform(44, 58)
    outer = canvas.ellipsoid(centre, (rng.uniform(31, 38), 46 * size, length), rng.uniform(-20, 0))
    hollow = canvas.ellipsoid(_move(centre, 44 * size, 14, 0), (26, 34, length + 5))
    spleen = (outer < 0) & (hollow > 0) & cavity
    canvas.paint(spleen, rng.normal(125, 9), _SPLEEN)

    cortex, medulla = rng.normal(190, 12), rng.normal(150, 10)
    for side, drop in ((1, 46), (-1, 36)):
        centre = np.array([side * 56, -44, -drop]) * size + rng.normal(0, 4, 3)
        radii = np.array([rng.uniform(25, 30), rng.uniform(23, 28), rng.uniform(48, 58)]) * size
        kidney = canvas.ellipsoid(centre, radii, tilt_deg=-side * rng.uniform(8, 20))
        around = (kidney < 8) & cavity & (canvas.label != _SPLEEN)  # the fatty capsule keeps neighbours apart
        canvas.paint(around & (kidney >= 0) & (canvas.hu > -300) & (canvas.hu < 150) & (kidney < 4), -105)
        sinus = canvas.ellipsoid(_move(centre, -side * 14 * size, 0, 0), radii * (0.62, 0.42, 0.5))
        canvas.paint((kidney < 0) & (sinus > 0) & cavity, cortex, _KIDNEYS)
        canvas.paint((kidney < -8) & (sinus > 0) & (canvas.label == _KIDNEYS), medulla, _KIDNEYS)
        canvas.paint((kidney < 0) & (sinus <= 0), -85)
        if rng.random() < 0.3:  # a cyst belongs to the organ, as annotators draw it
            spot = _move(centre, side * 20 * size, 0, rng.uniform(-25, 25))
            cyst = canvas.ellipsoid(spot, [rng.uniform(5, 9)] * 3) < 0
            canvas.paint(cyst & (canvas.label == _KIDNEYS), 8, _KIDNEYS)


def _paint_liver(canvas: _Canvas, rng: np.random.Generator, size: float, cavity: Mask, venous: float) -> None:
    lobes = [
        canvas.ellipsoid(np.array([66, 4, 12]) * size, np.array([62, 74, rng.uniform(58, 70)]) * size),
        canvas.ellipsoid(np.array([10, 42, 34]) * size, np.array([rng.uniform(62, 82), 36, 30]) * size, tilt_deg=-12),
    ]
    # smooth union: the lobes flow into each other
    shape = -12 * np.logaddexp(-lobes[0] / 12, -lobes[1] / 12)
    below = canvas.z + 0.5 * canvas.x - 0.35 * canvas.y + rng.uniform(0, 18)  # visceral surface, right lobe hangs lower
    dome = canvas.ellipsoid((62 * size, 5, -35), (72 * size, 92 * size, 91 * size))
    free = cavity & (canvas.hu > -400) & (_heart(canvas, size) > 3)
    liver = (shape < 0) & ((below > 0) | (canvas.x > 45)) & ((dome < 3) | ((canvas.x < 25) & (canvas.z < 48))) & free
    liver &= np.hypot(canvas.x - 20 * size, canvas.y + 18 * size) > 16  # room for the vena cava
    base = rng.normal(108, 10)
    canvas.paint(liver, base, _LIVER)
    hilum = np.array([28, 6, 8]) * size
    portal, radius = _curve([(6, 10, -8), hilum, _move(hilum, 22, -4, 6)], [7, 6.5, 5])
    canvas.tube(portal, radius, venous)
    canvas.label[liver] = _LIVER  # veins inside the liver belong to it
    for _ in range(9):
        end = _move(hilum, *rng.normal((30, 0, 8), (30, 30, 28)))
        branch, radius = _curve([_move(hilum, 10, 0, 4), (hilum + end) / 2 + rng.normal(0, 7, 3), end], [4.5, 3.2, 2.2])
        canvas.tube(branch, radius, venous + rng.normal(0, 5), _LIVER, within=liver)
    if rng.random() < 0.4:
        spot = np.array([rng.uniform(60, 95), rng.uniform(-25, 25), rng.uniform(0, 35)]) * size
        canvas.paint((canvas.ellipsoid(spot, [rng.uniform(6, 13)] * 3) < 0) & liver, rng.choice([10, 70]), _LIVER)
    bladder = canvas.ellipsoid(np.array([44, 40, -18]) * size, np.array([12, 13, 20]) * size, tilt_deg=20)
    canvas.paint((bladder < 1.5) & cavity, 60)
    canvas.paint((bladder < 0) & cavity, rng.normal(10, 4))


def _paint_vessels(canvas: _Canvas, rng: np.random.Generator, size: float) -> Points:
    """Paint the arterial tree (aorta and branches); return its centre lines, (P, 3) fine-grid indices."""

    def jitter(point: Vector, sd: float = 3.0) -> Points:
        return np.asarray(point, np.float64) * size + rng.normal(0, sd, 3)

    aorta_radius = rng.uniform(8.5, 11.5)
    split = jitter((-4, -18, -62), 4)
    top, crus, waist = jitter((-10, -18, 115), 2), jitter((-9, -17, 40)), jitter((-7, -17, -15))
    celiac, mesenteric, renal = (waist + (crus - waist) * f for f in (0.65, 0.3, -0.1))
    trunk = _move(celiac, 1, 19, 3)
    kidneys = {side: jitter((side * 34, -38, -44 if side > 0 else -34), 2) for side in (1, -1)}
    tree = [
        ([top, crus, waist, split], [aorta_radius * 1.1, aorta_radius, aorta_radius, aorta_radius * 0.85]),
        ([split, _move(split, 16, -2, -22), _move(split, 30, 2, -52)], [6.5, 6, 5.5]),
        ([split, _move(split, -16, -2, -22), _move(split, -30, 2, -52)], [6.5, 6, 5.5]),
        ([renal, _move((renal + kidneys[1]) / 2, 0, 2, 2), kidneys[1]], [4.6, 4.2, 3.8]),
        ([_move(renal, 0, 0, -3), _move((renal + kidneys[-1]) / 2, 0, 3, 2), kidneys[-1]], [4.6, 4.2, 3.8]),
        ([celiac, trunk], [5.2, 4.8]),
        ([trunk, jitter((16, 14, 14)), jitter((30, 10, 14))], [4.5, 4.2, 3.8]),  # hepatic
        (  # splenic
            [trunk, jitter((-26, 14, 26)), jitter((-44, -6, 20)), jitter((-62, -20, 30), 4)],
            [4.5, 4.5, 4.2, 4.0],
        ),
        (
            [mesenteric, _move(mesenteric, 2, 22, -14), _move(mesenteric, 4, 27, -42), jitter((14, 16, -72), 4)],
            [5, 4.8, 4.5, 3.8],
        ),
    ]
    enhancement = rng.normal(235, 18)
    lines = []
    for points, radii in tree:
        curve, radius = _curve(points, radii)
        canvas.tube(curve, radius, enhancement, _VESSELS)
        lines.append(canvas.to_index(curve))
    return np.concatenate(lines)


def _scan(canvas: _Canvas, rng: np.random.Generator, spacing_mm: Array) -> Array:
    """Return the image (X, Y, Z) in HU: tissue texture, voxel averaging, scanner blur and quantum noise."""
    nodes = np.ceil(np.array(canvas.fine_shape) * canvas.step_mm / 14).astype(int)
    soft = (canvas.hu > -200) & (canvas.hu < 350)
    tissue = canvas.hu + soft * _smooth_field(rng, nodes, canvas.fine_shape, 5.0)
    image = _block_mean(tissue)
    image = ndimage.gaussian_filter(image, 1.6 / spacing_mm)  # point spread of about 4 mm full width
    # fewer photons arrive through more tissue: noise grows with the water-equivalent path through each slice
    path = ndimage.gaussian_filter(np.clip(image / 1000 + 1, 0, 2), (12, 12, 0)) ** 0.5
    noise = ndimage.gaussian_filter(rng.standard_normal(image.shape, np.float32), (0.6, 0.6, 0))
    return image + noise / noise.std() * path * rng.uniform(11, 19)


def _block_mean(fine: Array) -> Array:
    s = _SUPERSAMPLING
    x, y, z = (n // s for n in fine.shape)
    return fine.reshape(x, s, y, s, z, s).mean(axis=(1, 3, 5))


def _label_on_voxels(canvas: _Canvas, shape: tuple[int, ...], centreline: Points) -> Labels:
    """Return the label (X, Y, Z) that fills at least half of each voxel, or background."""
    label = np.zeros(shape, np.uint8)
    for value in range(1, len(LABELS) + 1):
        label[_block_mean((canvas.label == value).astype(np.float32)) >= 0.5] = value
    # arteries thinner than a slice would break up: a voxel that the centre line crosses belongs to the vessel
    voxel = np.floor((centreline + 0.5) / _SUPERSAMPLING).astype(int)
    inside = np.all((voxel >= 0) & (voxel < shape), axis=1)
    label[tuple(voxel[inside].T)] = _VESSELS
    return label


def _in_scanner_orientation(
    image: Array, label: Labels, spacing_mm: Array, rng: np.random.Generator
) -> SyntheticVolume:
    """Store the volume in one of several axis orders with its own origin, as archives do."""
    affine = np.diag([*np.asarray(spacing_mm, np.float64), 1.0])
    affine[:3, 3] = rng.uniform(-200, 200, 3).round(1)
    target = nib.orientations.axcodes2ornt(rng.choice(_ORIENTATIONS))
    stored = [
        nib.Nifti1Image(data, affine).as_reoriented(target)
        for data in (np.clip(np.rint(image), -1024, 3071).astype(np.int16), label)
    ]
    return SyntheticVolume(
        image=np.ascontiguousarray(stored[0].dataobj),
        label=np.ascontiguousarray(stored[1].dataobj),
        affine=stored[0].affine,
    )


def write_cohort(folder: Path | str, *, volumes: int = 16, seed: int = 0, voxel_scale: float = 1.0) -> Path:
    """Write `volumes` patients as `images/*.nii.gz` and `labels/*.nii.gz` with a `dataset.json`; return the folder.

    The same `seed` gives the same files; different seeds share no patient. Raises ValueError when `volumes` < 1.
    """
    if volumes < 1:
        raise ValueError(f"volumes: got {volumes}, expected at least 1")
    folder = Path(folder)
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for number in range(volumes):
        volume = synthetic_volume(1000 * seed + number, voxel_scale=voxel_scale)
        for kind, data in (("images", volume.image), ("labels", volume.label)):
            stored = nib.Nifti1Image(data, volume.affine)
            stored.header.set_xyzt_units("mm")
            nib.save(stored, folder / kind / f"phantom_{number:03d}.nii.gz")
    names = {"0": "background"} | {str(value): name for value, name in enumerate(LABELS, 1)}
    description = {"name": "deformux synthetic abdomen", "modality": {"0": "CT"}, "labels": names, "seed": seed}
    (folder / "dataset.json").write_text(json.dumps(description, indent=1))
    return folder
