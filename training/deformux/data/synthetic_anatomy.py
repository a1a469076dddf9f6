"""The anatomy of a synthetic abdomen: each function paints some organs of one patient.

Organs are implicit shapes in millimetres: x to the patient's right, y anterior, z superior.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from deformux.data.synthetic_canvas import BoolGrid, Canvas, FloatGrid, PointsMm, moved, smooth_curve

__all__ = ["LABELS", "VESSELS", "paint_gut", "paint_solid_organs", "paint_trunk", "paint_vessels"]

LABELS = ("liver", "spleen", "kidneys", "vessels")
"""Names of the label values 1..4; all other structures are unlabelled distractors."""

_LIVER, _SPLEEN, _KIDNEYS, VESSELS = (LABELS.index(name) + 1 for name in ("liver", "spleen", "kidneys", "vessels"))


def paint_trunk(canvas: Canvas, rng: np.random.Generator, half_mm: FloatGrid, fat_mm: float, size: float) -> FloatGrid:
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


def _heart(canvas: Canvas, size: float) -> FloatGrid:
    return canvas.ellipsoid((-18 * size, 30, 100), (46 * size, 42 * size, 44))


def _paint_spine(canvas: Canvas, rng: np.random.Generator, size: float) -> None:
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


def paint_gut(canvas: Canvas, rng: np.random.Generator, size: float, cavity: BoolGrid) -> None:
    """Paint stomach, pancreas, small bowel and colon: soft distractors, some filled with fluid or gas."""
    wall = rng.normal(55, 5)
    for side in (-1, 1):  # ascending and descending colon: gas and stool
        heights = (-105, -80, -52, -40 - 5 * side)
        course = [(side * rng.uniform(82, 92) * size, rng.uniform(-20, 10) * size, h) for h in heights]
        curve, radius = smooth_curve(course, [17, 14, 16, 13])
        canvas.tube(curve, radius, wall, within=cavity)
        canvas.tube(curve, radius - 3.5, rng.choice([-700, 10, 30]), within=cavity)
    for _ in range(7):  # small bowel: loops in the lower front
        centre = np.array([rng.uniform(-60, 60), rng.uniform(10, 55), rng.uniform(-85, -38)]) * size
        points = centre + rng.normal(0, 20, (5, 3)) * (1, 0.8, 0.7)
        curve, radius = smooth_curve(points, [9, 11, 9])
        canvas.tube(curve, radius, wall + 15, within=cavity)
        canvas.tube(curve, radius - 3, rng.normal(18, 8), within=cavity)
    fundus = np.array([-52, 5, 48]) * size + rng.normal(0, 5, 3)
    curve, radius = smooth_curve([fundus, (-58, 32, 18), (-30, 50, -12), (6, 46, -10)], [27, 24, 17, 11])
    canvas.tube(curve, radius, wall + 10, within=cavity)
    canvas.tube(curve, radius - 4, rng.normal(15, 8), within=cavity)
    top = slice(len(curve) // 2)
    canvas.tube(moved(curve[top], 0, 9, 0), radius[top] * 0.45, -900, within=cavity)  # gas rises
    curve, radius = smooth_curve([(32, 18, -22), (8, 16, -2), (-30, 4, 8), (-72, -18, 22)], [13, 9, 9, 7])
    canvas.tube(curve * size, radius, rng.normal(95, 8), within=cavity)


def paint_solid_organs(canvas: Canvas, rng: np.random.Generator, size: float, cavity: BoolGrid) -> None:
    """Paint inferior vena cava, liver with its veins, gallbladder, spleen and kidneys."""
    ivc, ivc_radius = smooth_curve([(19, -20, -110), (18, -20, -30), (22, -12, 30), (20, -5, 70)], [11, 11, 13, 14])
    venous = rng.normal(145, 10)
    canvas.tube(ivc * size, ivc_radius, venous)
    _paint_liver(canvas, rng, size, cavity, venous)

    centre = np.array([-86, -30, 30]) * size + rng.normal(0, 4, 3)
    length = rng.uniform(44, 58)
    outer = canvas.ellipsoid(centre, (rng.uniform(31, 38), 46 * size, length), rng.uniform(-20, 0))
    hollow = canvas.ellipsoid(moved(centre, 44 * size, 14, 0), (26, 34, length + 5))
    spleen = (outer < 0) & (hollow > 0) & cavity
    canvas.paint(spleen, rng.normal(125, 9), _SPLEEN)

    cortex, medulla = rng.normal(190, 12), rng.normal(150, 10)
    for side, drop in ((1, 46), (-1, 36)):
        centre = np.array([side * 56, -44, -drop]) * size + rng.normal(0, 4, 3)
        radii = np.array([rng.uniform(25, 30), rng.uniform(23, 28), rng.uniform(48, 58)]) * size
        kidney = canvas.ellipsoid(centre, radii, tilt_deg=-side * rng.uniform(8, 20))
        around = (kidney < 8) & cavity & (canvas.label != _SPLEEN)  # the fatty capsule keeps neighbours apart
        canvas.paint(around & (kidney >= 0) & (canvas.hu > -300) & (canvas.hu < 150) & (kidney < 4), -105)
        sinus = canvas.ellipsoid(moved(centre, -side * 14 * size, 0, 0), radii * (0.62, 0.42, 0.5))
        canvas.paint((kidney < 0) & (sinus > 0) & cavity, cortex, _KIDNEYS)
        canvas.paint((kidney < -8) & (sinus > 0) & (canvas.label == _KIDNEYS), medulla, _KIDNEYS)
        canvas.paint((kidney < 0) & (sinus <= 0), -85)
        if rng.random() < 0.3:  # a cyst belongs to the organ, as annotators draw it
            spot = moved(centre, side * 20 * size, 0, rng.uniform(-25, 25))
            cyst = canvas.ellipsoid(spot, [rng.uniform(5, 9)] * 3) < 0
            canvas.paint(cyst & (canvas.label == _KIDNEYS), 8, _KIDNEYS)


def _paint_liver(canvas: Canvas, rng: np.random.Generator, size: float, cavity: BoolGrid, venous: float) -> None:
    lobes = [
        canvas.ellipsoid(np.array([66, 4, 12]) * size, np.array([62, 74, rng.uniform(58, 70)]) * size),
        canvas.ellipsoid(np.array([10, 42, 34]) * size, np.array([rng.uniform(62, 82), 36, 30]) * size, tilt_deg=-12),
    ]
    # smooth union: the lobes flow into each other
    shape = -12 * np.logaddexp(-lobes[0] / 12, -lobes[1] / 12)
    # visceral surface, right lobe hangs lower
    below = canvas.z + 0.5 * canvas.x - 0.35 * canvas.y + rng.uniform(0, 18)
    dome = canvas.ellipsoid((62 * size, 5, -35), (72 * size, 92 * size, 91 * size))
    free = cavity & (canvas.hu > -400) & (_heart(canvas, size) > 3)
    liver = (shape < 0) & ((below > 0) | (canvas.x > 45)) & ((dome < 3) | ((canvas.x < 25) & (canvas.z < 48))) & free
    liver &= np.hypot(canvas.x - 20 * size, canvas.y + 18 * size) > 16  # room for the vena cava
    base = rng.normal(108, 10)
    canvas.paint(liver, base, _LIVER)
    hilum = np.array([28, 6, 8]) * size
    portal, radius = smooth_curve([(6, 10, -8), hilum, moved(hilum, 22, -4, 6)], [7, 6.5, 5])
    canvas.tube(portal, radius, venous)
    canvas.label[liver] = _LIVER  # veins inside the liver belong to it
    for _ in range(9):
        end = moved(hilum, *rng.normal((30, 0, 8), (30, 30, 28)))
        branch, radius = smooth_curve(
            [moved(hilum, 10, 0, 4), (hilum + end) / 2 + rng.normal(0, 7, 3), end], [4.5, 3.2, 2.2]
        )
        canvas.tube(branch, radius, venous + rng.normal(0, 5), _LIVER, within=liver)
    if rng.random() < 0.4:
        spot = np.array([rng.uniform(60, 95), rng.uniform(-25, 25), rng.uniform(0, 35)]) * size
        canvas.paint((canvas.ellipsoid(spot, [rng.uniform(6, 13)] * 3) < 0) & liver, rng.choice([10, 70]), _LIVER)
    bladder = canvas.ellipsoid(np.array([44, 40, -18]) * size, np.array([12, 13, 20]) * size, tilt_deg=20)
    canvas.paint((bladder < 1.5) & cavity, 60)
    canvas.paint((bladder < 0) & cavity, rng.normal(10, 4))


def paint_vessels(canvas: Canvas, rng: np.random.Generator, size: float) -> PointsMm:
    """Paint the arterial tree (aorta and branches); return its centre lines, (P, 3) fine-grid indices."""

    def jitter(point: npt.ArrayLike, sd: float = 3.0) -> PointsMm:
        return np.asarray(point, np.float64) * size + rng.normal(0, sd, 3)

    aorta_radius = rng.uniform(8.5, 11.5)
    split = jitter((-4, -18, -62), 4)
    top, crus, waist = jitter((-10, -18, 115), 2), jitter((-9, -17, 40)), jitter((-7, -17, -15))
    celiac, mesenteric, renal = (waist + (crus - waist) * f for f in (0.65, 0.3, -0.1))
    trunk = moved(celiac, 1, 19, 3)
    kidneys = {side: jitter((side * 34, -38, -44 if side > 0 else -34), 2) for side in (1, -1)}
    tree = [
        ([top, crus, waist, split], [aorta_radius * 1.1, aorta_radius, aorta_radius, aorta_radius * 0.85]),
        ([split, moved(split, 16, -2, -22), moved(split, 30, 2, -52)], [6.5, 6, 5.5]),
        ([split, moved(split, -16, -2, -22), moved(split, -30, 2, -52)], [6.5, 6, 5.5]),
        ([renal, moved((renal + kidneys[1]) / 2, 0, 2, 2), kidneys[1]], [4.6, 4.2, 3.8]),
        ([moved(renal, 0, 0, -3), moved((renal + kidneys[-1]) / 2, 0, 3, 2), kidneys[-1]], [4.6, 4.2, 3.8]),
        ([celiac, trunk], [5.2, 4.8]),
        ([trunk, jitter((16, 14, 14)), jitter((30, 10, 14))], [4.5, 4.2, 3.8]),  # hepatic
        (  # splenic
            [trunk, jitter((-26, 14, 26)), jitter((-44, -6, 20)), jitter((-62, -20, 30), 4)],
            [4.5, 4.5, 4.2, 4.0],
        ),
        (
            [mesenteric, moved(mesenteric, 2, 22, -14), moved(mesenteric, 4, 27, -42), jitter((14, 16, -72), 4)],
            [5, 4.8, 4.5, 3.8],
        ),
    ]
    enhancement = rng.normal(235, 18)
    lines = []
    for points, radii in tree:
        curve, radius = smooth_curve(points, radii)
        canvas.tube(curve, radius, enhancement, VESSELS)
        lines.append(canvas.to_index(curve))
    return np.concatenate(lines)
