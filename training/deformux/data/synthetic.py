"""Synthetic abdominal CT volumes with exact labels: a phantom cohort for demos and tests.

One seed draws a patient: body habitus, position, size and shape of the organs (a smooth random deformation of
everything), enhancement of each organ, a branching arterial tree, noise and voxel grid. Organs are painted on a grid
twice as fine as the output and averaged down, so that borders show partial volume as in a scanner.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
from scipy import ndimage

from deformux.data.synthetic_anatomy import (
    LABELS,
    VESSELS,
    paint_gut,
    paint_solid_organs,
    paint_trunk,
    paint_vessels,
)
from deformux.data.synthetic_canvas import SUPERSAMPLING, Canvas, FloatGrid, PointsMm, smooth_field

__all__ = ["LABELS", "SyntheticVolume", "synthetic_volume", "write_cohort"]

_ORIENTATIONS = ("RAS", "LPS", "LAS", "RAI")  # scanners, converters and archives differ: so does the cohort


@dataclass(frozen=True)
class SyntheticVolume:
    """One patient.

    Args:
        image: ``(X, Y, Z)``, HU.
        label: ``(X, Y, Z)``, 0..4.
        affine: of both, to RAS millimetres, ``(4, 4)``.
    """

    image: npt.NDArray[np.int16]
    label: npt.NDArray[np.uint8]
    affine: npt.NDArray[np.float64]


def synthetic_volume(seed: int, *, voxel_scale: float = 1.0) -> SyntheticVolume:
    """Draw one patient; the same seed gives the same volume.

    ``voxel_scale`` > 1 makes voxels larger and the grid smaller (for quick tests). Raises ValueError below 0.5.
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

    canvas = Canvas(rng, (shape[0], shape[1], shape[2]), spacing, wobble_mm=3.5)
    wall_mm = paint_trunk(canvas, rng, half_mm, fat_mm, size)
    cavity = wall_mm < -10
    paint_gut(canvas, rng, size, cavity)
    paint_solid_organs(canvas, rng, size, cavity)
    centreline = paint_vessels(canvas, rng, size)

    image = _scan(canvas, rng, spacing)
    label = _label_on_voxels(canvas, shape, centreline)
    return _in_scanner_orientation(image, label, spacing, rng)


def _scan(canvas: Canvas, rng: np.random.Generator, spacing_mm: FloatGrid) -> FloatGrid:
    """Return the image (X, Y, Z) in HU: tissue texture, voxel averaging, scanner blur and quantum noise."""
    nodes = np.ceil(np.array(canvas.fine_shape) * canvas.step_mm / 14).astype(int)
    soft = (canvas.hu > -200) & (canvas.hu < 350)
    tissue = canvas.hu + soft * smooth_field(rng, nodes, canvas.fine_shape, 5.0)
    image = _block_mean(tissue)
    image = ndimage.gaussian_filter(image, 1.6 / spacing_mm)  # point spread of about 4 mm full width
    # fewer photons arrive through more tissue: noise grows with the water-equivalent path through each slice
    path = ndimage.gaussian_filter(np.clip(image / 1000 + 1, 0, 2), (12, 12, 0)) ** 0.5
    noise = ndimage.gaussian_filter(rng.standard_normal(image.shape, np.float32), (0.6, 0.6, 0))
    return image + noise / noise.std() * path * rng.uniform(11, 19)


def _block_mean(fine: FloatGrid) -> FloatGrid:
    s = SUPERSAMPLING
    x, y, z = (n // s for n in fine.shape)
    return fine.reshape(x, s, y, s, z, s).mean(axis=(1, 3, 5))


def _label_on_voxels(canvas: Canvas, shape: tuple[int, ...], centreline: PointsMm) -> npt.NDArray[np.uint8]:
    """Return the label (X, Y, Z) that fills at least half of each voxel, or background."""
    label = np.zeros(shape, np.uint8)
    for value in range(1, len(LABELS) + 1):
        label[_block_mean((canvas.label == value).astype(np.float32)) >= 0.5] = value
    # arteries thinner than a slice would break up: a voxel that the centre line crosses belongs to the vessel
    voxel = np.floor((centreline + 0.5) / SUPERSAMPLING).astype(int)
    inside = np.all((voxel >= 0) & (voxel < shape), axis=1)
    label[tuple(voxel[inside].T)] = VESSELS
    return label


def _in_scanner_orientation(
    image: FloatGrid, label: npt.NDArray[np.uint8], spacing_mm: FloatGrid, rng: np.random.Generator
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
    """Write patients as ``images/*.nii.gz`` and ``labels/*.nii.gz`` with a ``dataset.json``; return the folder.

    The same ``seed`` gives the same files; different seeds share no patient. Raises ValueError when ``volumes`` < 1.
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
