"""Users of every role for the tests of the login, and their requests."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import requests
from live import LiveServer

from deformux_label.lib.requests.roles import ROLES
from deformux_label.web.route_roles import OFFERED
from deformux_label.web.users import Users

# One of each role, and a second annotator.
PEOPLE = {"rita": "reader", "anna": "annotator", "andy": "annotator", "rob": "reviewer", "ada": "admin"}
BY_ROLE = {role: name for name, role in reversed(PEOPLE.items())}
assert tuple(sorted(BY_ROLE, key=ROLES.index)) == ROLES


def password(name: str) -> str:
    return f"password of {name}"


def make_users(path: Path) -> Users:
    users = Users(path)
    for name, role in PEOPLE.items():
        users.add(name, role, password(name))
    return users


def log_in(server: LiveServer, name: str, secret: str | None = None, **headers: str) -> requests.Response:
    form = {"username": name, "password": secret or password(name), "grant_type": "password"}
    return requests.post(f"{server.url}/auth/token", data=form, headers=headers, timeout=60, verify=False)


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"bearer {token}"}


def headers_of(server: LiveServer, *names: str) -> dict[str, dict[str, str]]:
    """Return the headers of each of ``PEOPLE``, or of some."""
    return {name: bearer(log_in(server, name).json()["access_token"]) for name in names or PEOPLE}


def call(server: LiveServer, method: str, path: str, headers: dict[str, str] | None = None, **more: Any) -> Any:
    return requests.request(
        method, f"{server.url}{path}", headers=headers, timeout=120, **{"allow_redirects": False, **more}
    )


def routes() -> list[tuple[str, str, str | None]]:
    """Return method, path and least role of every offered route."""
    found = []
    for route in OFFERED:
        path = "/".join("none" if part.startswith("{") else part for part in route.path.split("/"))
        found += [(method, path, route.role) for method in route.methods]
    return found


def client_like_the_plugins(library: ModuleType | type, server: LiveServer, folder: Path, token: Any) -> Any:
    """Return a new client, as the plugin makes one for every call; a kept client would send stale headers."""
    make = library.MONAILabelClient if isinstance(library, ModuleType) else library
    client = make(server.url, str(folder), "user-xyz")
    if token:
        client.update_auth(token)
    return client
