"""The options of ``--conf`` that are about the server and not about the project, checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deformux_label.lib.configs.project import InvalidOption, number_option

__all__ = ["SERVER_OPTIONS", "ServerOptions"]

SERVER_OPTIONS = ("allow_origin", "insecure", "max_upload_gb", "max_voxels", "users")
_ORIGIN = re.compile(r"https?://[A-Za-z0-9.-]+(:[0-9]{1,5})?")


@dataclass(frozen=True)
class ServerOptions:
    """How the server meets the network.

    Args:
        allow_origins: origins such as ``https://viewer.hospital.org`` whose pages may call the server, beside its own.
        max_upload_gb: most gigabytes (10^9 bytes) of an uploaded volume or label.
        max_voxels: most voxels of a volume that is read; larger ones are refused before they are decompressed.
        users: file with the users; with at least one in it the login is on. None for the default place.
        insecure: listen to the network without a login.
    """

    allow_origins: tuple[str, ...] = ()
    max_upload_gb: float = 4.0
    max_voxels: int = 1_500_000_000
    users: Path | None = None
    insecure: bool = False

    @classmethod
    def from_conf(cls, conf: Mapping[str, str]) -> ServerOptions:
        """Parse the server's part of the ``--conf`` pairs; the others are left to ``Project.from_conf``.

        Raises:
            InvalidOption: a bad value.
        """
        given = {key: str(value).strip() for key, value in conf.items() if key in SERVER_OPTIONS and str(value).strip()}
        origins = tuple(part.strip().rstrip("/") for part in given.get("allow_origin", "").split(",") if part.strip())
        for origin in origins:
            if not _ORIGIN.fullmatch(origin):
                raise InvalidOption(f"allow_origin must list origins such as https://viewer.org; got {origin!r}")
        insecure = given.get("insecure", "false").lower()
        if insecure not in ("true", "false"):
            raise InvalidOption(f"insecure must be true or false; got {insecure!r}")
        return cls(
            allow_origins=origins,
            max_upload_gb=number_option("max_upload_gb", given.get("max_upload_gb", "4"), 10_000),
            max_voxels=int(number_option("max_voxels", given.get("max_voxels", "1500000000"), 10**12, whole=True)),
            users=Path(given["users"]) if "users" in given else None,
            insecure=insecure == "true",
        )
