"""Values that a label volume may hold, and their order in a file."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from deformux.data.header import InvalidVolume

__all__ = ["UNLABELLED", "check_label_values", "in_file_order"]

# Value of unlabelled voxels: neither background nor any structure.
UNLABELLED = 255
# Values of a label above this are not shown: they can be anything.
_MAX_SHOWN = 65_535


def in_file_order(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the same values ``(X, Y, Z)`` with x fastest in memory, as writers of volumes need them.

    NumPy takes seconds for a scan of 512 × 512 × 300 voxels, because both of its orders are far apart in memory; plane
    by plane they are not.
    """
    if values.ndim != 3 or values.flags.f_contiguous:
        return values
    ordered = np.empty(values.shape[::-1], values.dtype)
    for y in range(values.shape[1]):
        # Via a plane of its own: rows of a volume may lie so far apart that they displace each other in the cache.
        ordered[:, y] = np.ascontiguousarray(values[:, y]).T
    return ordered.T


def check_label_values(name: str, values: npt.NDArray, n_labels: int, *, unlabelled: bool) -> None:
    """Refuse a label with values other than 0..n_labels, and 255 if ``unlabelled`` allows it.

    Raises:
        InvalidVolume: it holds other values, or only 255.
    """
    found = _distinct(values)
    if unlabelled:
        found = found[found != UNLABELLED]
    if len(found) == 0:
        raise InvalidVolume(f"label {name} has no labelled voxel; expected at least one that is not 255")
    # Not a number is not a whole one either.
    if not (found == np.round(found)).all() or found.min() < 0 or found.max() > n_labels:
        raise InvalidVolume(f"label {name} holds {_shown_values(found)}; expected whole numbers from 0 to {n_labels}")


def _distinct(values: npt.NDArray) -> npt.NDArray:
    """Return the different values; small whole numbers need no sorting."""
    with np.errstate(invalid="ignore"):
        whole = values.astype(np.uint16)
    if (whole == values).all():
        return np.flatnonzero(np.bincount(whole.ravel())).astype(float)
    return np.unique(values)


def _shown_values(values: npt.NDArray, most: int = 6) -> str:
    """List the first values, if a label could have them."""
    if not (values == np.round(values)).all() or np.abs(values).max() > _MAX_SHOWN:
        return "values that no label has"
    text = ", ".join(f"{value:g}" for value in values[:most])
    return f"the values {text}" + (", …" if len(values) > most else "")
