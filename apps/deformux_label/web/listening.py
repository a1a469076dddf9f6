"""Addresses on which a server may listen: without a login, only those of its own machine."""

from __future__ import annotations

import argparse
import ipaddress
import os
import socket
from collections.abc import Sequence
from pathlib import Path

from deformux_label.web.users import InvalidUsers, Users, default_users_file

__all__ = ["NO_LOGIN", "UNSAFE", "host_of", "is_loopback", "is_own_address", "reason_not_to_start"]

NO_LOGIN = "this server has no login, so it accepts only requests from its own machine"
UNSAFE = "the server listens to the network without a login (--insecure): anyone there can read and change everything"


def is_own_address(text: str) -> bool:
    """Return whether a text is a loopback address; names are not resolved."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    return bool((getattr(address, "ipv4_mapped", None) or address).is_loopback)


def is_loopback(host: str) -> bool:
    """Return whether an address, or every address of a name, is a loopback address."""
    if not host:
        return False
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):
        return False
    return bool(found) and all(map(is_own_address, found))


def host_of(arguments: Sequence[str]) -> str:
    """Return the address that a server with this command line listens on.

    Reads ``monailabel start_server`` (-i, default 0.0.0.0) and uvicorn's own command (default 127.0.0.1).
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("-i", "--host")
    known, _ = parser.parse_known_args(list(arguments))
    stock = "start_server" in arguments
    return str(known.host or ("0.0.0.0" if stock else "127.0.0.1"))


def reason_not_to_start(host: str, users_file: Path | None, *, insecure: bool) -> str | None:
    """Return why a server must not start with these options, in one sentence, or None."""
    if os.environ.get("MONAI_LABEL_AUTH_ENABLE", "false").strip().lower() in ("1", "true", "yes", "on", "t", "y"):
        return (
            "MONAI Label's own login is not supported; unset MONAI_LABEL_AUTH_ENABLE and add users with deformux-label "
            "users add"
        )
    try:
        users = Users(users_file or default_users_file())
        if users.all():
            users.secret()
            return None
    except InvalidUsers as error:
        return str(error)
    if insecure or is_loopback(host):
        return None
    return (
        f"without a user the server listens only to its own machine, and the host is {host!r}; add one with "
        f"deformux-label users add (to {users.path}), or give --host 127.0.0.1, or --insecure to let everyone in"
    )
