"""``deformux-label users`` and ``deformux-label audit``: the users, and the log of their actions."""

from __future__ import annotations

import getpass
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from deformux_label.cli.common import app_folder, print_table, refuse, terminal_text
from deformux_label.lib.requests.roles import ROLES

if TYPE_CHECKING:
    from deformux_label.web.audit import Record
    from deformux_label.web.users import Users

__all__ = ["audit", "users_app"]


users_app = typer.Typer(
    help="The users who may log in. A change takes effect at once, also in running servers.", no_args_is_help=True
)

_Name = Annotated[str, typer.Argument(help="The user's name, as recorded with all of their work.")]
_Role = Annotated[str, typer.Option("--role", help=f"One of {', '.join(ROLES)}; each may do all that the earlier may.")]
_File = Annotated[Path | None, typer.Option("--users", help="The users file, if it is not the default one.")]
_Stdin = Annotated[bool, typer.Option("--password-stdin", help="Read the password from one line of standard input.")]


@users_app.command("add")
def add_user(name: _Name, role: _Role, file: _File = None, password_stdin: _Stdin = False) -> None:
    """Add a user; the first one switches the login on."""
    from deformux_label.web.users import checked_name

    users = _users(file)
    try:
        # Before asking for the password.
        checked_name(name)
        users.add(name, role, _password(password_stdin))
    except ValueError as error:
        refuse(str(error))
    _record_change(users, "add user", name, role=role)
    typer.echo(f"{name} may log in as {role}.")


@users_app.command("list")
def list_users(file: _File = None) -> None:
    """List the users with their roles."""
    try:
        found = _users(file).all()
    except ValueError as error:
        refuse(str(error))
    table = Table("name", "role", box=None)
    for user in found.values():
        table.add_row(user.name, user.role)
    print_table(table)


@users_app.command("remove")
def remove_user(name: _Name, file: _File = None) -> None:
    """Remove a user; their work stays recorded under their name."""
    users = _users(file)
    try:
        users.remove(name)
        left = len(users.all())
    except ValueError as error:
        refuse(str(error))
    _record_change(users, "remove user", name)
    typer.echo(f"{name} can no longer log in." + ("" if left else " No user is left, so no one can log in."))


@users_app.command("passwd")
def change_password(name: _Name, file: _File = None, password_stdin: _Stdin = False) -> None:
    """Change a user's password; they must log in again."""
    users = _users(file)
    try:
        users.named(name)
        users.set_password(name, _password(password_stdin))
    except ValueError as error:
        refuse(str(error))
    _record_change(users, "change password", name)
    typer.echo(f"{name} has a new password.")


@users_app.command("role")
def change_role(
    name: _Name, role: Annotated[str, typer.Argument(help=f"One of {', '.join(ROLES)}.")], file: _File = None
) -> None:
    """Change what a user may do; they must log in again."""
    users = _users(file)
    try:
        users.set_role(name, role)
    except ValueError as error:
        refuse(str(error))
    _record_change(users, "change role", name, role=role)
    typer.echo(f"{name} has the role {role}.")


def audit(
    studies: Annotated[Path | None, typer.Option(help="The studies folder; shows the actions on it.")] = None,
    state: Annotated[Path | None, typer.Option(help="A project's state folder; the server logs its path.")] = None,
    users: Annotated[Path | None, typer.Option(help="A users file; shows the changes made by commands.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON lines instead of a table.")] = False,
) -> None:
    """Show who did what and when, oldest first.

    The log of a project is audit.jsonl in its state folder. --studies merges the logs of all projects of that folder,
    which have different labels, and the log in the folder itself, which commands write if no project exists. Projects
    are found by the path that a server records at its start.
    """
    from deformux_label.web.audit import read_log

    if sum(given is not None for given in (studies, state, users)) != 1:
        refuse("give one of --studies, --state and --users")
    if studies is not None:
        logs = _logs_of(studies)
    else:
        logs = [state / "audit.jsonl" if state is not None else _log_of(users or Path())]
    records: list[Record] = []
    for log in logs:
        try:
            found, damaged = read_log(log)
        except OSError as error:
            refuse(f"the audit log {log} cannot be read: {error.strerror}")
        records += found
        if damaged:
            typer.echo(f"deformux-label: {damaged} lines of {log} cannot be read and are left out.", err=True)
    records.sort(key=lambda record: str(record.values["time"]))
    if as_json:
        for record in records:
            typer.echo(json.dumps(dict(record.values)))
    else:
        _print(records)


def _users(file: Path | None) -> Users:
    from deformux_label.web.users import Users, default_users_file

    try:
        return Users(file or default_users_file())
    except ValueError as error:
        refuse(str(error))


def _record_change(users: Users, what: str, name: str, **more: str) -> None:
    """Record a change in a log next to the users file, which may serve many projects, with or without a server."""
    from deformux_label.web.audit import AuditLog

    log = AuditLog(_log_of(users.path))
    log.record(what, user=getpass.getuser(), address="command line", name=name, **more)


def _log_of(users_file: Path) -> Path:
    return users_file.with_name(f"{users_file.name}.audit.jsonl")


def _password(from_stdin: bool) -> str:
    if from_stdin:
        return sys.stdin.readline().rstrip("\r\n")
    if not sys.stdin.isatty():
        refuse("a password needs a terminal; without one, give --password-stdin")
    password = getpass.getpass("Password: ")
    if getpass.getpass("Repeat the password: ") != password:
        refuse("the two passwords differ; nothing was changed")
    return password


def _logs_of(studies: Path) -> list[Path]:
    from deformux_label.cli.command_log import logs_of

    found = logs_of(studies)
    if not found:
        refuse(f"no audit log of the studies {str(studies)!r} was found in {app_folder() / 'model'}; give --state")
    return found


def _print(records: Iterable[Record]) -> None:
    table = Table("time", "user", "role", "address", "what", "status", "details", box=None)
    for record in records:
        values = record.values
        seen = [terminal_text(values.get(key, "")) for key in ("time", "user", "role", "address", "what", "status")]
        table.add_row(*seen, " ".join(f"{key}={terminal_text(value)}" for key, value in record.details.items()))
    print_table(table)
