"""The code of docs/python.md and docs/operator.md, run as a reader would: one script each, in an empty folder."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Settings of the guide that take minutes, and what the test puts in their place.
SMALLER = {
    "in_steps(1000, epochs=10)": "in_steps(2, epochs=1)",
    "patch_size=(96, 96, 96)": "patch_size=(16, 16, 16)",
    "spacing_mm=(1.5, 1.5, 2.0)": "spacing_mm=(2.0, 2.0, 3.0)",
}


def code_of(guide: Path) -> str:
    """Return all Python blocks of a page as one script."""
    blocks = BLOCK.findall(guide.read_text())
    assert blocks
    return "\n".join(blocks)


def run(script: str, folder: Path) -> str:
    """Run a script in a folder and return what it printed."""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_guide_for_python_runs(repository: Path, write_case, tmp_path: Path) -> None:
    for i in range(4):
        write_case(f"case{i}", seed=i, size=(24, 24, 16))
    (tmp_path / "data").mkdir()
    for folder in ("images", "labels"):
        (tmp_path / folder).rename(tmp_path / "data" / folder)
    script = code_of(repository / "docs" / "python.md")
    for slow, fast in SMALLER.items():
        assert slow in script
        script = script.replace(slow, fast)
    printed = run(script, tmp_path)
    assert "v0001 True" in printed
    assert (tmp_path / "model.json").is_file()
    assert (tmp_path / "mask.nii.gz").is_file()


def test_the_guide_for_the_operator_runs(repository: Path, tmp_path: Path) -> None:
    run(code_of(repository / "docs" / "operator.md"), tmp_path)
