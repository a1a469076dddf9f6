"""The mutable state of a project, in one SQLite file: leases, tasks and their results."""

from __future__ import annotations

import errno
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

from deformux.data.atomic_files import replacing

__all__ = ["StateDatabase", "put_aside", "shortened_ascii"]

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")

_BUSY_S = 30.0
_TABLES = ("leases", "tasks", "results", "labels", "numbers", "set_aside")
_MAX_WARNINGS = 20
# Longest part of an invalid record that is kept, in characters.
_MAX_KEPT = 10_000
_SCHEMA = """
CREATE TABLE IF NOT EXISTS leases (
    image TEXT PRIMARY KEY, annotator TEXT NOT NULL, address TEXT NOT NULL,
    since REAL NOT NULL, until REAL NOT NULL, strategy TEXT NOT NULL, model_version TEXT
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS leases_until ON leases (until);
CREATE TABLE IF NOT EXISTS tasks (
    position INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, id TEXT NOT NULL UNIQUE, record TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS tasks_kind ON tasks (kind, position);
CREATE TABLE IF NOT EXISTS results (
    task TEXT NOT NULL, image TEXT NOT NULL, stored INTEGER NOT NULL, detail TEXT NOT NULL, PRIMARY KEY (task, image)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS labels (
    image TEXT PRIMARY KEY, current TEXT NOT NULL, trained TEXT
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS numbers (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS set_aside (
    time REAL NOT NULL, kind TEXT NOT NULL, record TEXT NOT NULL, reason TEXT NOT NULL
);
"""
_LOST = (
    "the project's state was damaged and has been reset: leases are forgotten, and queued trainings are lost, so "
    "ask for them again; the damaged file is kept as {}: remove it to end this warning"
)


