"""The code of docs/python.md and docs/operator.md, run as a reader would: one script each, in an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import pytest

from deformux.data.preprocessing import Preprocessing
from deformux.networks.deformux_net import DeformUXNet
from deformux.networks.model_file import ModelCard, save_model
from preloaded import run_preloaded

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHELL_BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
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
    done = run_preloaded(script, folder=folder)
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


def test_the_guide_for_many_scans_runs(repository: Path, write_case, tmp_path: Path) -> None:
    """One job of the array, and the command that makes the rest: on this machine, for there is no SLURM."""
    pytest.importorskip("submitit")
    array, cluster = SHELL_BLOCK.findall((repository / "docs" / "python.md").read_text())
    for i in range(2):
        write_case(f"case{i}", seed=i, size=(16, 16, 16))
    (tmp_path / "images").rename(tmp_path / "scans")
    prep = Preprocessing(patch_size=(16, 16, 16))
    card = ModelCard(labels=("ball",), preprocessing=prep, preset="tiny")
    save_model(tmp_path / "model.safetensors", DeformUXNet(1, 2, "tiny"), card)
    command = tmp_path / "bin" / "deformux"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m deformux.cli.main "$@"\n')
    command.chmod(0o755)
    environment = {**os.environ, "PATH": f"{command.parent}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "2"}
    assert "/50" in array
    assert "--cluster slurm --shards 50" in cluster
    scripts = array.replace("/50", "/2"), cluster.replace("--cluster slurm --shards 50", "--cluster local --shards 1")
    for script, written in zip(scripts, (["case1.nii.gz"], ["case0.nii.gz", "case1.nii.gz"]), strict=True):
        done = subprocess.run(
            ["sh", "-e", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        results = sorted(path for path in (tmp_path / "segmented").iterdir() if not path.name.startswith("."))
        assert [path.name for path in results] == written
        assert all(nib.load(path).shape == (16, 16, 16) for path in results)
