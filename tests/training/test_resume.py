"""A training that is killed or stopped is resumed and ends as if it had never been interrupted."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks.nets import UNet
from typer.testing import CliRunner

from deformux.cli.main import app
from deformux.data.cases import Case
from deformux.data.preprocessing import Preprocessing
from deformux.fitting.fit import FitResult, TrainingStopped, fit
from deformux.fitting.patches import draw_order
from deformux.fitting.recipe import RECIPES, Recipe
from preloaded import run_preloaded

DRIVER = Path(__file__).parent / "resume_driver.py"
KILLED, STOPPED, OVER = -9, 3, 0
PREP = Preprocessing("ct", patch_size=(16, 16, 16))
QUICK = RECIPES["finetune"].replace(steps=3, epochs=1, mixed_precision=False)


def test_a_training_killed_at_any_moment_ends_with_the_same_weights(write_case, tmp_path: Path) -> None:
    for number in range(3):
        write_case(f"c{number}", seed=number, size=(20, 20, 20))
    plans = {
        # In the first step, during the first checkpoint, within an epoch, and between two checkpoints.
        "one_cycle-killed": (
            "step=1,half-written=1,step=2,half-written=2,before-rename=2,after-rename=1",
            [KILLED] * 6,
        ),
        # By the user; then with a full disk, which costs steps but not the training.
        "one_cycle-stopped": ("stop=4,disk-full=1,step=2", [STOPPED, STOPPED, KILLED]),
        "plateau-killed": ("step=5", [KILLED]),
        "cosine-killed": ("after-rename=3", [KILLED]),
        # The simulated annotator clicks into the same voxels of the prediction.
        "clicks-killed": ("step=4", [KILLED]),
    }
    arguments = [*{name.partition("-")[0] for name in plans}, *(f"{name}:{plan}" for name, (plan, _) in plans.items())]
    done = run_preloaded(DRIVER.read_text(), tmp_path, *arguments, environment={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    codes = {told["name"]: told["codes"] for told in map(json.loads, done.stdout.splitlines())}
    for name, (_, expected) in plans.items():
        assert codes[name] == [*expected, OVER], done.stderr
        schedule = name.partition("-")[0]
        # float32 on one thread: the same bytes.
        weights = [(tmp_path / f"{run}.safetensors").read_bytes() for run in (name, schedule)]
        assert weights[0] == weights[1], name
        told, reference = (json.loads((tmp_path / f"{run}.json").read_text()) for run in (name, schedule))
        assert told["result"] == reference["result"]
        assert told["here"]["resumed_from"] > 0, "it began again"
        assert told["here"]["resumed_from"] + told["here"]["steps"] == reference["here"]["steps"] == 6


def network() -> UNet:
    torch.manual_seed(0)
    return UNet(3, 1, 3, channels=(8, 16), strides=(2,))


def run(cases: list[Case], path: Path, recipe: Recipe = QUICK, **options: Any) -> FitResult:
    return fit(network(), cases, recipe=recipe, prep=PREP, labels=("ball", "box"), checkpoint=path, **options)


def test_only_a_checkpoint_of_the_same_training_is_continued(
    write_case, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    case, path = write_case("a", size=(20, 20, 20)), tmp_path / "checkpoint.safetensors"

    def interrupted() -> bytes:
        with pytest.raises(TrainingStopped, match="can be continued"):
            run([case], path, stop=lambda: True)
        return path.read_bytes()

    kept = interrupted()
    assert run([case], path).resumed_from == 1
    assert run([case], path).resumed_from == 3, "a finished run is not run again"
    again = Case("a", tmp_path / "moved.nii.gz", case.label)
    again.image.write_bytes(case.image.read_bytes())
    path.write_bytes(kept)
    assert run([again], path).resumed_from == 1, "a file may move"
    other_label = write_case("b", seed=1, size=(20, 20, 20)).label
    for change in (
        lambda: run([case], path, QUICK.replace(learning_rate=1e-4)),
        lambda: run([Case("a", case.image, other_label)], path),
        lambda: run([Case("a", case.image, case.label, ("box",))], path),
        lambda: run([case], path, seed=1),
    ):
        path.write_bytes(kept)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert change().resumed_from == 0
        assert "belongs to another training" in caplog.text
    path.write_bytes(kept[: len(kept) // 2])
    assert run([case], path).resumed_from == 0
    assert "cannot be read" in caplog.text


def test_new_cases_are_drawn_twice_as_often_and_all_equally_early() -> None:
    order = draw_order(["a", "b", "c"], {"c"}, oversampling=2, draws=400, seed=3)
    assert [order.count(index) for index in range(3)] == [100, 100, 200]
    for start in range(0, 400, 4):
        assert sorted(order[start : start + 4]) == [0, 1, 2, 2]
    assert order != draw_order(["a", "b", "c"], {"c"}, oversampling=2, draws=400, seed=4)
    assert sorted(draw_order(["a", "b"], {"a", "b"}, oversampling=2, draws=2, seed=0)) == [0, 1], "all new is none new"


def test_the_command_resumes_where_it_ended(write_case, tmp_path: Path) -> None:
    write_case("a", size=(16, 16, 16))
    output = tmp_path / "model.safetensors"
    options = ["--labels", "ball,box", "--patch-size", "16,16,16", "--set", "steps=1", "--set", "epochs=1"]
    command = ["fit", str(tmp_path), str(output), *options, "--resume"]
    # The model cannot be written, after all that training: where its card belongs is a folder by now.
    output.with_suffix(".json").mkdir()
    assert CliRunner().invoke(app, command).exit_code != 0
    assert not output.exists()
    output.with_suffix(".json").rmdir()
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "resumed after step 1" in done.output
    assert output.is_file()
    assert not (tmp_path / "model.resume").exists()
