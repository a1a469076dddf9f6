"""The servers, volumes and clients of ``tests/app``, for attacks on them; and a server with a login."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "app"))

from live import CONF, LiveServer, Volume, publish_untrained, serve_command, write_volume
from logged_in import headers_of, make_users
from shared_fixtures import *  # noqa: F403

from deformux_label.web.users import Users


@pytest.fixture(scope="session")
def login_cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Volume]:
    """The scans and labels of ``login_server``."""
    root = tmp_path_factory.mktemp("logged_in")
    made = {}
    for number in range(8):
        image, label = (root / kind / f"case_{number}.nii.gz" for kind in ("studies", "truth"))
        made[f"case_{number}"] = write_volume(image, label, spacing=(4, 4, 4), seed=number)
    return made


@pytest.fixture(scope="session")
def login_users(tmp_path_factory: pytest.TempPathFactory) -> Users:
    """Its users, one of each role and a second annotator."""
    return make_users(tmp_path_factory.mktemp("users") / "users.json")


@pytest.fixture(scope="session")
def login_server(start: Callable[..., LiveServer], login_cases: dict[str, Volume], login_users: Users) -> LiveServer:
    """A server with a login, which the files that test it share: each test leaves it as it was."""
    studies = login_cases["case_0"].image.parent
    publish_untrained(studies, CONF)
    return start(studies, {**CONF, "users": str(login_users.path)}, serve_command)


@pytest.fixture(scope="session")
def login_tokens(login_server: LiveServer) -> dict[str, dict[str, str]]:
    """The headers of each user."""
    return headers_of(login_server)
