"""Checked options of the server itself, such as limits and login."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deformux_label.lib.configs.declared_options import (
    ALLOW_ORIGIN,
    INSECURE,
    MAX_UPLOAD_GB,
    MAX_VOXELS,
    USERS_FILE,
    WEB_OPTIONS,
)

__all__ = ["SERVER_OPTIONS", "ServerOptions"]

SERVER_OPTIONS = tuple(sorted(option.name for option in WEB_OPTIONS))
"""Names of the options that describe the server."""


@dataclass(frozen=True)
class ServerOptions:
    """Access to the server, and its limits.

    Args:
        allow_origin: other origins, such as ``https://viewer.hospital.org``, whose pages may call the server.
        max_upload_gb: largest uploaded volume or label, in gigabytes (10^9 bytes).
        max_voxels: largest volume that is read; larger ones are refused before they are decompressed.
        users: file with the users; the first one switches login on. None for the default file.
        insecure: listen to the network without a login.
    """

    allow_origin: tuple[str, ...] = ALLOW_ORIGIN.default_value
    max_upload_gb: float = MAX_UPLOAD_GB.default_value
    max_voxels: int = MAX_VOXELS.default_value
    users: Path | None = USERS_FILE.default_value
    insecure: bool = INSECURE.default_value

    @classmethod
    def from_conf(cls, conf: Mapping[str, str]) -> ServerOptions:
        """Parse the server's part of the ``--conf`` pairs; ``Project.from_conf`` parses the others.

        Raises:
            InvalidOption: an invalid value.
        """
        given = {name: str(value).strip() for name, value in conf.items() if str(value).strip()}
        return cls(**{option.name: option.value(given) for option in WEB_OPTIONS})
