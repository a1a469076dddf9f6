"""What the index says about a label's file, beside what its annotator said."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from monailabel.interfaces.datastore import DefaultLabelTag

__all__ = [
    "OWN_FIELDS",
    "PLAIN_TAGS",
    "PROVENANCE",
    "UNCERTAINTY_TAG",
    "claimed",
    "file_state",
    "said",
    "unchecked",
    "unusable",
    "why_unusable",
]

# Where the model was unsure, 0 to 100: it lies beside the labels, but nobody drew it and nothing learns from it.
UNCERTAINTY_TAG = "uncertainty"
# What a model proposed is no work of an annotator's, and can be computed again: no revisions, no checks.
PLAIN_TAGS = (DefaultLabelTag.ORIGINAL.value, UNCERTAINTY_TAG)
# Written by the server alone: what a client sends under these names is left out.
OWN_FIELDS = ("checked", "file", "labels", "name", "revision", "state", "stored_labels", "ts", "unusable")
# Whose work it is, and over which model's proposal: the server knows that, and a client cannot say otherwise.
PROVENANCE = ("annotator", "model", "model_version", "params", "restored_from", "user")


def claimed(info: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a client may say about a volume or a label, of what it sent."""
    return {name: value for name, value in said(info).items() if name not in PROVENANCE}


def file_state(status: os.stat_result) -> str:
    """What tells one content of a file from the next without reading it."""
    return f"{status.st_size}-{status.st_mtime_ns}"


def said(info: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a client said, without what only the server knows."""
    return {name: value for name, value in info.items() if name not in OWN_FIELDS}


def unchecked(info: Mapping[str, Any]) -> dict[str, Any]:
    """Return the info of a label that came another way, such as copied into the folder, and was not looked at yet."""
    return {**said(info), "state": "unchecked"}


def unusable(info: Mapping[str, Any], reason: str, checked: str, labels: list[str]) -> dict[str, Any]:
    """Return the info of a label that was looked at and cannot be used for the project with these labels."""
    return {**said(info), "state": "unusable", "unusable": reason, "checked": checked, "labels": labels}


def why_unusable(info: Mapping[str, Any]) -> str | None:
    """Return why a label does not count; None where it does."""
    if info.get("state") == "unchecked":
        return "it was copied into the folder and is being checked"
    return str(info.get("unusable")) if info.get("state") == "unusable" else None
