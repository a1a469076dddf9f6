"""Queries of a studies folder: its volumes, its labels, and its unusable files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi import HTTPException
from monailabel.datastore.local import DataModel, ImageLabelModel
from monailabel.interfaces.datastore import Datastore, DefaultLabelTag

from deformux_label.lib.store.annotated_slices import annotated_slices_of, write_annotated_slices
from deformux_label.lib.store.archive import write_archive
from deformux_label.lib.store.label_fields import PLAIN_TAGS, UNCERTAINTY_TAG, file_state, why_unusable
from deformux_label.lib.store.label_names import looked_for, mapped_info, names_of
from deformux_label.lib.store.notices import count_and_first
from deformux_label.lib.store.studies_folder import StudiesFolder
from deformux_label.lib.store.studies_summary import StudiesSummary

__all__ = ["ListedStudies", "image_files", "learnt_label"]


class ListedStudies(StudiesFolder):
    """The part of MONAI Label's datastore that only reads."""

    _summary: StudiesSummary | None = None

    def get_image_uri(self, image_id: str) -> str:
        """Return the path of a volume in the studies, even if it is a link; empty for an unknown id."""
        entry = self._datastore.objects.get(image_id)
        return "" if entry is None else str(self._image_file(image_id, entry))

    def sequence_uri(self, image_id: str, sequence: str) -> str:
        """Return the path of a sequence of a volume, by its number or its name.

        Raises:
            HTTPException: 404 for an unknown volume, or a sequence that it lacks.
        """
        files = self.naming.files_of(self._image_file(image_id, self._image(image_id)))
        present = [(number, path) for number, path in enumerate(files) if path.is_file()]
        known = self.naming.names if len(files) == len(self.naming.names) else ("0",)
        wanted = next((path for number, path in present if sequence in (str(number), known[number])), None)
        if wanted is None:
            there = ", ".join(f"{number} ({known[number]})" if self.naming.names else "0" for number, _ in present)
            raise HTTPException(404, f"image {image_id!r} has no sequence {sequence!r}; it has {there}")
        return str(wanted)

    def get_label_uri(self, label_id: str, label_tag: str) -> str:
        """Return the path of a label with the project's values; empty if the volume has none.

        This is the stored file, or a converted copy if the label was drawn for a different list of labels.
        """
        label = self._datastore.label(label_id, label_tag)
        if label is None:
            return ""
        file = self._label_file(label_id, label_tag, label.ext)
        if label_tag == UNCERTAINTY_TAG or not file.is_file():
            return str(file)
        if label_tag not in PLAIN_TAGS and (
            label.info.get("checked") != file_state(file.stat()) or self._is_corrupted(label_id, label_tag, label)
        ):
            try:
                self._check([(label_id, label_tag)])
            except OSError as error:
                self.notices.warn(f"the label {label_tag!r} of image {label_id!r} could not be checked: {error}")
            label = self._datastore.label(label_id, label_tag) or label
            file = self._label_file(label_id, label_tag, label.ext)
        names = names_of(label.info, self._unnamed)
        if names == self.labels or not self.labels or why_unusable(label.info) or not set(names) & set(self.labels):
            return str(file)
        image = Path(self.get_image_uri(label_id))
        return str(self._copies.mapped(file, image, label_id, label_tag, names, self.labels))

    def learnt_label(self, label_id: str, label_tag: str) -> str:
        """Return the path of a label in which slices that were not annotated are 255; empty if the volume has none."""
        file = self.get_label_uri(label_id, label_tag)
        slices = annotated_slices_of(self._label(label_id, label_tag).info) if file else None
        if slices is None:
            return file
        numbers = {name: value for value, name in enumerate(self.labels or (), start=1)}
        return str(
            self._copies.get(
                Path(file),
                label_id,
                label_tag,
                purpose="annotated_slices",
                made_from=slices.to_dict(),
                write=lambda target: write_annotated_slices(Path(file), slices, numbers, target),
            )
        )

    def get_image_info(self, image_id: str) -> dict[str, Any]:
        """Return the metadata of a volume, with its ``path``."""
        entry = self._image(image_id)
        path = self._image_file(image_id, entry)
        info = {**entry.image.info, "path": str(path)}
        if len(self.naming.suffixes) > 1:
            there = zip(self.naming.names, self.naming.files_of(path), strict=False)
            info["sequences"] = {name: file.name for name, file in there if file.is_file()}
        return info

    def get_label_info(self, label_id: str, label_tag: str) -> dict[str, Any]:
        """Return the metadata of a label, converted to the project's list of labels."""
        info = self._label(label_id, label_tag).info
        return mapped_info(info, names_of(info, self._unnamed), self.labels) if self.labels else dict(info)

    def get_labels_by_image_id(self, image_id: str) -> dict[str, str]:
        """Return tag to id of a volume's usable labels."""
        entry = self._datastore.objects.get(image_id)
        return {tag: image_id for tag, label in entry.labels.items() if self._why_not(label) is None} if entry else {}

    def get_labeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        """Return the ids of the volumes with a usable submitted label."""
        return list(self.summary().labelled)

    def get_unlabeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        """Return the ids of the volumes without a submitted label; volumes with unchecked labels are in no list."""
        return list(self.summary().unlabelled)

    def datalist(self, full_path: bool = True) -> list[dict[str, Any]]:
        """Return the paths of the volumes with a usable submitted label, and of their labels."""
        final = DefaultLabelTag.FINAL.value
        return [
            {"image": self.get_image_uri(image), "label": self.learnt_label(image, final)}
            for image in self.get_labeled_images()
        ]

    def summary(self) -> StudiesSummary:
        """Return which volumes are labelled; computed once for each state of the index."""
        model, summary = self._datastore, self._summary
        if summary is None or summary.objects is not model.objects:
            summary = self._summary = StudiesSummary.of(model.objects, self._why_not)
        return summary

    def status(self) -> dict[str, Any]:
        """Return the numbers of volumes and labels, and the unusable files with the reasons."""
        summary = self.summary()
        return {
            "total": len(self._datastore.objects),
            "completed": len(summary.labelled),
            "label_tags": dict(summary.tags),
            "not_served": count_and_first(self.not_served()),
            "unusable_labels": count_and_first(self.unusable_labels()),
            "read_only": self.read_only,
        }

    def warnings(self) -> list[str]:
        """Return one sentence for each problem that an operator must know about, the latest last."""
        damaged = [f"{record}: {reason}" for record, reason in list(self.revisions.damaged.items())[:20]]
        return [*self.notices.warnings(), *damaged]

    def not_served(self) -> dict[str, str]:
        """Return the files that look like volumes and cannot be served, with the reasons."""
        unusable = self._scans.reasons if self._scans else {}
        return {**(self._files.found.not_served if self._files else {}), **unusable}

    def unusable_labels(self) -> dict[str, str]:
        """Return the label files (``tag/name``) that cannot be used, with the reasons."""
        return {**(self._files.stray if self._files else {}), **self.summary().unusable}

    def get_dataset_archive(self, limit_cases: int | None) -> str:
        """Write a zip file with all labelled volumes, and return its path."""
        images = self.get_labeled_images()
        if not images:
            raise HTTPException(404, "no label has been submitted yet, so there is nothing to download")
        final = DefaultLabelTag.FINAL.value
        chosen = images[:limit_cases] if limit_cases and limit_cases > 0 else images
        cases = {image: (self._archived(image), self.get_label_uri(image, final)) for image in chosen}
        return write_archive(cases, self._datastore.model_dump_json(exclude={"base_path"}))

    def _archived(self, image_id: str) -> dict[str, str]:
        """Return name in an archive, without a suffix, to the path of each sequence of a volume."""
        files = self.naming.files_of(Path(self.get_image_uri(image_id)))
        if len(files) == 1:
            return {image_id: str(files[0])}
        there = zip(self.naming.suffixes, files, strict=True)
        return {image_id + suffix: str(path) for suffix, path in there if path.is_file()}

    def _why_not(self, label: DataModel) -> str | None:
        """Return why a label cannot be used for this project, or None."""
        if reason := why_unusable(label.info):
            return reason
        names = names_of(label.info, self._unnamed)
        if names == self.labels or not self.labels or looked_for(label.info, names, self.labels):
            return None
        return f"it was drawn for {', '.join(names)}, and none of these is a label of this project"

    def _image(self, image_id: str) -> ImageLabelModel:
        return self._entry(self._datastore.objects, image_id)

    def _entry(self, objects: Mapping[str, ImageLabelModel], image_id: str) -> ImageLabelModel:
        entry = objects.get(image_id)
        if entry is None:
            raise HTTPException(404, f"there is no image with the id {image_id!r}")
        return entry

    def _label(self, label_id: str, tag: str) -> DataModel:
        label = self._image(label_id).labels.get(tag)
        if label is None:
            raise HTTPException(404, f"image {label_id!r} has no label with the tag {tag!r}")
        return label


def learnt_label(datastore: Datastore, image_id: str, tag: str) -> Path:
    """Return the file of a label in which slices that were not annotated are 255."""
    found = datastore.learnt_label if isinstance(datastore, ListedStudies) else datastore.get_label_uri
    return Path(found(image_id, tag))


def image_files(datastore: Datastore, image_id: str) -> tuple[Path, ...]:
    """Return the files of all sequences of a volume; those of missing ones do not exist."""
    path = Path(datastore.get_image_uri(image_id))
    return datastore.naming.files_of(path) if isinstance(datastore, ListedStudies) else (path,)
