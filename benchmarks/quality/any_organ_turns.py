"""Cases whose headers say that the scanner's planes had the angles of a short axis of the heart; voxels stay."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from benchmarks.common.turned_headers import write_turned
from scipy.spatial.transform import Rotation

from deformux.data.atomic_files import replacing
from deformux.data.cases import Case

__all__ = ["turned"]

# The long axis of the heart points left, forward and down, between patients by some 15 degrees otherwise. It lies about
# as near to right as to anterior: rounding to the nearest axis decides by the patient.
_LONG_AXIS = (-0.6, 0.6, -0.53)
_SPREAD_DEGREES = 15.0
_IN_PLANE_DEGREES = 30.0


def turned(cases: Mapping[str, Case], folder: Path, *, alike: bool, seed: int) -> dict[str, Case]:
    """Return cases with turned headers, whose files are written into a folder once.

    Args:
        cases: by their ids; volumes in NIfTI files.
        folder: for the files.
        alike: one rotation for all, else one for each.
        seed: of the rotations.
    """
    rng = np.random.default_rng(seed)
    common = _short_axis(rng)
    written = {}
    for name, case in sorted(cases.items()):
        rotation = common if alike else _short_axis(rng)
        files = [folder / kind / f"{name}.nii.gz" for kind in ("images", "labels")]
        for source, target in zip((case.image, case.label), files, strict=True):
            if not target.is_file():
                with replacing(target) as temporary:
                    write_turned(source, temporary, rotation)
        written[name] = Case(name, *files)
    return written


def _short_axis(rng: np.random.Generator) -> Rotation:
    """Return a rotation from axial planes to those across the heart's long axis, by a random patient."""
    in_plane = Rotation.from_rotvec([0.0, 0.0, np.deg2rad(rng.uniform(-_IN_PLANE_DEGREES, _IN_PLANE_DEGREES))])
    tilt, _ = Rotation.align_vectors([_LONG_AXIS], [(0.0, 0.0, 1.0)])
    patient = Rotation.from_rotvec(np.deg2rad(rng.normal(0, _SPREAD_DEGREES / np.sqrt(3), 3)))
    return patient * tilt * in_plane
