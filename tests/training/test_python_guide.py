"""The code of docs/python.md, run as one script on small volumes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

GUIDE = Path(__file__).parents[2] / "docs" / "python.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Settings of the guide that take minutes, and what the test puts in their place.
SMALLER = {
    "in_steps(1000, epochs=10)": "in_steps(2, epochs=1)",
    "patch_size=(96, 96, 96)": "patch_size=(16, 16, 16)",
    "spacing_mm=(1.5, 1.5, 2.0)": "spacing_mm=(2.0, 2.0, 3.0)",
}


def test_the_guide_runs(write_case, tmp_path: Path) -> None:
    for i in range(4):
        write_case(f"case{i}", seed=i, size=(24, 24, 16))
    data = tmp_path / "data"
    data.mkdir()
    for folder in ("images", "labels"):
        (tmp_path / folder).rename(data / folder)
    blocks = BLOCK.findall(GUIDE.read_text())
    assert len(blocks) == 5
    script = "\n".join(blocks)
    for guide, test in SMALLER.items():
        assert guide in script
        script = script.replace(guide, test)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "model.json").is_file()
    assert (tmp_path / "mask.nii.gz").is_file()
    assert "v0001" in done.stdout
