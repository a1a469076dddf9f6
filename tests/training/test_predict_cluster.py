"""``deformux predict-cluster``: real jobs of submitit's local executor, and what SLURM would be sent."""

from __future__ import annotations

import re
import stat
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import psutil
import pytest
from typer.testing import CliRunner, Result

from deformux.cli import predict_cluster
from deformux.cli.main import app
from deformux.data.preprocessing import Preprocessing
from deformux.networks.deformux_net import DeformUXNet
from deformux.networks.model_file import ModelCard, save_model
from preloaded import start_deformux

submitit = pytest.importorskip("submitit")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    prep = Preprocessing(modality="mr", patch_size=(16, 16, 16))
    save_model(path, DeformUXNet(1, 2, "tiny"), ModelCard(labels=("ball",), preprocessing=prep, preset="tiny"))
    return path


def write_scans(folder: Path, count: int, size: tuple[int, int, int]) -> list[Path]:
    folder.mkdir()
    paths = [folder / f"scan{number}.nii.gz" for number in range(count)]
    for number, path in enumerate(paths):
        values = np.random.default_rng(number).normal(100, 20, size).astype(np.float32)
        nib.save(nib.Nifti1Image(values, np.eye(4)), path)
    return paths


def results(output: Path) -> list[Path]:
    return sorted(path for path in output.glob("*.nii.gz") if not path.name.startswith("."))


def invoke(*arguments: object) -> Result:
    command = ["predict-cluster", *map(str, arguments), "--device", "cpu"]
    return CliRunner().invoke(app, command, env={"COLUMNS": "300"})


def job_processes(parent: psutil.Process) -> list[psutil.Process]:
    """Return the processes that run jobs, not those that watch them."""
    found = []
    for process in parent.children(recursive=True):
        try:
            if "submitit.core._submit" in process.cmdline():
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_a_killed_shard_is_sent_again(model: Path, tmp_path: Path) -> None:
    scans = write_scans(tmp_path / "scans", 6, (48, 48, 32))
    scans[1].write_text("no image")
    output = tmp_path / "out"
    command = ["predict-cluster", model, tmp_path / "scans", output, "--cluster", "local", "--shards", "2"]
    command += ["--max-parallel", "2", "--device", "cpu", "--threads", "1"]
    process = start_deformux(*command, output=tmp_path / "log")
    end = time.monotonic() + 300
    while not (results(output) if output.is_dir() else []):
        assert process.poll() is None, process.ended()
        assert time.monotonic() < end
        time.sleep(0.02)
    folder = next((output / ".cluster").iterdir())
    for path in (folder, folder.parent):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    first = {path.name: path.stat().st_mtime_ns for path in results(output)}
    jobs = job_processes(psutil.Process(process.pid))
    assert jobs
    jobs[0].kill()
    printed = process.ended(timeout=400)
    assert process.returncode == 1, printed  # one scan is no image
    assert re.search(r"shard [12]/2 died and is sent again", printed)
    assert printed.count("scan1.nii.gz cannot be read") == 1
    assert "5 of 6 volumes written" in printed
    assert [path.name for path in results(output)] == [f"scan{number}.nii.gz" for number in (0, 2, 3, 4, 5)]
    for name, written in first.items():
        assert (output / name).stat().st_mtime_ns == written
    assert not list((output / ".cluster").iterdir())
    done = invoke(model, tmp_path / "scans", output, "--cluster", "local", "--shards", "1")
    assert "0 of 6 volumes written" in done.output
    assert "5 were there already" in done.output


class FakeJob:
    """A job that dies, or ends, as it is told."""

    def __init__(self, job: predict_cluster.ShardJob, *, dies: bool) -> None:
        self.job, self.dies = job, dies

    def done(self) -> bool:
        return True

    def exception(self) -> Exception | None:
        return RuntimeError("first line\nout of time") if self.dies else None

    def result(self) -> predict_cluster.Predicted:
        return predict_cluster.run_shard(self.job)


def test_a_shard_that_keeps_dying_is_given_up(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_scans(tmp_path / "scans", 4, (16, 16, 16))
    sent: list[str] = []

    class Executor:
        def map_array(self, function: object, jobs: list[predict_cluster.ShardJob]) -> list[FakeJob]:
            sent.extend(str(job.shard) for job in jobs)
            return [FakeJob(job, dies=job.shard.number == 2) for job in jobs]

    monkeypatch.setattr(predict_cluster, "_executor", lambda *_: Executor())
    monkeypatch.setattr(predict_cluster, "_POLL_S", 0.0)
    monkeypatch.setattr(predict_cluster.signal, "signal", lambda *_: None)
    options = ("--cluster", "local", "--shards", 2, "--max-parallel", 1, "--retries", 2)
    done = invoke(model, tmp_path / "scans", tmp_path / "out", *options)
    assert done.exit_code == 1, done.output
    assert sorted(sent) == ["1/2", "2/2", "2/2", "2/2"]
    assert "scan1.nii.gz: shard 2/2 died 3 times (out of time)" in done.output
    assert "scan3.nii.gz: shard 2/2 died 3 times (out of time)" in done.output
    assert "2 of 4 volumes written" in done.output
    assert "the logs of the jobs are in" in done.output


FAKE_SBATCH = """#!/bin/sh
cp "$1" "{folder}/sent.sh"
echo "sbatch: error: invalid partition specified: {folder}" >&2
exit 1
"""


def test_slurm_is_sent_one_array_with_the_options(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for sbatch keeps what it is sent, and refuses it."""
    write_scans(tmp_path / "scans", 5, (16, 16, 16))
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, script in (("sbatch", FAKE_SBATCH.format(folder=tmp_path)), ("srun", "#!/bin/sh\n")):
        (tools / name).write_text(script)
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    options = ("--shards", 4, "--max-parallel", 2, "--partition", "gpu", "--gres", "gpu:1", "--timeout-min", 90)
    done = invoke(model, tmp_path / "scans", tmp_path / "out", *options, "--slurm", "account=lab", "--slurm", "mem=16G")
    assert done.exit_code == 2, done.output
    assert "the cluster refuses the jobs: sbatch: error: invalid partition specified" in done.output
    sent = (tmp_path / "sent.sh").read_text().splitlines()
    for line in ("array=0-3%2", "partition=gpu", "gres=gpu:1", "time=90", "account=lab", "mem=16G"):
        assert f"#SBATCH --{line}" in sent


def test_without_slurm_it_is_one_sentence(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_scans(tmp_path / "scans", 1, (16, 16, 16))
    monkeypatch.setenv("PATH", "/nowhere")
    done = invoke(model, tmp_path / "scans", tmp_path / "out")
    assert done.exit_code == 2
    assert "SLURM's command srun is not on this machine" in done.output
    assert "--cluster local" in done.output


def test_without_submitit_it_is_one_sentence(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_scans(tmp_path / "scans", 1, (16, 16, 16))
    monkeypatch.setitem(sys.modules, "submitit", None)
    done = invoke(model, tmp_path / "scans", tmp_path / "out", "--cluster", "local")
    assert done.exit_code == 2
    assert "install it with: pip install '.[cluster]'" in done.output


@pytest.mark.parametrize("option", ["mem", "--mem=16G", "mem=", "Mem=1", "mem=1\n#SBATCH --x"])
def test_a_wrong_option_of_slurm_is_one_sentence(model: Path, tmp_path: Path, option: str) -> None:
    done = invoke(model, tmp_path, tmp_path / "out", f"--slurm={option}")
    assert done.exit_code == 2
    assert "--slurm takes name=value" in done.output
