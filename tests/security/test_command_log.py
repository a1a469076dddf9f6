"""Audit records of commands on studies that were never served, or whose log cannot be written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from live import APP, CONF, LABELS, Volume, project_of, remove_state
from typer.testing import CliRunner

from deformux_label.cli.main import app
from deformux_label.lib.store.datastore import CheckedDatastore
from deformux_label.web.audit import AuditLog


@pytest.fixture
def studies(volume: Volume, unwatched: None) -> Path:
    """Make a folder with a label of two revisions."""
    folder = volume.image.parent
    store = CheckedDatastore(str(folder), labels=LABELS)
    for name in ("anna", "ben"):
        store.save_label("scan", str(volume.label), "final", {"client_id": name})
    return folder


def restore(studies: Path) -> str:
    result = CliRunner().invoke(app, ["labels", "restore", "--studies", str(studies), "scan", "1"])
    assert result.exit_code == 0, result.output
    return result.output


def shown(studies: Path) -> list[dict[str, Any]]:
    result = CliRunner().invoke(app, ["audit", "--studies", str(studies), "--json"])
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.output.splitlines()]


def test_without_a_project_the_studies_have_a_log(studies: Path) -> None:
    restore(studies)
    restore(studies)
    assert [(line["what"], line["image"], line["revision"]) for line in shown(studies)] == [
        ("restore label", "scan", 3),
        ("restore label", "scan", 4),
    ]
    assert (studies / ".deformux" / "audit.jsonl").stat().st_mode & 0o777 == 0o600


def test_a_log_that_cannot_be_written_does_not_swallow_the_line(studies: Path, tmp_path: Path) -> None:
    log = AuditLog(project_of(CONF).state_folder(APP, str(studies)) / "audit.jsonl")
    log.record("start server", studies=str(studies.resolve()))
    kept = log.path.rename(tmp_path / "elsewhere.jsonl")
    log.path.symlink_to(kept)
    try:
        restore(studies)
        assert [line["what"] for line in shown(studies)] == ["start server", "restore label"]
        (studies / ".deformux" / "audit.jsonl").unlink()
        (studies / ".deformux" / "audit.jsonl").mkdir()
        assert "done, but the audit log cannot be written" in restore(studies)
    finally:
        remove_state(studies, CONF)
