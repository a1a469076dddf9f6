"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["replacing", "sync_folder", "umask", "write_text"]


@contextmanager
def replacing(path: Path, *, mode: int | None = None) -> Iterator[Path]:
    """Yield a temporary path that replaces ``path``, synced to disk, when the block ends without an error.

    ``mode`` sets the file's permissions, which are never wider; without it they are those of any new file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Keep the suffix: some writers choose the format by it.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".writing-", suffix="".join(path.suffixes))
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        # mkstemp makes files that only the owner can read.
        temporary.chmod(0o666 & ~umask() if mode is None else mode)
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, mode: int | None = None) -> None:
    """Replace a text file atomically; ``mode`` as in ``replacing``."""
    with replacing(path, mode=mode) as temporary:
        temporary.write_text(text)


def sync_folder(folder: Path) -> None:
    """Sync a folder to disk: until then a power cut undoes a rename in it."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows cannot open a folder
        return
    with suppress(OSError):  # some network file systems refuse to sync a folder; the file itself is safe
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def umask() -> int:
    """Return the permissions that new files do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
