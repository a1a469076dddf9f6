"""Audit records of commands that change studies, in the servers' logs."""

from __future__ import annotations

import getpass
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from deformux_label.cli.common import app_folder

__all__ = ["logs_of", "recorded"]


def logs_of(studies: Path) -> list[Path]:
    """Return the existing audit logs of a studies folder: those of its projects, and the one in the folder."""
    own = _log_in(studies)
    return [*_logs_of_projects(studies), *([own] if own.is_file() else [])]


@contextmanager
def recorded(studies: Path, what: str) -> Iterator[dict[str, Any]]:
    """Record an action after the block, unless it raises, with the values that the block and the datastore add.

    The record goes to the log of every project of these studies. If this account cannot write to any of them, it goes
    to a log in the studies. ``deformux-label audit --studies`` reads both.
    """
    from deformux_label.lib.requests.caller import Caller, calling
    from deformux_label.web.audit import AuditLog

    with calling(Caller()) as caller:
        yield caller.done
    # Without a login, the user is the operating system's account, as the address shows.
    line = {"user": getpass.getuser(), "address": "command line", **caller.done}
    logs = [AuditLog(path) for path in _logs_of_projects(studies)]
    for log in logs:
        log.record(what, **line)
    if all(log.failure for log in logs):
        last = AuditLog(_log_in(studies))
        last.record(what, **line)
        if last.failure:
            typer.echo(f"deformux-label: done, but {last.failure} ({last.path}).", err=True)


def _log_in(studies: Path) -> Path:
    return studies / ".deformux" / "audit.jsonl"


def _logs_of_projects(studies: Path) -> list[Path]:
    """Return the logs in which a server has recorded this folder at its start."""
    from deformux_label.web.audit import read_log

    place = str(studies.resolve())
    found = []
    for log in sorted((app_folder() / "model").glob("*/audit.jsonl")):
        try:
            records, _ = read_log(log)
        except OSError:
            # It belongs to another account.
            continue
        if any(record.values.get("studies") == place for record in records):
            found.append(log)
    return found
