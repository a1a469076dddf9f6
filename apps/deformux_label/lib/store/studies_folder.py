"""A studies folder on disk: its index, its lock, and changes made by hand."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from fastapi import HTTPException
from filelock import FileLock
from monailabel.config import settings
from monailabel.datastore.local import DataModel, ImageLabelModel, LocalDatastore, LocalDatastoreModel
from monailabel.interfaces.datastore import DefaultLabelTag

from deformux.data.sequences import SequenceNaming
from deformux.data.volume_reader import VOLUME_SUFFIXES
from deformux_label.lib.requests.identifiers import checked_tag
from deformux_label.lib.store import external_labels
from deformux_label.lib.store.crash_recovery import Reconciled, file_of, reconcile
from deformux_label.lib.store.index_file import IndexFile
from deformux_label.lib.store.label_fields import PLAIN_TAGS, file_state, why_unusable
from deformux_label.lib.store.label_names import LabelCopies, names_of
from deformux_label.lib.store.label_revisions import Revisions, checksum, inside
from deformux_label.lib.store.notices import Notices
from deformux_label.lib.store.project_record import ProjectRecord
from deformux_label.lib.store.scan_check import ScanChecks
from deformux_label.lib.store.transaction import WRITING, Transaction, all_or_nothing
from deformux_label.lib.store.trash import Trash
from deformux_label.lib.store.volumes import LABEL_SUFFIXES, split_suffix
from deformux_label.lib.store.watcher import StudiesWatcher

__all__ = ["StudiesError", "StudiesFolder"]

logger = logging.getLogger(__name__)

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# A start waits this long for labels to be checked; the rest is checked in the background.
_WAIT_FOR_CHECKS_S = 5.0


class StudiesError(ValueError):
    """The folder cannot be served; the message is one sentence."""


class StudiesFolder(LocalDatastore):
    """The index of a folder, kept in step with the files and with the writes of other processes.

    Args:
        folder: the studies.
        labels: the project's labels; None for tools, which use the options of the last start.
        image_channels: how the files of a case's sequences are named; without it each file is a case.
        slice_rule: which slices of a submitted label count as annotated, one of ``SLICE_RULES``.

    Raises:
        StudiesError: the folder cannot be read, or its labels belong to a different project.
    """

    _datastore: LocalDatastoreModel

    def __init__(
        self, folder: str, *, labels: Sequence[str] | None, image_channels: str = "", slice_rule: str = "auto"
    ) -> None:
        # Skips MONAI Label's constructor, which writes at once and lists the folder differently.
        self._datastore_path = os.path.realpath(folder)
        self._datastore_config_path = os.path.join(self._datastore_path, "datastore_v2.json")
        self._lock_file = os.path.join(self._datastore_path, ".lock")
        self._extensions = [f"*{suffix}" for suffix in VOLUME_SUFFIXES]
        self._auto_reload = settings.MONAI_LABEL_DATASTORE_AUTO_RELOAD
        self.notices = Notices()
        self.slice_rule = slice_rule
        self.read_only = _cannot_write(self._datastore_path) or bool(settings.MONAI_LABEL_DATASTORE_READ_ONLY)
        # One re-entrant lock; MONAI Label opens a new one for each step.
        self._lock: AbstractContextManager[Any] = threading.RLock() if self.read_only else FileLock(self._lock_file)
        self._index = IndexFile(Path(self._datastore_config_path))
        state = Path(self._datastore_path) / ".deformux"
        self.revisions = Revisions(state / "revisions")
        self.trash = Trash(state / "trash")
        self._copies = LabelCopies(None if self.read_only else state / "mapped")
        self._checks = external_labels.BackgroundChecks(self._check)
        self._scans: ScanChecks | None = None
        self.unusable_scans: frozenset[str] = frozenset()
        self._files: Reconciled | None = None
        self._datastore = LocalDatastoreModel(
            name="new-dataset", description="New Dataset", images_dir=".", base_path=self._datastore_path
        )
        self._open(state, labels, image_channels)

    def _open(self, state: Path, labels: Sequence[str] | None, image_channels: str) -> None:
        if self.read_only:
            self.notices.warn(
                f"the studies folder {self._datastore_path!r} cannot be written to: inference works, and labels, "
                "uploads and training are refused"
            )
        else:
            for tag in (DefaultLabelTag.FINAL.value, DefaultLabelTag.ORIGINAL.value):
                self._make_label_folder(tag)
            with self._lock:
                # Writers hold the lock, so these are leftovers of a crash.
                root = Path(self._datastore_path)
                for leftover in (*root.glob(f"{WRITING}*"), *root.glob(f"labels/*/{WRITING}*")):
                    leftover.unlink(missing_ok=True)
                self.revisions.clean()
        record = self._read_record(state / "project.json", labels, image_channels)
        self.labels = record.labels
        self.naming = SequenceNaming.parse(record.image_channels)
        self._unnamed = record.unnamed
        self._init_from_datastore_file()
        self.refresh()
        if labels is not None:
            self._refuse_foreign_labels()
            self._write_record(record, state / "project.json")
        if self._auto_reload and labels is not None:
            StudiesWatcher(
                self._datastore_path,
                self._datastore_config_path,
                is_unknown_change=self._is_unknown_change,
                refresh=self.refresh,
                reload=self._init_from_datastore_file,
            ).start()

    def _read_record(self, path: Path, labels: Sequence[str] | None, image_channels: str) -> ProjectRecord:
        if labels is None:
            return ProjectRecord.read(path) or ProjectRecord((), ())
        with self._lock:
            return ProjectRecord.begin(path, labels, self.notices.warn, image_channels=image_channels)

    def _write_record(self, record: ProjectRecord, path: Path) -> None:
        if self.read_only:
            return
        with self._lock:
            try:
                record.write(path)
            except OSError as error:
                self.notices.warn(f"the project's labels could not be recorded: {error.strerror or error}")

    def _make_label_folder(self, tag: str) -> None:
        try:
            os.makedirs(self._label_folder(tag), exist_ok=True)
        except OSError as error:
            raise StudiesError(
                f"the studies must have a folder labels/{tag}, or room for it; it cannot be made: "
                f"{error.strerror or error}"
            ) from error

    def _refuse_foreign_labels(self) -> None:
        stored = {
            names_of(label.info, self._unnamed)
            for entry in self._datastore.objects.values()
            for tag, label in entry.labels.items()
            if tag not in PLAIN_TAGS and why_unusable(label.info) is None
        }
        if stored and not any(set(names) & set(self.labels) for names in stored):
            there = ", ".join(sorted({name for names in stored for name in names}))
            raise StudiesError(
                f"the labels stored in {self._datastore_path} are of {there}, and none of them is among the given "
                f"labels {', '.join(self.labels)}; start with labels that they have, or with another studies folder"
            )

    # Paths.

    def _image_file(self, image_id: str, entry: ImageLabelModel) -> Path:
        """Return the file of a volume in the studies, or the link to it."""
        root = Path(self._datastore_path)
        path = root / file_of(image_id, entry)
        if ".." in path.parts:
            raise HTTPException(409, f"the index places image {image_id!r} outside the studies folder")
        return inside(root, path.parent) / path.name

    def _label_folder(self, tag: str) -> Path:
        """Return the folder of a tag's labels."""
        folder = Path(self._datastore.label_path(checked_tag(tag)))
        return inside(Path(self._datastore_path), folder)

    def _label_file(self, image_id: str, tag: str, suffix: str) -> Path:
        if suffix.lower() not in LABEL_SUFFIXES:
            raise HTTPException(409, f"the index gives the label {tag!r} of {image_id!r} the suffix {suffix!r}")
        return self._label_folder(tag) / (image_id + suffix)

    # Changes.

    def _refuse_read_only(self) -> None:
        if self.read_only:
            raise HTTPException(
                409, "the studies folder cannot be written to, so only inference works; nothing was changed"
            )

    @contextmanager
    def _changing(self) -> Iterator[tuple[dict[str, ImageLabelModel], Transaction]]:
        """Hold the lock, and yield the entries on disk and a transaction; write both at the end, or neither.

        Replace entries; never change them in place.
        """
        self._refuse_read_only()
        with self._lock:
            self._init_from_datastore_file()
            before = self._datastore.objects
            objects = dict(before)
            changed = None
            with all_or_nothing() as transaction:
                yield objects, transaction
                replaced = any(objects[key] is not before[key] for key in objects.keys() & before.keys())
                if objects.keys() != before.keys() or replaced or self._index.repaired or not self._index.path.exists():
                    changed = self._datastore.model_copy(update={"objects": objects})
                    self._index.write(changed, transaction.write(self._index.path))
            if changed is not None:
                self._index.mark_written()
                self._datastore = changed

    def _init_from_datastore_file(self, throw_exception: bool = False) -> None:
        with self._lock:
            try:
                model = self._index.changed()
            except ValueError as error:
                aside = self._index.path if self.read_only else self._index.put_aside()
                logger.error("The index cannot be read: %s", str(error).splitlines()[0])
                self.notices.warn(f"the index was damaged; it is kept as {aside}, and rebuilt from the files")
                return
            if model is not None:
                model.base_path = self._datastore_path
                self._datastore = model

    def _update_datastore_file(self, lock: bool = True) -> None:
        with self._lock, all_or_nothing() as transaction:
            self._index.write(self._datastore, transaction.write(self._index.path))
        self._index.mark_written()

    def refresh(self) -> None:
        """Find files that were added or removed by hand; check new labels in the background."""
        self._reconcile_datastore()
        self._checks.wait(_WAIT_FOR_CHECKS_S)
        if self._scans is not None:
            self.check_scans()

    def check_scans(self) -> Mapping[str, str]:
        """Read the headers of all scans, now and after each refresh; each takes a few milliseconds.

        Returns:
            file to the reason, for unusable scans; they are logged once.
        """
        if self._scans is None:
            self._scans = ScanChecks()
        objects = self._datastore.objects
        images: dict[str, str] = {}
        paths: dict[str, Path] = {}
        for image, entry in objects.items():
            for path in self.naming.files_of(self._image_file(image, entry)):
                # A missing sequence is passed over.
                file = str(PurePosixPath(file_of(image, entry)).with_name(path.name))
                images[file], paths[file] = image, path
        reasons = self._scans.check(paths)
        self.unusable_scans = frozenset(images[file] for file in reasons)
        self.notices.log_new("Not usable", reasons)
        return reasons

    def check_files(self) -> None:
        """Read all scans' headers and all labels' bytes, in this thread at low priority."""
        external_labels.lower_priority()
        self.check_scans()
        for image_id, entry in self._datastore.objects.items():
            for tag, label in entry.labels.items():
                if tag not in PLAIN_TAGS and self._is_corrupted(image_id, tag, label):
                    self._checks.add([(image_id, tag)])

    def _is_corrupted(self, image_id: str, tag: str, label: DataModel) -> bool:
        """Return whether a label's file differs from its revision; a failing disk does not change its time."""
        if self.read_only or why_unusable(label.info) is not None:
            return False
        newest = self.revisions.newest(image_id, tag)
        if newest is None or newest.deleted or newest.number != label.info.get("revision"):
            return False
        try:
            return checksum(self._label_file(image_id, tag, label.ext)) != newest.sha256
        except OSError:
            return False

    def _reconcile_datastore(self) -> None:
        try:
            if self.read_only:
                found = self._reconciled(self._datastore.objects, None)
                self._datastore = self._datastore.model_copy(update={"objects": found.objects})
            else:
                with self._changing() as (objects, transaction):
                    found = self._reconciled(objects, transaction)
                    objects.clear()
                    objects.update(found.objects)
        except OSError as error:
            if error.errno not in _DISK_FULL:
                raise
            self.notices.warn("the disk of the studies is full, so files copied in by hand are not noticed")
            found = self._reconciled(self._datastore.objects, None)
            self._datastore = self._datastore.model_copy(update={"objects": found.objects})
        self._files = found
        self.notices.log_new("Not served", found.found.not_served)
        self.notices.log_new("A label without a volume", found.stray)
        if self.labels and not self.read_only:
            self._checks.add(found.to_check)

    def _reconciled(self, objects: Mapping[str, ImageLabelModel], transaction: Transaction | None) -> Reconciled:
        return reconcile(self._datastore, objects, self.revisions, transaction, self.labels, self.naming)

    def _check(self, labels: Sequence[tuple[str, str]]) -> None:
        """Check labels that changed outside this server, and update the index."""
        if self.read_only or not self.labels:
            return
        with ExitStack() as stack:
            verdicts = []
            for image_id, tag in labels:
                entry = self._datastore.objects.get(image_id)
                held = entry.labels.get(tag) if entry else None
                if entry is None or held is None:
                    continue
                file = self._label_file(image_id, tag, held.ext)
                if not file.is_file():
                    continue
                image = self._image_file(image_id, entry)
                label = external_labels.LabelToCheck(tag, file, image_id, image, self.labels)
                verdicts.append(external_labels.judge(label, held, self.revisions, stack))
            if not verdicts:
                return
            with self._changing() as (objects, transaction):
                for verdict in verdicts:
                    self._apply(verdict, objects, transaction)

    def _apply(
        self, verdict: external_labels.Verdict, objects: dict[str, ImageLabelModel], transaction: Transaction
    ) -> None:
        entry = objects.get(verdict.image)
        held = entry.labels.get(verdict.tag) if entry else None
        # A newer label has been saved meanwhile.
        if entry is None or held is None or not verdict.file.is_file():
            return
        if file_state(verdict.file.stat()) != verdict.state:
            return
        studies = external_labels.LabelContext(
            self._datastore,
            self.revisions,
            self.trash,
            transaction,
            self.labels,
            self.slice_rule,
            file_of(verdict.image, entry),
            self.notices.warn,
        )
        label = external_labels.apply_verdict(verdict, held, studies)
        objects[verdict.image] = entry.model_copy(update={"labels": {**entry.labels, verdict.tag: label}})

    def _is_unknown_change(self, kind: str, path: str) -> bool:
        """Return whether the index does not know a file's change yet, as it does for this server's own writes."""
        parts = os.path.relpath(path, self._datastore_path).split(os.sep)
        if parts[0] != "labels":
            file = "/".join(parts)
            if self._scans is not None and file in self._scans.reasons:
                return True
            if self.naming.split((split_suffix(parts[-1]) or ("", ""))[0])[1] is not None:
                # Perhaps not the first sequence, whose file alone the index holds.
                return True
            known = any(file_of(image, entry) == file for image, entry in self._datastore.objects.items())
            return known == (kind == "deleted")
        image_id, suffix = split_suffix(parts[-1], LABEL_SUFFIXES) or ("", "")
        entry = self._datastore.objects.get(image_id)
        label = entry.labels.get(parts[1]) if entry and len(parts) == 3 else None
        if label is None or label.ext != suffix or kind == "deleted":
            return (label is not None and label.ext == suffix) == (kind == "deleted")
        if parts[1] in PLAIN_TAGS:
            return False
        try:
            return label.info.get("checked") != file_state(os.stat(path))
        except OSError:
            return False


def _cannot_write(folder: str) -> bool:
    """Make a folder if it is missing, and return whether it is read-only.

    Raises:
        StudiesError: it is not a folder, or cannot be read.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        with os.scandir(folder):
            pass
    except OSError as error:
        raise StudiesError(
            f"studies must be a readable folder; {folder!r} cannot be read: {error.strerror or error}"
        ) from error
    return not os.access(folder, os.W_OK | os.X_OK)
