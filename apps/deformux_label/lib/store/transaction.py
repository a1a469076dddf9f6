"""Changes of several files that happen together or not at all, even on a full disk."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from deformux.data.atomic_files import sync_folder, umask

__all__ = ["WRITING", "Transaction", "all_or_nothing", "place"]

logger = logging.getLogger(__name__)

# Hidden, so that it is not taken for a volume. The holder of the studies' lock may delete leftovers of a crash.
WRITING = ".writing-"


@dataclass
class _Step:
    """A rename of a finished temporary file (``written``) or of an existing file.

    ``before`` keeps the former ``target``; ``new`` refuses an existing target.
    """

    source: Path
    target: Path
    written: bool
    new: bool = False
    before: Path | None = None
    done: bool = False


@dataclass
class Transaction:
    """Renames that ``all_or_nothing`` makes together at its end, in the order of the calls."""

    _steps: list[_Step] = field(default_factory=list)
    _hidden: list[Path] = field(default_factory=list)
    _folders: list[Path] = field(default_factory=list)

    def write(self, target: Path, *, new: bool = False) -> Path:
        """Return a temporary path next to ``target``; the file written there will replace ``target``.

        With ``new``, the transaction fails if ``target`` exists.
        """
        temporary = self._temporary(target)
        self._steps.append(_Step(temporary, target, written=True, new=new))
        return temporary

    def write_text(self, target: Path, text: str) -> None:
        """Replace ``target`` with a text file."""
        self.write(target).write_text(text, encoding="utf-8")

    def copy(self, source: Path, target: Path, *, new: bool = False) -> Path:
        """Copy a file to ``target``, and return the temporary path of the copy."""
        temporary = self.write(target, new=new)
        shutil.copyfile(source, temporary)
        return temporary

    def move(self, source: Path, target: Path) -> None:
        """Rename ``source`` to ``target``, which must not exist; a link is renamed, not followed."""
        self._make_folder(target.parent)
        self._steps.append(_Step(source, target, written=False))

    def remove(self, path: Path) -> None:
        """Delete a file, or a link itself."""
        self._steps.append(_Step(path, self._temporary(path), written=False))

    def _temporary(self, target: Path) -> Path:
        self._make_folder(target.parent)
        # Keep the suffix: some writers choose the format by it.
        suffix = "".join(target.suffixes)[-40:]
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=WRITING, suffix=suffix)
        os.close(handle)
        self._hidden.append(Path(name))
        return Path(name)

    def _make_folder(self, folder: Path) -> None:
        missing = [folder, *folder.parents]
        missing = missing[: next(index for index, path in enumerate(missing) if path.is_dir())]
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
            self._folders.append(path)

    def _prepare(self) -> None:
        """Do everything that needs disk space before anything changes."""
        for step in self._steps:
            if step.written:
                with step.source.open("rb") as written:
                    os.fsync(written.fileno())
                # mkstemp makes private files; a label must be as readable as other files.
                step.source.chmod(0o666 & ~umask())
        for step in self._steps[:-1]:
            if step.written and os.path.lexists(step.target):
                step.before = _twin(step.target)
                self._hidden.append(step.before)

    def _commit(self) -> None:
        try:
            for step in self._steps:
                if step.new:
                    _place_new(step.source, step.target)
                else:
                    place(step.source, step.target, replace=step.written or step.target in self._hidden)
                step.done = True
        except BaseException:
            for step in reversed(self._steps):
                if step.done:
                    try:
                        _undo(step)
                    except OSError as error:
                        logger.error("%s could not be restored: %s", step.target, error)
            raise

    def _clean(self, *, failed: bool) -> None:
        for path in self._hidden:
            with suppress(OSError):
                path.unlink(missing_ok=True)
        for folder in reversed(self._folders) if failed else ():
            with suppress(OSError):  # the folder is in use by now
                folder.rmdir()


@contextmanager
def all_or_nothing() -> Iterator[Transaction]:
    """Collect file changes, and make them at the end of the block unless it raises.

    New files are written completely, next to their targets, before the first rename, so that a full disk is noticed
    before anything changes. If a rename fails, the earlier ones are undone, which needs no space. A crash between
    renames leaves the earlier ones done and the rest undone.
    """
    transaction = Transaction()
    try:
        yield transaction
        transaction._prepare()
        transaction._commit()
    except BaseException:
        transaction._clean(failed=True)
        raise
    transaction._clean(failed=False)


def place(source: Path, target: Path, *, replace: bool = False) -> None:
    """Rename a file or a link (not its target), also to another file system, and sync it to disk.

    Raises:
        FileExistsError: ``target`` exists and ``replace`` is False.
    """
    if not replace and os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, "already exists", str(target))
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        _copy_entry(source, target)
        try:
            source.unlink()
        except OSError:
            target.unlink(missing_ok=True)
            raise
    sync_folder(target.parent)


def _place_new(source: Path, target: Path) -> None:
    """Rename a file to a name that must not exist; only one of two simultaneous calls succeeds."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        place(source, target)
        return
    sync_folder(target.parent)


def _copy_entry(source: Path, target: Path) -> None:
    if source.is_symlink():
        target.unlink(missing_ok=True)
        target.symlink_to(os.readlink(source))
        return
    try:
        shutil.copy2(source, target)
        with target.open("rb") as written:
            os.fsync(written.fileno())
    except OSError:
        target.unlink(missing_ok=True)
        raise


def _twin(path: Path) -> Path:
    """Return a hard link to a file or link (a copy where links fail) that survives its replacement."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=WRITING)
    os.close(handle)
    twin = Path(name)
    try:
        twin.unlink()
        os.link(path, twin, follow_symlinks=False)
    except OSError:
        try:
            _copy_entry(path, twin)
        except OSError:
            twin.unlink(missing_ok=True)
            raise
    return twin


def _undo(step: _Step) -> None:
    if not step.written:
        place(step.target, step.source, replace=True)
    elif step.before is not None:
        place(step.before, step.target, replace=True)
    else:
        step.target.unlink(missing_ok=True)
