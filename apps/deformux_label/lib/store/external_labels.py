"""Checks of labels changed outside this server: each matches a revision, is new, or cannot be used.

Reading a label and its scan takes a second, and there may be thousands. It happens in the background or when a label is
used, and only once for each state of a file.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from fastapi import HTTPException
from monailabel.datastore.local import DataModel, LocalDatastoreModel

from deformux_label.lib.store.annotated_slices import FIELD, with_annotated_slices
from deformux_label.lib.store.annotator import annotator_of
from deformux_label.lib.store.crash_recovery import label_entry, restore_revision, revision_entry
from deformux_label.lib.store.label_check import checked_labels
from deformux_label.lib.store.label_fields import file_state, unusable_fields, without_server_fields
from deformux_label.lib.store.label_revisions import Revision, Revisions, checksum
from deformux_label.lib.store.transaction import Transaction
from deformux_label.lib.store.trash import Trash
from deformux_label.lib.store.volumes import LABEL_SUFFIXES, split_suffix

__all__ = ["BackgroundChecks", "LabelContext", "LabelToCheck", "Verdict", "apply_verdict", "judge", "lower_priority"]

logger = logging.getLogger(__name__)

_SERVER = "server"
_SUBMIT_FIELDS = frozenset({"annotated", FIELD, "client_id", "label_info", "model_version", "user"})


@dataclass(frozen=True)
class Verdict:
    """The result of checking a label's file.

    Args:
        image, tag: the label.
        file, state: its file, and the file's state at the check.
        revision: the revision that the file matches, or the one that must replace it.
        replace: whether ``revision`` must become the current label again.
        usable: for a label made by hand, a file with the project's values in its scan's voxel order; ``file`` itself if
            it has both.
        reason: why the label cannot be used, or why it must be replaced.
    """

    image: str
    tag: str
    file: Path
    state: str
    revision: Revision | None = None
    replace: bool = False
    usable: Path | None = None
    reason: str = ""


@dataclass(frozen=True)
class LabelToCheck:
    """A label to check, and the project's labels."""

    tag: str
    file: Path
    image_id: str
    image: Path
    names: Sequence[str]


@dataclass(frozen=True)
class LabelContext:
    """Everything that applying a verdict needs.

    ``image_file`` is the volume's path in the studies; ``warn`` takes a warning for the operator.
    """

    model: LocalDatastoreModel
    revisions: Revisions
    trash: Trash
    transaction: Transaction
    names: Sequence[str]
    slice_rule: str
    image_file: str
    warn: Callable[[str], None]


def judge(label: LabelToCheck, held: DataModel, revisions: Revisions, stack: ExitStack) -> Verdict:
    """Check a label's file and return the verdict; ``stack`` keeps its temporary files until it is applied."""
    tag, file, image_id = label.tag, label.file, label.image_id
    state = file_state(file.stat())
    newest = revisions.newest(image_id, tag)
    content = checksum(file)
    if newest is not None and newest.sha256 == content:
        return Verdict(image_id, tag, file, state, revision=newest)
    if newest is not None and held.info.get("checked") == state and held.info.get("revision") == newest.number:
        kept = revisions.newest_intact(image_id, tag)
        if kept is not None:
            reason = "its file has changed although nothing wrote to it: check the disk"
            return Verdict(image_id, tag, file, state, revision=kept, replace=True, reason=reason)
    # After an interrupted save, the index does not record the file as checked.
    interrupted = newest is not None and not newest.deleted and "checked" not in held.info
    if interrupted and any(revision.sha256 == content for revision in revisions.history(image_id, tag)):
        return Verdict(image_id, tag, file, state, revision=newest, replace=True, reason="a crash interrupted a save")
    try:
        usable = stack.enter_context(checked_labels(file, label.image, image_id, label.names, {}))
        return Verdict(image_id, tag, file, state, usable=usable)
    except HTTPException as error:
        kept = revisions.newest_intact(image_id, tag)
        return Verdict(image_id, tag, file, state, revision=kept, replace=kept is not None, reason=str(error.detail))


def apply_verdict(verdict: Verdict, held: DataModel, studies: LabelContext) -> DataModel:
    """Add the file changes that a verdict requires to the transaction, and return the label's entry."""
    suffix = (split_suffix(verdict.file.name, LABEL_SUFFIXES) or ("", ""))[1]
    if verdict.revision is not None and not verdict.replace:
        return revision_entry(verdict.revision, suffix, checked=verdict.state)
    if verdict.revision is not None:
        return _restore(verdict, verdict.revision, studies)
    if verdict.usable is None:
        logger.warning("The label %s of image %s is not used: %s", verdict.file, verdict.image, verdict.reason)
        info = unusable_fields(held.info, verdict.reason, verdict.state, list(studies.names))
        return label_entry(verdict.image, suffix, info)
    return _store_external(verdict, verdict.usable, held, suffix, studies)


