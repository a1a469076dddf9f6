"""What a plan decides about the output of a network."""

from __future__ import annotations

from deformux.data.fingerprint import Fingerprint

__all__ = ["planned_keep_largest"]

# Annotators leave a stray voxel now and then.
_ONE_PIECE = 0.99
_LEAST_SCANS = 3


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
