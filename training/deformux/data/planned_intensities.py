"""Modality and HU window of a plan, with the reason for each."""

from __future__ import annotations

from collections.abc import Iterable

from deformux.data.fingerprint import Fingerprint
from deformux.data.preprocessing import Preprocessing
from deformux.data.scan_facts import Intensities

__all__ = ["is_hounsfield", "planned_modality", "planned_window"]

# Names of the modality in headers and in dataset.json.
_CT_NAMES, _MR_NAMES = ("CT",), ("MR", "MRI", "T1", "T2", "FLAIR", "ADC", "DWI")
# Of Hounsfield units: nothing is darker than some scanners' padding, or brighter than dense metal in 16 bits.
_DARKEST_HU, _BRIGHTEST_HU = -8192.0, 32_767.0
# Air or lung, which half a percent of any uncropped CT is; no other scanner gives so negative values.
_AIR_HU = -200.0
# Fat in a CT cropped to soft tissue. MR and PET have no negative values but overshoots of resampling, which are few.
_FAT_HU = -20.0
# nnU-Net's percentiles of labelled voxels.
_PERCENTILES = (0.5, 99.5)
# Air to cortical bone; metal beyond it would flatten everything else.
_WINDOW_LIMITS_HU = (-1024.0, 3071.0)
_LEAST_WINDOW_HU = 100.0


def is_hounsfield(found: Intensities) -> bool:
    """Return whether intensities are Hounsfield units.

    They are if half a percent of the voxels are as dark as air or lung, or if all are whole numbers and half a percent
    as dark as fat. CT stored with an offset, so that air is 0, cannot be told from MR; it is standardised like MR,
    which no offset changes.
    """
    if found.lowest < _DARKEST_HU or found.highest > _BRIGHTEST_HU or found.high < _AIR_HU:
        return False
    return found.low <= _AIR_HU or (found.whole and found.low <= _FAT_HU and found.high - found.low > _LEAST_WINDOW_HU)


def planned_modality(fingerprint: Fingerprint) -> tuple[str, str]:
    """Return ``ct`` or ``mr``, and why: what headers and ``dataset.json`` say counts before the intensities."""
    declared = _named(fingerprint.modality)
    if declared:
        return declared, f"dataset.json says {fingerprint.modality}"
    stated = [_named(scan.modality) for scan in fingerprint.scans.values() if scan.modality]
    if stated and all(stated) and len(set(stated)) == 1:
        return str(
            stated[0]
        ), f"the headers of {_of(len(stated), len(fingerprint.scans))} scans say {stated[0].upper()}"
    known = [scan.intensities for scan in fingerprint.scans.values() if scan.intensities is not None]
    if not known:
        return "mr", "no intensities are known, and standardising each scan is safe for any"
    hounsfield = [found for found in known if is_hounsfield(found)]
    if 2 * len(hounsfield) > len(known):
        return "ct", (
            f"{_of(len(hounsfield), len(known))} scans have Hounsfield units "
            f"({_range(hounsfield)}, air or fat far below 0)"
        )
    mixed = f"; {len(hounsfield)} may be CT" if hounsfield else ""
    return (
        "mr",
        f"{_of(len(known) - len(hounsfield), len(known))} scans have no Hounsfield units ({_range(known)}){mixed}",
    )


def planned_window(fingerprint: Fingerprint) -> tuple[tuple[float, float], str]:
    """Return the HU window of labelled voxels as nnU-Net takes it, or the default without labels; and why."""
    found = fingerprint.labelled_percentiles(_PERCENTILES)
    if found is None:
        low, high = Preprocessing().window_hu
        return (low, high), f"soft tissue, {low:g} to {high:g} HU, until there are labels to take it from"
    least, most = _WINDOW_LIMITS_HU
    low, high = (min(max(value, least), most) for value in found)
    missing = _LEAST_WINDOW_HU - (high - low)
    if missing > 0:
        low, high = low - missing / 2, high + missing / 2
    n = sum(1 for facts in fingerprint.labels.values() if facts.percentiles)
    return (round(low, 1), round(high, 1)), (
        f"percentiles {_PERCENTILES[0]:g} and {_PERCENTILES[1]:g} of the labelled voxels of {_scans(n)}, as in nnU-Net"
    )


def _named(text: str) -> str:
    """Return ct or mr for the name of a modality, else an empty text."""
    name = text.strip().upper()
    return "ct" if name in _CT_NAMES else "mr" if name in _MR_NAMES else ""


def _range(known: Iterable[Intensities]) -> str:
    found = list(known)
    return f"{min(i.lowest for i in found):.4g} to {max(i.highest for i in found):.4g}"


def _of(some: int, all_: int) -> str:
    return f"all {all_}" if some == all_ else f"{some} of {all_}"


def _scans(n: int) -> str:
    return "1 scan" if n == 1 else f"{n} scans"