class StateDatabase:
    """``<folder>/state.sqlite``, for all threads and processes of a project.

    A change is on disk once ``change`` returns (write-ahead log, ``synchronous=FULL``): neither kill -9 nor a power
    failure undoes it. A damaged file is put aside and replaced by an empty one; an invalid record is set aside.
    ``warnings`` reports both.

    Args:
        folder: the project's state folder; made at the first read or write.
        on_open: called with the open database, in a transaction, for example to import the files of earlier versions;
            its result is called once that transaction is on disk.
    """

    def __init__(
        self, folder: Path, *, on_open: Callable[[sqlite3.Connection], Callable[[], None] | None] = lambda _: None
    ) -> None:
        self.path = folder / "state.sqlite"
        self._on_open = on_open
        self._lock = threading.RLock()
        self._open: tuple[sqlite3.Connection, tuple[int, ...]] | None = None
        self._warnings: list[str] = []

    def read(self, do: Callable[[sqlite3.Connection], _Result]) -> _Result:
        """Return the result of ``do``, which makes one query, or tolerates changes between its queries."""
        return self._with_connection(do)

    def change(self, do: Callable[[sqlite3.Connection], _Result]) -> _Result:
        """Return the result of ``do`` once its changes are on disk; nothing is changed if it raises.

        Raises:
            OSError: the disk is full.
        """

        def in_a_transaction(db: sqlite3.Connection) -> _Result:
            db.execute("BEGIN IMMEDIATE")
            try:
                result = do(db)
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise
            return result

        return self._with_connection(in_a_transaction)

    def set_aside(self, db: sqlite3.Connection, kind: str, record: object, reason: str) -> None:
        """Keep an invalid record in the table ``set_aside``, and warn."""
        text = shortened_ascii(record, _MAX_KEPT)
        logger.warning("A record of %s is set aside (%s): %s", kind, reason, shortened_ascii(record))
        self._warnings = [*self._warnings, f"a record of {kind} is invalid and is set aside: {reason}"][-_MAX_WARNINGS:]
        db.execute("INSERT INTO set_aside VALUES (?, ?, ?, ?)", (time.time(), kind, text, reason))
        db.execute("DELETE FROM set_aside WHERE rowid <= (SELECT max(rowid) FROM set_aside) - 1000")

    def warn(self, warning: str) -> None:
        """Add a sentence to ``warnings``."""
        logger.error("%s", warning)
        self._warnings = [*self._warnings, warning][-_MAX_WARNINGS:]

    def warnings(self) -> list[str]:
        """Return one sentence for each problem that an operator should know about."""
        try:
            names = sorted(entry.name for entry in os.scandir(self.path.parent))
        except FileNotFoundError:
            names = []
        damaged = [n for n in names if n.startswith(f"{self.path.name}.damaged-") and not n.endswith(("-wal", "-shm"))]
        return [_LOST.format(name) for name in damaged[-_MAX_WARNINGS:]] + self._warnings

    def _with_connection(self, do: Callable[[sqlite3.Connection], _Result]) -> _Result:
        with self._lock:
            try:
                return do(self._connection())
            except sqlite3.DatabaseError as error:
                _raise_if_full(error)
                if not _means_damage(error):
                    raise
                self._reset(error)
            return do(self._connection())

    def _connection(self) -> sqlite3.Connection:
        """Return the open database; reopen it after a fork, or if a different process has put the file aside."""
        if self._open is not None:
            db, identity = self._open
            if identity == self._identity():
                return db
            self._open = None
            if identity[-1] == os.getpid():
                db.close()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_suffix(".lock")):
            if not self._is_sound():
                self._put_aside("it cannot be read")
            if not self.path.exists():
                self._create()
            db = _connect(self.path)
            self._open = (db, self._identity())
            self._on_opened(db)
        return db

    def _on_opened(self, db: sqlite3.Connection) -> None:
        db.execute("BEGIN IMMEDIATE")
        try:
            after = self._on_open(db)
            db.execute("COMMIT")
        except BaseException:
            self._open = None
            db.close()
            raise
        if after is not None:
            after()

    def _identity(self) -> tuple[int, ...]:
        try:
            status = self.path.stat()
        except FileNotFoundError:
            return (0, 0, os.getpid())
        return (status.st_dev, status.st_ino, os.getpid())

    def _create(self) -> None:
        """Make the file under a temporary name, so that it never exists without tables, which counts as damage."""
        with replacing(self.path) as temporary:
            db = sqlite3.connect(temporary)
            db.executescript(_SCHEMA)
            db.close()

    def _is_sound(self) -> bool:
        if not self.path.exists():
            return True
        if not self.path.is_file() or self.path.stat().st_size == 0:
            return False
        try:
            db = _connect(self.path)
            try:
                sound = db.execute("PRAGMA quick_check(1)").fetchone()[0] == "ok"
                # Add the tables that the file of an earlier version lacks.
                db.executescript(_SCHEMA)
                for table in _TABLES:
                    db.execute(f"SELECT * FROM {table} LIMIT 1").fetchone()
            finally:
                db.close()
        except sqlite3.DatabaseError as error:
            _raise_if_full(error)
            if not _means_damage(error):
                raise
            return False
        return sound

    def _reset(self, error: Exception) -> None:
        if self._open is not None:
            self._open[0].close()
            self._open = None
        with FileLock(self.path.with_suffix(".lock")):
            if not self._is_sound():
                self._put_aside(str(error))

    def _put_aside(self, reason: str) -> None:
        if not self.path.exists():
            return
        aside = put_aside(self.path)
        for companion in ("-wal", "-shm"):
            if (file := self.path.with_name(self.path.name + companion)).exists():
                os.replace(file, f"{aside}{companion}")
        logger.error("%s (%s)", _LOST.format(aside), reason)


def put_aside(path: Path, word: str = "damaged") -> Path:
    """Rename a file to a free name in its folder, and return the new path."""
    aside = path.with_name(f"{path.name}.{word}-{time.strftime('%Y%m%d-%H%M%S')}")
    number = 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.{word}-{time.strftime('%Y%m%d-%H%M%S')}-{number}")
    os.replace(path, aside)
    return aside


def shortened_ascii(value: object, most: int = 300) -> str:
    """Return a value as ASCII, which can always be written and sent, shortened to ``most`` characters."""
    text = ascii(value)
    return text if len(text) <= most else f"{text[:most]}…"


def _connect(path: Path) -> sqlite3.Connection:
    # Transactions are begun explicitly; a lock serialises the threads of one object.
    db = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
    # Text that is not Unicode must not prevent a start; the reader sets the record aside.
    db.text_factory = lambda raw: raw.decode(errors="surrogateescape")
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=FULL")
    return db


def _raise_if_full(error: sqlite3.DatabaseError) -> None:
    if "disk is full" in str(error):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error


def _means_damage(error: sqlite3.DatabaseError) -> bool:
    """Return whether an error means a damaged or foreign file, unlike a lock or a full disk."""
    if type(error) is sqlite3.DatabaseError:
        return True
    return str(error).startswith(("no such table", "no such column", "table ", "unsupported file format", "malformed"))
