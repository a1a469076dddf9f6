"""Labelled and unlabelled volumes of an index."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from monailabel.datastore.local import DataModel, ImageLabelModel
from monailabel.interfaces.datastore import DefaultLabelTag

from deformux_label.lib.store.label_fields import UNCERTAINTY_TAG

__all__ = ["StudiesSummary"]

_FINAL = DefaultLabelTag.FINAL.value


@dataclass(frozen=True)
class StudiesSummary:
    """Labelled and unlabelled volumes of an index, and unusable labels.

    Args:
        objects: the entries of the index.
        labelled, unlabelled: ids of volumes with and without a usable submitted label; volumes with unchecked labels
            are in neither.
        tags: number of usable labels, by tag.
        unusable: ``tag/name`` to the reason, for the other labels.
    """

    objects: Mapping[str, ImageLabelModel]
    labelled: tuple[str, ...]
    unlabelled: tuple[str, ...]
    tags: Mapping[str, int]
    unusable: Mapping[str, str]

    @classmethod
    def of(cls, objects: Mapping[str, ImageLabelModel], why_not: Callable[[DataModel], str | None]) -> StudiesSummary:
        """Summarise the entries; ``why_not`` returns why a label cannot be used, or None."""
        labelled, unlabelled = [], []
        tags: Counter[str] = Counter()
        unusable = {}
        for image, entry in objects.items():
            counts, waits = False, False
            for tag, label in entry.labels.items():
                reason = why_not(label) if tag != UNCERTAINTY_TAG else None
                if reason is not None:
                    unusable[f"{tag}/{image}{label.ext}"] = reason
                    waits |= tag == _FINAL and label.info.get("state") == "unchecked"
                    continue
                counts |= tag == _FINAL
                tags[tag] += tag != UNCERTAINTY_TAG
            if counts:
                labelled.append(image)
            elif not waits:
                unlabelled.append(image)
        tags.pop(UNCERTAINTY_TAG, None)
        return cls(objects, tuple(labelled), tuple(unlabelled), dict(tags), unusable)
