"""What commands did to studies, in the audit logs where servers write what they did."""

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
    """Return the audit logs of a studies folder: those of its projects, and the one in it, as far as they are there."""
    own = _log_in(studies)
    return [*_logs_of_projects(studies), *([own] if own.is_file() else [])]


@contextmanager
def recorded(studies: Path, what: str) -> Iterator[dict[str, Any]]:
    """Record what the block did, unless it raises: what it puts into the dictionary, and what the datastore notes.

    The line goes to every project of these studies, for it concerns each; where none has a log that this account may
    write, to a log in the studies. ``deformux-label audit --studies`` reads both.
    """
    from deformux_label.lib.requests.caller import Caller, calling
    from deformux_label.web.audit import AuditLog

    with calling(Caller()) as caller:
        yield caller.done
    # No login: the account of the operating system, which the address says.
    line = {"user": getpass.getuser(), "address": "command line", **caller.done}
    logs = [AuditLog(path) for path in _logs_of_projects(studies)]
    for log in logs:
        log.record(what, **line)
    if all(log.failure for log in logs):
        last = AuditLog(_log_in(studies))
        last.record(what, **line)
        if last.failure:
            typer.echo(f"deformux-label: it was done, but {last.failure} ({last.path}).", err=True)


def _log_in(studies: Path) -> Path:
    return studies / ".deformux" / "audit.jsonl"


def _logs_of_projects(studies: Path) -> list[Path]:
    """The logs in which a server's start notes this folder."""
    from deformux_label.web.audit import read_log

    place = str(studies.resolve())
    found = []
    for log in sorted((app_folder() / "model").glob("*/audit.jsonl")):
        try:
            records, _ = read_log(log)
        except OSError:
            # Another account's, of whatever studies.
            continue
        if any(record.values.get("studies") == place for record in records):
            found.append(log)
    return found
