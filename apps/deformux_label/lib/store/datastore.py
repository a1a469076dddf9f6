"""MONAI Label's datastore of a studies folder, with checked input and a history of labels."""

from __future__ import annotations

import filecmp
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from fastapi import HTTPException
from monailabel.datastore.local import DataModel, ImageLabelModel

from deformux.data.loading import LoadVolumed
from deformux.data.volume_reader import VOLUME_SUFFIXES, InvalidVolume
from deformux_label.lib.requests.caller import note, with_login
from deformux_label.lib.requests.identifiers import checked_image_id, checked_revision, checked_tag, checked_text
from deformux_label.lib.store.annotated_slices import FIELD, with_annotated_slices
from deformux_label.lib.store.annotator import annotator_of
from deformux_label.lib.store.crash_recovery import file_of, label_entry
from deformux_label.lib.store.label_check import checked_labels
from deformux_label.lib.store.label_fields import (
    PLAIN_TAGS,
    UNCERTAINTY_TAG,
    client_fields,
    file_state,
    unchecked_fields,
    without_server_fields,
)
from deformux_label.lib.store.label_names import looked_for, mapped_info, write_mapped
from deformux_label.lib.store.label_revisions import Revision, checksum
from deformux_label.lib.store.listed_studies import ListedStudies
from deformux_label.lib.store.studies_folder import StudiesError
from deformux_label.lib.store.transaction import Transaction
from deformux_label.lib.store.upload_check import checked_info, checked_suffix, refuse_taken
from deformux_label.lib.store.volumes import split_suffix

__all__ = ["CheckedDatastore", "StudiesError"]


# Label names for tools on a folder that was never served with names.
_NUMBERS = tuple(map(str, range(1, 255)))


