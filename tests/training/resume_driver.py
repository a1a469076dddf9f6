"""Train in processes that are killed, for test_resume.py: import once, then fork a process for each attempt.

    python resume_driver.py FOLDER PLAN...

A plan is ``name:event:count[,event:count]``: the run ``name`` is attempted once for each event, which ends the process
(SIGKILL) when it happens for the count-th time, and then once more to its end. Prints one JSON line for each run.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from pathlib import Path

import torch
from monai.networks.nets import UNet
from safetensors.torch import save_file

import deformux.data.atomic_files
import deformux.fitting.checkpoint
import deformux.networks.deformux_net
from deformux.data.cases import find_cases
from deformux.data.preprocessing import Preprocessing
from deformux.fitting.fit import TrainingStopped, fit
from deformux.fitting.recipe import RECIPES
from deformux.networks.presets import Preset
from deformux.publishing.learner import Learner, Round

PREP = Preprocessing("ct", patch_size=(16, 16, 16))
RECIPE = RECIPES["finetune"].replace(
    steps=6, epochs=2, batch_size=2, mixed_precision=False, elastic_probability=1.0, low_resolution=0.5, patience=None
)

# A network of a hundredth of the size, under the name of an ordinary one.
_HUNDREDTH = Preset((4, 8, 16, 32), 32, (1, 1, 1, 1))


def kill_at(event: str, count: int) -> None:
    """End this process when something happens for the count-th time."""
    seen = 0

    def happens() -> None:
        nonlocal seen
        seen += 1
        if seen == count:
            os.kill(os.getpid(), signal.SIGKILL)

    if event == "step":
        Attempt.on_step = happens
    elif event == "half-written":

        def half(tensors: dict, path: Path, metadata: dict) -> None:
            save_file(tensors, path, metadata=metadata)
            os.truncate(path, os.path.getsize(path) // 2)
            happens()
            save_file(tensors, path, metadata=metadata)

        deformux.fitting.checkpoint.save_file = half
    elif event in ("before-rename", "after-rename"):
        replace = os.replace

        def renaming(*arguments: object) -> None:
            if event == "before-rename":
                happens()
            replace(*arguments)
            if event == "after-rename":
                happens()

        deformux.data.atomic_files.os.replace = renaming
    else:
        raise ValueError(event)


class Attempt:
    """One attempt at a run; steps are counted when ``fit`` asks whether to stop."""

    steps = 0
    stop_at: int | None = None

    @staticmethod
    def on_step() -> None:
        pass

    @classmethod
    def stop(cls) -> bool:
        cls.steps += 1
        cls.on_step()
        return cls.steps == cls.stop_at


def train(folder: Path, name: str) -> None:
    torch.set_num_threads(1)
    cases = find_cases(folder)
    if name == "learn":
        deformux.networks.deformux_net.PRESETS = {"tiny": _HUNDREDTH}
        step = RECIPE.replace(steps=1, epochs=1, batch_size=1)
        learner = Learner(folder / "state", labels=("ball", "box"), preprocessing=PREP)
        learner.learn(cases, Round(scratch_recipe=step, continue_recipe=step))
        return
    torch.manual_seed(0)
    schedule = name.partition("-")[0]
    recipe = RECIPE.replace(schedule="one_cycle" if schedule == "clicks" else schedule, click_probability=0.7)
    network: torch.nn.Module
    if schedule == "clicks":
        deformux.networks.deformux_net.PRESETS = {"tiny": _HUNDREDTH}
        network = deformux.networks.deformux_net.DeformUXNet(1, 3, "tiny", guidance=True)
    else:
        # Small, so that the test is quick; with dropout, so that it also draws from the global random state.
        network = UNet(3, 1, 3, channels=(8, 16), strides=(2,), dropout=0.1)
    try:
        result = fit(
            network,
            cases[:2],
            recipe=recipe,
            prep=PREP,
            labels=("ball", "box"),
            val_cases=cases[2:],
            new={cases[1].id},
            checkpoint=folder / name / "checkpoint.safetensors",
            checkpoint_seconds=0,
            stop=Attempt.stop,
        )
    except TrainingStopped:
        os._exit(3)
    save_file(network.state_dict(), folder / f"{name}.safetensors")
    told = {"losses": result.losses, "best": result.best_dice, "per_case": result.per_case}
    here = {"resumed_from": result.resumed_from, "steps": Attempt.steps}
    (folder / f"{name}.json").write_text(json.dumps({"result": told, "here": here}))


def attempt(folder: Path, name: str, event: str = "", count: int = 0) -> int:
    child = os.fork()
    if child == 0:
        try:
            if event == "disk-full":
                # Files beyond this size fail; a checkpoint is larger, everything else smaller.
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
                Attempt.stop_at = count
            elif event == "stop":
                Attempt.stop_at = count
            elif event:
                kill_at(event, count)
            train(folder, name)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    folder = Path(sys.argv[1])
    for plan in sys.argv[2:]:
        name, _, events = plan.partition(":")
        codes = []
        for event in filter(None, events.split(",")):
            kind, _, count = event.partition("=")
            codes.append(attempt(folder, name, kind, int(count)))
        codes.append(attempt(folder, name))
        print(json.dumps({"name": name, "codes": codes}), flush=True)


if __name__ == "__main__":
    main()
