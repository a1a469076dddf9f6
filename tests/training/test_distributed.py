"""A training in two processes: on the CPU, by Gloo."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from deformux.data.cases import Case, Scan
from deformux.data.preprocessing import Preprocessing
from deformux.fitting.distributed import Ranks, joined
from deformux.fitting.fit import Progress, TrainingError
from deformux.fitting.losses import PartialDiceCELoss
from deformux.fitting.patches import Patches
from deformux.fitting.rank_processes import fit_on
from deformux.fitting.rank_task import RankTask
from deformux.fitting.recipe import RECIPES
from deformux.networks.deformux_net import DeformUXNet

HERE = Path(__file__).parent
PREP = Preprocessing("ct", patch_size=(16, 16, 16))
OPTIONS: dict[str, Any] = {"prep": PREP, "labels": ("ball", "box")}
RECIPE = RECIPES["finetune"].replace(
    steps=6, epochs=2, batch_size=2, mixed_precision=False, patience=None, click_probability=0.7
)


def network(seed: int = 0) -> DeformUXNet:
    torch.manual_seed(seed)
    return DeformUXNet(1, 3, "tiny", guidance=True)


@pytest.fixture
def cases(write_case) -> list[Case]:
    return [write_case(f"c{number}", seed=number, size=(20, 20, 20)) for number in range(5)]


def test_two_processes_of_torchrun_train_one_network(cases: list[Case], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, HERE / "ranks_driver.py", tmp_path],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for own in told:
        assert own["loss"] == 1.5
        assert own["means"] == [[1.5], [0.5], None]
        assert own["nan"], "a loss that is no longer finite in one process must end them all"
        assert own["weight"] == 0
        assert own["any_process"] == [True, False]
        assert own["gather"] == [{"rank": 0}, {"rank": 1}]
        assert own["from_writer"] == "rank 0"
        # Stopped in one process, all stop after the same step, and are resumed from the one checkpoint.
        assert own["stopped"] == {"stopped": 3}
        assert own["resumed"]["from"] == 3
        assert own["resumed"]["losses"] == own["whole"]["losses"]
        assert set(own["whole"]["per_case"]) == {"c3", "c4"}
    assert [own["part"] for own in told] == [["a", "c", "e"], ["b", "d"]]
    assert [own["whole"].pop("told") for own in told] == [True, False]
    assert told[0]["whole"] == told[1]["whole"]
    files = [tmp_path / f"{name}-{rank}.safetensors" for name in ("whole", "resumed") for rank in range(2)]
    assert len({file.read_bytes() for file in files}) == 1


def test_a_step_follows_the_mean_gradient(cases: list[Case], tmp_path: Path) -> None:
    recipe = RECIPE.replace(steps=1, epochs=1, clicks=0, gradient_clip=None, ema_decay=None, schedule="constant")
    # No volume stays in memory.
    recipe = recipe.replace(cache_gb=1e-6)
    trained, expected = network(), network()
    threads = torch.get_num_threads()
    fit_on(["cpu", "cpu"], trained, cases[:2], recipe=recipe, store=tmp_path / "store", **OPTIONS)
    assert torch.get_num_threads() == threads
    assert len(list((tmp_path / "store").glob("*/*"))) == 2, "each process stores the volume that it drew"
    drawn = []
    for rank in range(2):
        patches = Patches(cases[:2], new=(), recipe=recipe, ranks=Ranks(rank, 2), **OPTIONS)
        (batch,) = patches.loader(first_step=0, steps=1, seed=0)
        drawn.append(batch["image"])
        loss = PartialDiceCELoss()(expected(batch["image"]), batch["label"], batch["annotated"])
        (loss / 2).backward()
    assert [len(image) for image in drawn] == [1, 1]
    assert not torch.equal(*drawn)
    options = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay, "betas": recipe.betas}
    torch.optim.AdamW(expected.parameters(), eps=recipe.eps, **options).step()
    close = [
        torch.isclose(trained.state_dict()[name], value, rtol=0, atol=0.01 * recipe.learning_rate).flatten()
        for name, value in expected.state_dict().items()
    ]
    # The first step of Adam follows the sign of the gradient, which rounding may flip near zero.
    assert torch.cat(close).float().mean() > 0.999


def test_an_indivisible_batch_is_refused(cases: list[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="must be a multiple of the number of processes; got 2 for 3 processes"):
        Patches(cases, new=(), recipe=RECIPE, ranks=Ranks(0, 3), **OPTIONS)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "99")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="use --device cuda; got 'cuda:1'"), joined("cuda:1"):
        pass
    with pytest.raises(ValueError, match="99 processes need as many GPUs"), joined("cuda"):
        pass


def test_a_task_is_the_same_after_json(cases: list[Case], tmp_path: Path) -> None:
    one_label = Case("c9", cases[0].image, cases[0].label, ("ball",))
    task = RankTask(
        RankTask.describe(network()),
        [*cases[:2], one_label],
        RECIPE,
        PREP,
        ["ball", "box"],
        val_cases=cases[2:3],
        new=["c0"],
        scans=[Scan("d", (tmp_path / "d_0000.nii", tmp_path / "d_0001.nii"))],
        seed=7,
        capture=False,
        compile_cache=tmp_path,
        can_stop=True,
    )
    text = task.to_json()
    assert "\n" not in text
    assert RankTask.from_json(text) == task


def test_a_task_describes_strides() -> None:
    strides = ((2, 2, 1), (2, 2, 1), (2, 2, 2), (2, 2, 2))
    described = RankTask.describe(DeformUXNet(1, 3, "tiny", strides=strides))
    assert DeformUXNet(**json.loads(json.dumps(described))).strides == strides


def test_a_network_that_the_task_cannot_describe_is_refused(cases: list[Case]) -> None:
    one_plane = DeformUXNet(1, 3, "tiny", offset_planes="xy")
    with pytest.raises(ValueError, match="use one device"):
        fit_on(["cpu", "cpu"], one_plane, cases[:2], recipe=RECIPE, **OPTIONS)


def test_a_killed_process_ends_the_training_which_can_be_resumed(cases: list[Case], tmp_path: Path) -> None:
    whole, killed = network(), network()
    options = {**OPTIONS, "recipe": RECIPE, "val_cases": cases[3:], "checkpoint_seconds": 0}
    expected = fit_on(["cpu", "cpu"], whole, cases[:3], **options)
    options["checkpoint"] = tmp_path / "run" / "checkpoint.safetensors"

    def kill(progress: Progress) -> None:
        if progress.epoch == 1:
            for child in psutil.Process().children():
                # Other tests of this process may have left children that ended.
                with contextlib.suppress(psutil.ZombieProcess):
                    if "deformux.fitting.rank_processes" in child.cmdline():
                        child.kill()

    with pytest.raises(TrainingError, match=r"trained on cpu was killed \(SIGKILL\); the next training resumes"):
        fit_on(["cpu", "cpu"], killed, cases[:3], on_progress=kill, **options)
    resumed = network()
    result = fit_on(["cpu", "cpu"], resumed, cases[:3], **options)
    assert result.resumed_from > 0
    assert (result.losses, result.per_case) == (expected.losses, expected.per_case)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert not torch.distributed.is_initialized()


def test_the_others_end_with_the_first_process(cases: list[Case]) -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_distributed import *\n"
        "from deformux.data.cases import find_cases\n"
        "many = RECIPE.replace(steps=100_000, epochs=1)\n"
        "show = lambda progress: print(progress.step, flush=True)\n"
        "fit_on(['cpu', 'cpu'], network(), find_cases(Path(sys.argv[2])), recipe=many, on_progress=show, **OPTIONS)\n"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", program, HERE, cases[0].image.parent.parent], stdout=subprocess.PIPE, text=True
    )
    assert first.stdout is not None
    assert first.stdout.readline().strip().isdigit()
    others = psutil.Process(first.pid).children()
    assert len(others) == 1
    # None of them listens to the network.
    listening = [c for p in (psutil.Process(first.pid), *others) for c in p.net_connections() if c.status == "LISTEN"]
    assert {connection.laddr.ip for connection in listening} <= {"127.0.0.1"}
    first.send_signal(signal.SIGKILL)
    first.wait()
    until = time.monotonic() + 20
    while any(other.is_running() and other.status() != psutil.STATUS_ZOMBIE for other in others):
        assert time.monotonic() < until, "a process outlives the training"
        time.sleep(0.1)


@pytest.mark.slow
def test_two_processes_learn_as_well_as_one(cases: list[Case]) -> None:
    recipe = RECIPE.replace(steps=120, epochs=1)

    def dice(devices: list[str], seed: int) -> float:
        result = fit_on(devices, network(seed), cases[:3], recipe=recipe, val_cases=cases[3:], seed=seed, **OPTIONS)
        assert result.best_dice is not None
        return result.best_dice

    one, two = ([dice(["cpu"] * n, seed) for seed in range(3)] for n in (1, 2))
    assert abs(np.mean(one) - np.mean(two)) <= max(np.ptp(one), np.ptp(two), 0.02), (one, two)
