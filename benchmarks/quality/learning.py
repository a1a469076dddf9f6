"""The learning loop on hippocampus labels, on the CPU: two rounds of ten, and many with corrupted labels.

    python -m benchmarks.quality.learning [--data FOLDER] [--part target|corrupted]
        [--rounds 50] [--steps 60] [--spacing 1.5,1.5,1.5 --patch-size 32,48,32]

Cases come from the split's ``train``; ``val`` is only scored, never trained on and never chosen by. Rounds go through
``deformux.publishing.learner.Learner``, as in the app: frozen validation cases, gate, versions.

target: ten labelled volumes from scratch, then ten more. corrupted: ten correct ones, then one label each round, of
which a share (``--corrupt``) is wrong: random voxels, another case's label, labels swapped, empty, or moved. With
``--state`` an interrupted run resumes. Writes data/learning_<part>.json and the section learning_<part> of learning.md,
after each round if corrupted. ``--variant`` adds to that name: it keeps results of other settings apart.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from benchmarks.common.machine import machine_lines
from benchmarks.common.places import HIPPOCAMPUS
from benchmarks.common.report import Section, add_results, bullets, markdown_table, measure_and_write

from deformux.data.atomic_files import write_text
from deformux.data.cases import Case, find_cases
from deformux.data.preprocessing import Preprocessing
from deformux.fitting.fit import TrainingError
from deformux.fitting.recipe import RECIPES
from deformux.inference.evaluate import evaluate
from deformux.inference.metrics import mean_dice
from deformux.networks.model_file import load_model
from deformux.publishing.learner import Learner, Round

LABELS = ("anterior", "posterior")
CORRUPTIONS = ("noise", "another case's", "swapped", "empty", "moved")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HIPPOCAMPUS, help="a folder of labelled NIfTI")
    parser.add_argument("--part", choices=("target", "corrupted"), default="target")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--spacing", default="native", help="voxel size in mm; the files have 1 mm")
    parser.add_argument("--patch-size", default="48,64,48", help="voxels; the largest volume at 1 mm fits into these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first-steps", type=int, default=300, help="of the training from scratch")
    parser.add_argument("--steps", type=int, default=0, help="of the later ones; 0: 200 (target) or 60 (corrupted)")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--corrupt", type=float, default=0.3)
    parser.add_argument("--val", type=int, default=40, help="val cases to score on, at most")
    parser.add_argument("--note", default="", help="a remark for the readers of the results")
    parser.add_argument("--variant", help="added to the name of the results")
    parser.add_argument("--state", type=Path, help="folder that keeps the project between runs; default: temporary")
    add_results(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    name = "_".join(filter(None, ["learning", arguments.part, arguments.variant]))
    state = arguments.state or Path(tempfile.mkdtemp(prefix="learning-"))
    play = target if arguments.part == "target" else corrupted
    try:
        measure_and_write(arguments, name, lambda: play(arguments, state), lambda data: section(name, data))
    finally:
        if arguments.state is None:
            shutil.rmtree(state)


class Loop:
    """A project on the ``train`` cases, whose published version is scored on ``val`` whenever it changes."""

    def __init__(self, arguments: argparse.Namespace, state: Path) -> None:
        self.state = state
        self.prep = Preprocessing.from_options("mr", arguments.spacing, arguments.patch_size)
        self.learner = Learner(state, labels=LABELS, preprocessing=self.prep, keep=2)
        rng = np.random.default_rng(arguments.seed)
        self.cases = [find_cases(arguments.data, subset="train")[i] for i in rng.permutation(160)]
        self.val = find_cases(arguments.data, subset="val")[: arguments.val]
        self._scored: dict[str, float] = {}
        self._journal = state / "rounds.json"
        self.rows: list[dict[str, Any]] = json.loads(self._journal.read_text()) if self._journal.is_file() else []

    def round(
        self, number: int, cases: Sequence[Case], *, first_steps: int, steps: int, submitted: str = "correct"
    ) -> None:
        """Learn from the cases unless that was done before; keep the result and the published version's Dice."""
        if number < len(self.rows):
            return
        started, computing = time.monotonic(), time.process_time()
        scratch, gentle = (
            RECIPES[name].in_steps(count, epochs=min(20, count // 20)).replace(batch_size=1)
            for name, count in (("finetune", first_steps), ("continue", steps))
        )
        try:
            outcome = self.learner.learn(cases, Round(scratch_recipe=scratch, continue_recipe=gentle))
            told = {
                "version": outcome.version,
                "published": outcome.published,
                "reason": outcome.decision.reason,
                "set_aside": sorted(outcome.set_aside),
                "doubtful": sorted(outcome.decision.doubtful),
                "counted": len(outcome.decision.counted),
            }
        except TrainingError as error:
            told = {"version": None, "published": False, "reason": str(error)}
        seconds, computing = time.monotonic() - started, time.process_time() - computing
        served = self.learner.versions.published()
        told |= {"seconds": round(seconds, 1), "cpu_seconds": round(computing, 1), "labelled": len(cases)}
        self.rows.append({**told, "served": served, "val": self.dice(served), "submitted": submitted})
        write_text(self._journal, json.dumps(self.rows))
        print(len(self.rows), self.rows[-1], flush=True)

    @property
    def patch(self) -> str:
        """Return the patch of one step in words."""
        size = "×".join(map(str, self.prep.patch_size))
        spacing = "×".join(f"{mm:g}" for mm in self.prep.spacing_mm) if self.prep.spacing_mm else "1×1×1"
        return f"one patch of {size} voxels of {spacing} mm"

    def dice(self, version: str | None) -> float | None:
        """Return the mean Dice of a version on ``val``."""
        if version is None:
            return None
        if version not in self._scored:
            network, card = load_model(self.learner.versions.path(version))
            scores = evaluate(network, self.val, card.preprocessing, n_labels=len(LABELS))
            self._scored[version] = round(mean_dice(list(scores.values())), 4)
        return self._scored[version]


def target(arguments: argparse.Namespace, state: Path) -> dict[str, Any]:
    """Run two rounds of ten new labels each."""
    loop = Loop(arguments, state)
    steps = arguments.steps or 200
    for number, count in enumerate((10, 20)):
        loop.round(number, loop.cases[:count], first_steps=arguments.first_steps, steps=steps)
    facts = [
        f"tiny from scratch, {arguments.first_steps} steps, then {steps} from the published version (and as many as at "
        f"first from scratch, where the training labels have doubled since); {loop.patch} per step",
        f"scored on {len(loop.val)} val cases; seconds include validation and the gate, not the scoring on val",
    ]
    return as_data("Two rounds of ten labelled volumes", loop.rows, [*facts, *filter(None, [arguments.note])])


def corrupted(arguments: argparse.Namespace, state: Path) -> Iterator[dict[str, Any]]:
    """Run rounds of one new label each, some of them wrong; yield the results so far after each round."""
    loop = Loop(arguments, state)
    rng = np.random.default_rng(arguments.seed + 1)
    labelled, wrong = loop.cases[:10], 0
    submitted = loop.cases[10 : 10 + arguments.rounds - 1]
    steps = arguments.steps or 60
    for number in range(arguments.rounds):
        kind = "correct"
        if number > 0:
            case = submitted[number - 1]
            if rng.random() < arguments.corrupt:
                kind = CORRUPTIONS[int(rng.integers(len(CORRUPTIONS)))]
                case = corrupt(case, kind, loop.cases[(number * 7) % 160], rng, state / "corrupted")
                wrong += 1
            labelled = [*labelled, case]
        played = len(loop.rows)
        loop.round(number, labelled, first_steps=arguments.first_steps, steps=steps, submitted=kind)
        # Not after the rounds of an earlier run that this one resumes.
        if len(loop.rows) > played or number + 1 == arguments.rounds:
            yield corrupted_data(arguments, loop, steps=steps, wrong=wrong)


def corrupted_data(arguments: argparse.Namespace, loop: Loop, *, steps: int, wrong: int) -> dict[str, Any]:
    """Return the results of the rounds so far, of which ``wrong`` submitted a corrupted label."""
    rows = loop.rows
    best = np.fmax.accumulate([row["val"] for row in rows])
    fall = max(before - row["val"] for before, row in zip(best, rows, strict=True))
    count = f"{len(rows)} rounds" if len(rows) == arguments.rounds else f"{len(rows)} of {arguments.rounds} rounds"
    facts = [
        f"{count}, one submit each, {wrong} of them corrupted ({', '.join(CORRUPTIONS)}); "
        f"{arguments.first_steps} steps in the first round, then {steps}; {loop.patch} per step",
        f"scored on {len(loop.val)} val cases with their correct labels",
        f"published in {sum(bool(row['published']) for row in rows)} rounds; Dice first {rows[0]['val']}, "
        f"last {rows[-1]['val']}, best {max(best):.4f}; **largest fall from the best so far {fall:.4f}** (limit 0.01)",
    ]
    title = "Rounds of learning from partly corrupted labels"
    return as_data(title, rows, [*facts, *filter(None, [arguments.note])])


def corrupt(case: Case, kind: str, other: Case, rng: np.random.Generator, folder: Path) -> Case:
    """Return the case with a wrong label of the given kind."""
    file = nib.load(case.label)
    label = np.asarray(file.dataobj).astype(np.uint8)
    if kind == "noise":
        label = rng.integers(0, 3, label.shape).astype(np.uint8)
    elif kind == "swapped":
        label = np.array([0, 2, 1], np.uint8)[label]
    elif kind == "empty":
        label = np.zeros_like(label)
    elif kind == "moved":
        label = np.roll(label, 10, axis=int(rng.integers(3)))
    else:
        theirs = np.asarray(nib.load(other.label).dataobj).astype(np.uint8)
        label = np.zeros_like(label)
        common = tuple(slice(0, min(a, b)) for a, b in zip(label.shape, theirs.shape, strict=True))
        label[common] = theirs[common]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / case.label.name
    nib.save(nib.Nifti1Image(label, file.affine), path)
    return dataclasses.replace(case, label=path)


def as_data(title: str, rows: Sequence[dict[str, Any]], facts: Sequence[str]) -> dict[str, Any]:
    """Return what is kept of the rounds."""
    return {"title": title, "machine": machine_lines(), "facts": list(facts), "rounds": list(rows)}


def section(name: str, data: Mapping[str, Any]) -> Section:
    """Write the rounds as a table."""
    heads = ("round", "labelled", "submitted", "seconds", "CPU seconds", "published", "served", "Dice on val", "why")
    rows = [
        (
            *(number, row["labelled"], row["submitted"], row["seconds"], row["cpu_seconds"]),
            *("yes" if row["published"] else "no", row["served"], row["val"], row["reason"]),
        )
        for number, row in enumerate(data["rounds"], start=1)
    ]
    facts = bullets((*data["machine"], *data["facts"]))
    return Section("learning", name, data["title"], [*facts, "", *markdown_table(heads, rows)])


if __name__ == "__main__":
    main()
