"""Commands print what they are asked for, and nothing of what the libraries below them deprecate."""

import subprocess
import sys
from pathlib import Path

import pytest
from live import environment


@pytest.mark.parametrize("command", [("studies",), ("labels", "list")])
def test_a_command_on_an_empty_folder_is_silent_on_stderr(command: tuple[str, ...], tmp_path: Path) -> None:
    studies = tmp_path / "studies"
    studies.mkdir()
    done = subprocess.run(
        [Path(sys.executable).parent / "deformux-label", *command, "--studies", studies],
        capture_output=True,
        text=True,
        env=environment(tmp_path),
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
