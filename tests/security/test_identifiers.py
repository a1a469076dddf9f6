"""Valid and invalid names from outside, by examples of people and attackers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi import HTTPException

from deformux_label.lib.requests.identifiers import (
    checked_image_id,
    checked_revision,
    checked_tag,
    checked_version,
    refuse_invalid_text,
)

HOSTILE = (
    "",
    ".",
    "..",
    "../a",
    "a/b",
    "/a",
    "a\\b",
    "a\0b",
    "a\nb",
    "\ud800",
    "x" * 201,
    "é" * 101,
    ".a",
    None,
    5,
    [],
)


@pytest.mark.parametrize(
    "name", ["case_1", "Müller, Eva (2)", "a.b.c", "x" * 200, "é" * 100, "肝臓", "a..b", "~a", "$(a)"]
)
def test_image_ids(name: str, tmp_path: Path) -> None:
    assert checked_image_id(name) == name
    # Independent check: the file system accepts it as one visible file of that folder.
    path = tmp_path / f"{name}.nii.gz"
    path.touch()
    assert [entry.name for entry in os.scandir(tmp_path)] == [path.name]


@pytest.mark.parametrize("check", [checked_image_id, checked_tag, checked_version, checked_revision])
@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_hostile_names(check: Callable[[Any], Any], name: Any) -> None:
    if check is checked_revision and name == 5:
        return
    with pytest.raises(HTTPException) as refused:
        check(name)
    assert refused.value.status_code in (400, 404)
    # The message itself can be sent.
    refused.value.detail.encode()


@pytest.mark.parametrize("value", ["\ud800", {"a": "\ud800"}, {"\udfff": 1}, [["\ud83d"]], {"a": [{"b": "x\udc00"}]}])
def test_text_that_is_not_unicode(value: Any) -> None:
    with pytest.raises(HTTPException, match="Unicode"):
        refuse_invalid_text(value)


def test_nesting() -> None:
    value: list[Any] = []
    for _ in range(10_000):
        value = [value]
    with pytest.raises(HTTPException, match="nested"):
        refuse_invalid_text(value)
    refuse_invalid_text({"label_info": [{"name": "liver", "idx": 1}], "points": [[1, 2, 3]], "text": "Grüße 🫀"})