def _restore(verdict: Verdict, revision: Revision, studies: LabelContext) -> DataModel:
    image, tag = verdict.image, verdict.tag
    known = any(kept.sha256 == checksum(verdict.file) for kept in studies.revisions.history(image, tag))
    if not known:
        place = studies.trash.stage(studies.transaction, "damaged label", image, labels={tag: revision.number})
        studies.transaction.move(verdict.file, place / "labels" / tag / verdict.file.name)
    elif verdict.file.name != image + revision.suffix:
        studies.transaction.remove(verdict.file)
    studies.warn(
        f"the label {tag!r} of image {image!r} was restored from its revision {revision.number}: {verdict.reason}"
    )
    return restore_revision(studies.model, studies.revisions, studies.transaction, revision)


def _store_external(verdict: Verdict, usable: Path, held: DataModel, suffix: str, studies: LabelContext) -> DataModel:
    """Store a label that was copied in or edited by hand as a revision, and a converted copy as a second revision."""
    image, tag = verdict.image, verdict.tag
    number = studies.revisions.last_number(image, tag) + 1
    info = without_server_fields(held.info)
    if "checked" in held.info or "revision" in held.info:
        # These fields describe the file as it was before the edit.
        info = {key: value for key, value in info.items() if key not in _SUBMIT_FIELDS}
    annotator = annotator_of(info) if _SUBMIT_FIELDS & info.keys() else ""
    info = with_annotated_slices(info, usable, studies.slice_rule)
    more = {"labels": list(studies.names), "image_file": studies.image_file}
    revision = studies.revisions.stage(
        studies.transaction, image, tag, number, verdict.file, suffix=suffix, annotator=annotator, info=info, **more
    )
    if usable == verdict.file:
        logger.info("The label %s of image %s was copied or drawn by hand; it is used", verdict.file, image)
        return revision_entry(revision, suffix, checked=verdict.state)
    new_suffix = (split_suffix(usable.name, LABEL_SUFFIXES) or ("", ".nii.gz"))[1]
    revision = studies.revisions.stage(
        studies.transaction, image, tag, number + 1, usable, suffix=new_suffix, annotator=_SERVER, info=info, **more
    )
    target = verdict.file.with_name(image + new_suffix)
    temporary = studies.transaction.copy(usable, target)
    if verdict.file.name != target.name:
        studies.transaction.remove(verdict.file)
    logger.info("The label %s of image %s was copied by hand; it is used in its scan's order", verdict.file, image)
    return revision_entry(revision, new_suffix, checked=file_state(temporary.stat()))


def lower_priority() -> None:
    """Lower this thread's priority, so that requests come first; Linux has a priority for each thread."""
    if hasattr(os, "setpriority"):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


class BackgroundChecks:
    """A thread that checks labels in small batches and ends when none are left."""

    _BATCH_SIZE = 16

    def __init__(self, check: Callable[[Sequence[tuple[str, str]]], None]) -> None:
        self._check = check
        self._waiting: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._condition = threading.Condition()
        self._running = False

    def add(self, labels: Iterable[tuple[str, str]]) -> None:
        """Queue labels, as (image, tag), to be checked; each is checked once."""
        with self._condition:
            self._waiting.update(dict.fromkeys(labels))
            if self._waiting and not self._running:
                self._running = True
                threading.Thread(target=self._run, name="label checks", daemon=True).start()

    def wait(self, seconds: float) -> bool:
        """Wait until all labels are checked; return False after a timeout."""
        with self._condition:
            return self._condition.wait_for(lambda: not self._running, timeout=seconds)

    def _run(self) -> None:
        lower_priority()
        start = time.monotonic()
        number = 0
        while True:
            with self._condition:
                some = [self._waiting.popitem(last=False)[0] for _ in range(min(self._BATCH_SIZE, len(self._waiting)))]
                if not some:
                    self._running = False
                    self._condition.notify_all()
                    break
            try:
                self._check(some)
            except Exception as error:  # the next batch may succeed; these labels are checked again when used
                logger.warning("Labels could not be checked: %s", error)
            number += len(some)
        logger.info("Checked %d labels in %.0f seconds", number, time.monotonic() - start)
