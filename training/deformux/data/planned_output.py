"""What a plan decides about the output of a network."""

from __future__ import annotations

from typing import Any

import numpy as np

from deformux.data.fingerprint import Fingerprint
from deformux.data.frame import frame_axes

__all__ = ["planned_keep_largest", "planned_output"]

# Annotators leave a stray voxel now and then.
_ONE_PIECE = 0.99
_LEAST_SCANS = 3
# Labels lie in the same place if their centre is nowhere farther than this from the mean, in sides of the scan.
_SAME_PLACE = 0.15


def planned_output(
    fingerprint: Fingerprint, frame: str, n_labels: int, *, keep_largest: bool | None = None
) -> tuple[dict[str, Any], str]:
    """Return the fields of ``Preprocessing`` that say what is kept of a result, and the reason.

    Args:
        fingerprint: facts of all scans and labels.
        frame: of the network's grid.
        n_labels: labels 1..N.
        keep_largest: the user's choice; None leaves it to the labels.
    """
    keep, reason = (keep_largest, "given") if keep_largest is not None else planned_keep_largest(fingerprint, n_labels)
    center = _planned_center(fingerprint, frame, n_labels) if keep else None
    if center is not None and keep_largest is None:
        reason += "; pieces far from where they lie in these count as smaller"
    return {"keep_largest": keep, "labels_center": center}, reason


def planned_keep_largest(fingerprint: Fingerprint, n_labels: int) -> tuple[bool, str]:
    """Return whether to keep only the largest component of the foreground, and the reason.

    The labels of every scan must be one piece. Scans that lack some of the labels 1..N count only against it: of
    organs that are annotated in different scans, each is one piece, and all together are not.

    Source: nnU-Net, which decides by cross-validation (Isensee et al., 2021).
    """
    facts = [labels for labels in fingerprint.labels.values() if labels.voxels]
    apart = sum(labels.largest_share < _ONE_PIECE for labels in facts)
    if apart:
        return (
            False,
            f"in {apart} of {len(facts)} labelled scans the labels are several pieces, or thin bridges join them",
        )
    if len(facts) < _LEAST_SCANS:
        return False, f"{len(facts)} labelled scans are too few to tell whether the labels are one piece"
    complete = sum(all(label in labels.voxels for label in range(1, n_labels + 1)) for labels in facts)
    if complete < _LEAST_SCANS:
        return False, f"only {complete} labelled scans have all labels, too few to tell whether these are one piece"
    return True, f"the labels are one piece in all {len(facts)} labelled scans"


def _planned_center(fingerprint: Fingerprint, frame: str, n_labels: int) -> tuple[float, float, float] | None:
    """Return where the centre of all labels lies, as shares of the scan's sides along the frame's axes.

    None where fewer than three scans are labelled, or do not agree.
    """
    centers = []
    for scan, labels in fingerprint.labelled:
        box = labels.union(range(1, n_labels + 1))
        if box is None:
            continue
        axes, signs = frame_axes(frame, scan.shape, scan.affine)
        share = (np.array(box[0]) + box[1]) / 2 / np.array(scan.shape)
        centers.append(np.where(np.array(signs) > 0, share[list(axes)], 1 - share[list(axes)]))
    if len(centers) < _LEAST_SCANS:
        return None
    mean = np.mean(centers, axis=0)
    if np.abs(centers - mean).max() > _SAME_PLACE:
        return None
    x, y, z = (float(f"{share:.3f}") for share in mean)
    return x, y, z