class CheckedDatastore(ListedStudies):
    """Volumes in a folder and their labels under ``labels/<tag>``, indexed by ``datastore_v2.json``.

    - Unusable input is refused with a 4xx and changes nothing.
    - Every submitted label is kept as a revision under ``.deformux/revisions``; deleted files are moved to
      ``.deformux/trash``.
    - The files of a change and the index are written by rename, all or nothing.
    - Every change starts from the index on disk, because training and scoring run in other processes. Other threads
      see the index before or after a change, never in between.
    - A read-only folder is served for inference only, with the index in memory.
    """

    def save_label(self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any]) -> str:
        """Store a label on its image's grid with the project's values, and return its id."""
        self._image(image_id)
        tag = checked_tag(label_tag)
        if tag == UNCERTAINTY_TAG:
            raise HTTPException(
                400, f"the tag {tag!r} is reserved for the model's own maps; save the label under a different tag"
            )
        self._refuse_read_only()
        info = checked_info(label_info)
        checked_suffix(label_filename)
        image = Path(self.get_image_uri(image_id))
        with checked_labels(Path(label_filename), image, image_id, self.labels, info) as checked:
            # Nobody drew a model's own output: it is whole, unless the client says otherwise.
            info = with_annotated_slices(info, checked, "all" if tag in PLAIN_TAGS else self.slice_rule)
            self._store_label(image_id, tag, checked, info)
        return image_id

    def save_uncertainty(self, image_id: str, file: Path, info: dict[str, Any]) -> bool:
        """Store a map of a model's uncertainty, replacing an earlier one; return False if the folder is read-only."""
        if not self.read_only:
            self._store_label(image_id, UNCERTAINTY_TAG, file, checked_info(info))
        return not self.read_only

    def restore_label(self, image_id: str, number: int, annotator: str, tag: str = "final") -> Revision:
        """Make an earlier revision of a label current again, as a new revision."""
        checked_image_id(image_id, status=404)
        tag, annotator = checked_tag(tag), checked_text("annotator", annotator)
        self._image(image_id)
        self._refuse_read_only()
        revision = self.revisions.get(image_id, tag, checked_revision(number))
        if revision is None or revision.deleted:
            there = [str(r.number) for r in self.revisions.history(image_id, tag) if not r.deleted]
            known = f"its revisions are {', '.join(there)}" if there else "it has no revisions"
            raise HTTPException(404, f"no revision {number} of the label {tag!r} of {image_id!r}; {known}")
        if not self.revisions.is_intact(revision):
            raise HTTPException(
                409, f"the file of revision {number} of {image_id!r} is damaged; restore a different one"
            )
        if revision.image_file not in (None, file_of(image_id, self._image(image_id))):
            raise HTTPException(409, f"revision {number} was drawn on a different volume, {revision.image_file!r}")
        names = revision.labels or list(self._unnamed or _NUMBERS)
        project = self.labels or tuple(names)
        if not looked_for(revision.info, names, project):
            raise HTTPException(409, f"revision {number} has only labels that this project lacks: {', '.join(names)}")
        info = {**revision.info, "user": annotator, "model_version": revision.model_version}
        image = Path(self.get_image_uri(image_id))
        with ExitStack() as stack:
            file = self.revisions.file(revision)
            if tuple(names) != tuple(project):
                info = mapped_info(info, names, project)
                file = stack.enter_context(_mapped_copy(file, image, image_id, names, project))
            # A stored label already has the project's values, however the client numbered its segments.
            sent = {key: value for key, value in info.items() if key == "annotated"}
            checked = stack.enter_context(checked_labels(file, image, image_id, project, sent))
            kept = self._store_label(image_id, tag, checked, info, restored_from=number, labels=project)
        assert kept is not None
        return kept

    def _store_label(
        self,
        image_id: str,
        tag: str,
        file: Path,
        info: dict[str, Any],
        restored_from: int | None = None,
        labels: Sequence[str] = (),
    ) -> Revision | None:
        suffix = checked_suffix(file.name)
        names = list(labels or self.labels)
        info = {**without_server_fields(info), "labels": names}
        revision = None
        with self._changing() as (objects, transaction):
            entry = self._entry(objects, image_id)
            previous = entry.labels.get(tag)
            if tag not in PLAIN_TAGS:
                number = self._keep_if_unknown(transaction, image_id, tag, previous, entry) + 1
                revision = self.revisions.stage(
                    transaction,
                    image_id,
                    tag,
                    number,
                    file,
                    suffix=suffix,
                    annotator=annotator_of(info),
                    model_version=_text(info.get("model_version")),
                    restored_from=restored_from,
                    info=without_server_fields(info),
                    labels=names,
                    image_file=file_of(image_id, entry),
                )
                info["revision"] = revision.number
                note(revision=revision.number, annotator=revision.annotator, restored_from=restored_from)
            temporary = transaction.copy(file, self._label_file(image_id, tag, suffix))
            if previous is not None and previous.ext != suffix:
                transaction.remove(self._label_file(image_id, tag, previous.ext))
            info["checked"] = file_state(temporary.stat())
            objects[image_id] = _with_label(entry, tag, label_entry(image_id, suffix, info))
        return revision

    def remove_label(self, label_id: str, label_tag: str) -> None:
        """Move a label to the trash; its revisions stay, and can be restored."""
        tag = checked_tag(label_tag)
        with self._changing() as (objects, transaction):
            entry = self._entry(objects, label_id)
            label = self._label(label_id, tag)
            place = self.trash.stage(transaction, "label", label_id, labels={tag: label.info.get("revision", 0)})
            self._stage_removal(transaction, label_id, tag, entry, place)
            objects[label_id] = _with_label(entry, tag, None)

    def _stage_removal(
        self, transaction: Transaction, image_id: str, tag: str, entry: ImageLabelModel, place: Path
    ) -> None:
        label = entry.labels[tag]
        if tag not in PLAIN_TAGS:
            number = self._keep_if_unknown(transaction, image_id, tag, label, entry)
            author = with_login({})
            more = {"annotator": author.get("user", ""), "info": author, "image_file": file_of(image_id, entry)}
            gone = self.revisions.stage(transaction, image_id, tag, number + 1, None, **more)
            note(revision=gone.number)
        file = self._label_file(image_id, tag, label.ext)
        if os.path.lexists(file):
            transaction.move(file, place / "labels" / tag / file.name)

    def _keep_if_unknown(
        self, transaction: Transaction, image_id: str, tag: str, label: DataModel | None, entry: ImageLabelModel
    ) -> int:
        """Store a label that has no revision, such as one copied into the folder, as a revision before it is replaced.

        Returns:
            the number of the last revision.
        """
        number = self.revisions.last_number(image_id, tag)
        file = self._label_file(image_id, tag, label.ext) if label else None
        if label is None or file is None or not file.is_file():
            return number
        if label.info.get("revision") == number and label.info.get("checked") == file_state(file.stat()):
            return number
        newest = self.revisions.newest(image_id, tag)
        if newest is not None and newest.sha256 == checksum(file):
            return number
        info = without_server_fields(label.info)
        annotator = annotator_of(info) if info else ""
        more = {"image_file": file_of(image_id, entry)}
        self.revisions.stage(
            transaction, image_id, tag, number + 1, file, suffix=label.ext, annotator=annotator, info=info, **more
        )
        return number + 1

    def add_image(self, image_id: str, image_filename: str, image_info: dict[str, Any]) -> str:
        """Store a new volume and return its id; refuse the name of a volume with different content."""
        suffix = checked_suffix(image_filename, VOLUME_SUFFIXES)
        name = checked_image_id((image_id or Path(image_filename).name).removesuffix(suffix))
        if split_suffix(name + suffix) != (name, suffix) or (name + suffix).lower().endswith(".seg.nrrd"):
            raise HTTPException(400, f"{name!r} cannot be an image id; use a name without a file suffix")
        self._refuse_read_only()
        info = checked_info(image_info)
        try:
            LoadVolumed("image")({"image": image_filename})
        except InvalidVolume as error:
            raise HTTPException(422, str(error).replace(Path(image_filename).name, name)) from error
        with self._changing() as (objects, transaction):
            case, number = self.naming.split(name)
            there = Path(self._datastore_path) / (name + suffix)
            if number is not None and there.is_file() and filecmp.cmp(image_filename, there, shallow=False):
                return case if case in objects else name
            if name in objects and filecmp.cmp(image_filename, self._image_file(name, objects[name]), shallow=False):
                return name
            root = Path(self._datastore_path)
            refuse_taken(name, suffix, image_filename, root, objects, self.revisions.known(), self.trash)
            target = root / (name + suffix)
            transaction.copy(Path(image_filename), target, new=True)
            if number is not None and len(self.naming.suffixes) > 1 and case in objects:
                # A further sequence of a case.
                return case
            if number is not None and case not in self.revisions.known():
                name = case
            info = {**without_server_fields(info), "ts": int(time.time()), "name": target.name, "file": target.name}
            objects[name] = ImageLabelModel(image=DataModel(info=info, ext=suffix))
        return name

    def remove_image(self, image_id: str) -> None:
        """Move a volume (a link, not its target) and its labels to the trash; the labels' revisions stay."""
        with self._changing() as (objects, transaction):
            entry = self._entry(objects, image_id)
            labels = {tag: label.info.get("revision", 0) for tag, label in entry.labels.items()}
            file = self._image_file(image_id, entry)
            known = {"file": file_of(image_id, entry), "info": entry.image.info}
            place = self.trash.stage(transaction, "image", image_id, labels=labels, **known)
            # Labels first: if they outlived their volume, they would count as labels of the next volume with its name.
            for tag in entry.labels:
                self._stage_removal(transaction, image_id, tag, entry, place)
            if os.path.lexists(file):
                transaction.move(file, place / "image" / file.name)
            for other in self.naming.files_of(file):
                # Else they would be a new case.
                if other != file and os.path.lexists(other):
                    transaction.move(other, place / "sequences" / other.name)
            del objects[image_id]
        self._copies.forget(image_id)

    def bring_back(self, name: str, annotator: str) -> str:
        """Move an entry of the trash back to where it was, and return the id of its volume.

        Raises:
            HTTPException: 404 for an unknown entry, 409 if its place is taken.
        """
        entry = self.trash.get(name)
        files = self.trash.files(entry) if entry is not None else {}
        if entry is None or not files:
            raise HTTPException(404, f"there is nothing named {name!r} in the trash")
        if entry.kind == "damaged label":
            raise HTTPException(409, f"{name!r} is a damaged file; the label was restored from its revision")
        image_id = entry.image
        with self._changing() as (objects, transaction):
            # An earlier call may have restored some files already.
            if "image" in files:
                target = Path(self._datastore_path) / entry.file
                if image_id in objects or os.path.lexists(target):
                    raise HTTPException(409, f"a different volume has taken the id or the place of {image_id!r}")
                transaction.move(files["image"], target)
                for other in self.trash.sequences(entry):
                    if not os.path.lexists(target.with_name(other.name)):
                        transaction.move(other, target.with_name(other.name))
                suffix = (split_suffix(target.name) or ("", ""))[1]
                info = {**checked_info(dict(entry.info)), "file": entry.file}
                objects[image_id] = ImageLabelModel(image=DataModel(info=info, ext=suffix))
            before = self._entry(objects, image_id)
            for tag in PLAIN_TAGS:
                if tag in files and tag not in before.labels:
                    ext = checked_suffix(files[tag].name)
                    transaction.move(files[tag], self._label_file(image_id, tag, ext))
                    objects[image_id] = _with_label(objects[image_id], tag, label_entry(image_id, ext, {}))
        for tag, number in entry.labels.items():
            if tag in files and tag not in PLAIN_TAGS and tag not in before.labels:
                number = number or self.revisions.last_number(image_id, tag) - 1
                try:
                    self.restore_label(image_id, number, annotator, tag)
                except HTTPException as error:
                    if error.status_code != 422:
                        raise
                    # It was already unusable before it was deleted.
                    self._bring_back_unusable(image_id, tag, files[tag])
        self.trash.forget(entry)
        return image_id

    def _bring_back_unusable(self, image_id: str, tag: str, file: Path) -> None:
        ext = checked_suffix(file.name)
        with self._changing() as (objects, transaction):
            transaction.move(file, self._label_file(image_id, tag, ext))
            label = label_entry(image_id, ext, unchecked_fields({}))
            objects[image_id] = _with_label(self._entry(objects, image_id), tag, label)
        self._check([(image_id, tag)])

    def update_image_info(self, image_id: str, info: dict[str, Any]) -> None:
        """Merge ``info`` into the metadata of a volume."""
        more = without_server_fields(checked_info(info))
        with self._changing() as (objects, _):
            entry = self._entry(objects, image_id)
            image = entry.image.model_copy(update={"info": {**entry.image.info, **more}})
            objects[image_id] = entry.model_copy(update={"image": image})

    def update_label_info(self, label_id: str, label_tag: str, info: dict[str, Any]) -> None:
        """Merge ``info`` into the metadata of a label; what was annotated can only be set by submitting the label."""
        # A change of the metadata does not change the label's annotator.
        more = {key: value for key, value in client_fields(checked_info(info)).items() if key != "client_id"}
        for name in ("annotated", FIELD):
            if name in more:
                raise HTTPException(400, f"{name} is a part of the label; submit the label again with it")
        with self._changing() as (objects, _):
            entry = self._entry(objects, label_id)
            label = self._label(label_id, label_tag)
            label = label.model_copy(update={"info": {**label.info, **more}})
            objects[label_id] = _with_label(entry, label_tag, label)


def _with_label(entry: ImageLabelModel, tag: str, label: DataModel | None) -> ImageLabelModel:
    labels = {name: known for name, known in entry.labels.items() if name != tag}
    if label is not None:
        labels[tag] = label
    return entry.model_copy(update={"labels": labels})


@contextmanager
def _mapped_copy(
    file: Path, image: Path, image_id: str, names: Sequence[str], project: Sequence[str]
) -> Iterator[Path]:
    """Yield a temporary copy of a label with the values of the project's list."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "label.nii.gz"
        write_mapped(file, image, image_id, names, project, copy)
        yield copy


def _text(value: Any) -> str | None:
    return str(value) if value else None
