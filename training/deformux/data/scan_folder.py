"""Folders of scans as users keep them: a data set, plain files, or the studies of MONAI Label."""

from __future__ import annotations

from pathlib import Path

from deformux.data.cases import Case, find_cases, find_images, volume_id

__all__ = ["scans_and_cases"]

_DATA_SETS = (("images", "labels"), ("imagesTr", "labelsTr"))
# Where MONAI Label keeps the labels that were submitted.
_SUBMITTED = Path("labels", "final")


def scans_and_cases(folder: Path, *, subset: str | None = None) -> tuple[list[Path], list[Case]]:
    """Return all scans of a folder, and those that have a label.

    It has ``images/`` and perhaps ``labels/`` (or ``imagesTr/`` and ``labelsTr/``), or scans directly in it, whose
    labels are in ``labels/final/``, as in a studies folder of MONAI Label.

    Args:
        folder: the data.
        subset: a key of ``split.json`` in that folder; then only labelled scans of this subset are returned.

    Raises:
        InvalidFolder: there are no scans, or no such subset.
    """
    if subset is not None:
        cases = find_cases(folder, subset=subset)
        return [case.image for case in cases], cases
    for images, labels in _DATA_SETS:
        if (folder / images).is_dir():
            has_labels = (folder / labels).is_dir() and any((folder / labels).iterdir())
            return find_images(folder / images), find_cases(folder) if has_labels else []
    images_of = find_images(folder)
    submitted = folder / _SUBMITTED
    labels_of = {volume_id(path): path for path in find_images(submitted)} if _has_volumes(submitted) else {}
    cases = [
        Case(volume_id(path), path, labels_of[volume_id(path)]) for path in images_of if volume_id(path) in labels_of
    ]
    return images_of, cases


def _has_volumes(folder: Path) -> bool:
    return folder.is_dir() and any(not path.name.startswith(".") and path.is_file() for path in folder.iterdir())
