"""Fields of a label in the index: those of the server, and those that a client may send."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from monailabel.interfaces.datastore import DefaultLabelTag

__all__ = [
    "PLAIN_TAGS",
    "PROVENANCE",
    "SERVER_FIELDS",
    "UNCERTAINTY_TAG",
    "client_fields",
    "file_state",
    "unchecked_fields",
    "unusable_fields",
    "why_unusable",
    "without_server_fields",
]

# A map of the model's uncertainty, 0 to 100. It is stored with the labels, but training ignores it.
UNCERTAINTY_TAG = "uncertainty"
# The model's output can be computed again: these tags have no revisions and no checks.
PLAIN_TAGS = (DefaultLabelTag.ORIGINAL.value, UNCERTAINTY_TAG)
# Only the server writes these; a client's values are dropped.
SERVER_FIELDS = ("checked", "file", "labels", "name", "revision", "state", "stored_labels", "ts", "unusable")
# Who made a label, over which model's proposal. The server knows this; a client's values are dropped.
PROVENANCE = ("annotator", "model", "model_version", "params", "restored_from", "user")


def client_fields(info: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of a client's fields that it may set."""
    return {name: value for name, value in without_server_fields(info).items() if name not in PROVENANCE}


def file_state(status: os.stat_result) -> str:
    """Return a text that changes with a file's content, without reading the file."""
    return f"{status.st_size}-{status.st_mtime_ns}"


def without_server_fields(info: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that came from a client, without those that only the server writes."""
    return {name: value for name, value in info.items() if name not in SERVER_FIELDS}


def unchecked_fields(info: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a label that was not submitted, such as a copied file, and is not checked yet."""
    return {**without_server_fields(info), "state": "unchecked"}


def unusable_fields(info: Mapping[str, Any], reason: str, checked: str, labels: list[str]) -> dict[str, Any]:
    """Return the fields of a label that was checked and cannot be used for a project with these labels."""
    return {
        **without_server_fields(info),
        "state": "unusable",
        "unusable": reason,
        "checked": checked,
        "labels": labels,
    }


def why_unusable(info: Mapping[str, Any]) -> str | None:
    """Return why a label cannot be used, or None."""
    if info.get("state") == "unchecked":
        return "it was copied into the folder and is being checked"
    return str(info.get("unusable")) if info.get("state") == "unusable" else None
