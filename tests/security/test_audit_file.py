"""The file of the audit log: whole lines, whatever ends the writer and whatever the values are."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from deformux_label.cli.main import app
from deformux_label.web.audit import AuditLog, read_log

_WRITER = """
import sys
from pathlib import Path
from deformux_label.web.audit import AuditLog
log = AuditLog(Path(sys.argv[1]))
number = 0
while True:
    log.record("submit label", number=number, writer=sys.argv[2])
    print(number, flush=True)
    number += 1
"""


def test_acknowledged_lines_survive_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    command = [sys.executable, "-c", _WRITER, str(path)]
    writers = [subprocess.Popen([*command, str(number)], stdout=subprocess.PIPE, text=True) for number in range(2)]
    for writer in writers:
        assert writer.stdout is not None
        writer.stdout.readline()
    time.sleep(0.5)
    told = {}
    for number, writer in enumerate(writers):
        writer.kill()
        told[str(number)] = int(writer.communicate()[0].splitlines()[-1])
    records, damaged = read_log(path)
    assert damaged == 0
    for number, final in told.items():
        assert final > 5
        written = [record.values["number"] for record in records if record.values["writer"] == number]
        assert written[: final + 1] == list(range(final + 1))


@pytest.mark.parametrize("torn", [b'{"time": "2026', b'{"time": "x", "what": "\xff', b"\0\0\0\0", b"[]"])
def test_a_torn_line_is_left_alone(tmp_path: Path, torn: bytes) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    log.record("submit label", image="a")
    whole = log.path.read_bytes()
    log.path.write_bytes(whole + torn)
    log.record("submit label", image="b")
    assert log.path.read_bytes().startswith(whole + torn + b"\n{")
    records, damaged = read_log(log.path)
    assert [record.values["image"] for record in records] == ["a", "b"]
    assert damaged == 1
    shown = CliRunner().invoke(app, ["audit", "--state", str(tmp_path)])
    assert shown.exit_code == 0
    assert "1 lines" in shown.output


def test_a_log_that_cannot_be_written_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "target").write_text("mine\n")
    (tmp_path / "audit.jsonl").symlink_to(tmp_path / "target")
    log = AuditLog(tmp_path / "audit.jsonl")
    log.record("submit label", image="a")
    assert log.failure is not None
    assert "submit label" in caplog.text
    assert (tmp_path / "target").read_text() == "mine\n"
    (tmp_path / "audit.jsonl").unlink()
    log.record("submit label", image="b")
    assert log.failure is None


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), "\ud800", b"bytes", {"a": {1, 2}}, ["x" * 9_999] * 99, {"k" * 999: None}]
)
def test_any_value_is_bounded_and_valid(tmp_path: Path, value: Any) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    log.record("submit label", value=value)
    text = log.path.read_text()
    assert len(text) < 15_000
    json.dumps(json.loads(text), ensure_ascii=False, allow_nan=False).encode()
