"""Many organs in one CT: train on the lower half of its slices, test on the upper. A smoke test, not a claim.

    python -m benchmarks.quality.transfer                          # 6 networks of two sizes, 3 seeds, 400 steps each
    python -m benchmarks.quality.transfer --steps 2 --seeds 1 --networks UNet --sizes tiny    # to try it

It exercises sparse label values, Hounsfield units and a resampling to 2.5 mm and back: a fault there shows as an organ
that no network finds. Labels are those with at least 50 voxels in each half. A killed run resumes where it stopped.
Adds each training to data/transfer.json and rewrites the section quality_transfer of few_labels.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from benchmarks.common.command import RECIPE, options, placement, run_command, trial_data
from benchmarks.common.comparison import COST_NOTES, comparison_plot, comparison_tables, network_trials
from benchmarks.common.networks import NETWORKS, SIZES
from benchmarks.common.places import CT
from benchmarks.common.report import Section, markdown_table, write_section
from benchmarks.common.trial_report import NOTES, facts
from benchmarks.common.trial_runner import run_trials
from benchmarks.common.trials import Result, Task

from deformux.data.atomic_files import replacing
from deformux.data.cases import Case
from deformux.data.preprocessing import Preprocessing
from deformux.interactive.simulated_annotator import dense_labels

_MIN_VOXELS = 50


def main() -> None:
    parser = options("transfer", __doc__, data=CT)
    parser.add_argument("--steps", type=int, default=400, help="of each training")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=SIZES, help="which sizes")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS, help="which networks")
    arguments = parser.parse_args()
    task = halves(arguments.data, arguments.work / "data")
    trials = network_trials(
        task, arguments.networks, arguments.sizes, arguments.seeds, steps=arguments.steps, **placement(arguments)
    )

    def report(results: Sequence[Result]) -> None:
        section = Section(
            "few_labels",
            "quality_transfer",
            "One abdominal CT: lower half to train on, upper half to test on",
            [
                *facts(results, len(trials), f"each network had {arguments.steps} steps"),
                *comparison_tables(results),
                *_labels(results, task),
                *NOTES,
                *COST_NOTES,
            ],
            comparison_plot(results),
        )
        write_section(arguments.results, section)

    run_trials(trials, trial_data(arguments, "transfer"), report, jobs=arguments.jobs)


def halves(data: Path, folder: Path) -> Task:
    """Write the two halves of the CT into a folder as volumes of their own, with labels 1, 2, …; return the task."""
    names: Mapping[str, int] = json.loads((data / "labels.json").read_text())["example_seg.nii.gz"]
    image, label = (
        nib.as_closest_canonical(nib.load(data / name)) for name in ("example_ct_sm.nii.gz", "example_seg.nii.gz")
    )
    values = np.asarray(label.dataobj)
    middle = values.shape[2] // 2
    both = {
        name: value
        for name, value in names.items()
        if min((part == value).sum() for part in (values[..., :middle], values[..., middle:])) >= _MIN_VOXELS
    }
    dense = nib.Nifti1Image(dense_labels(values, list(both.values())), label.affine)
    lower, upper = (
        Case(
            name,
            _part(image, slices, folder / f"{name}_image.nii.gz"),
            _part(dense, slices, folder / f"{name}_label.nii.gz"),
        )
        for name, slices in (("lower", slice(None, middle)), ("upper", slice(middle, None)))
    )
    return Task(
        labels=tuple(both),
        prep=Preprocessing("ct", spacing_mm=(2.5, 2.5, 2.5), patch_size=(64, 64, 16)),
        recipe=RECIPE,
        train=(lower,),
        test=(upper,),
    )


def _part(file: nib.Nifti1Image, slices: slice, path: Path) -> Path:
    """Write some of a volume's slices, at their place in the patient."""
    with replacing(path) as temporary:
        nib.save(file.slicer[:, :, slices], temporary)
    return path


def _labels(results: Sequence[Result], task: Task) -> list[str]:
    """Return a table of each label's Dice by each network, the mean over seeds."""
    groups = dict.fromkeys((r.trial.network, r.trial.size) for r in results)
    columns = [
        np.mean([r.per_case("dice")[0] for r in results if (r.trial.network, r.trial.size) == group], axis=0)
        for group in groups
    ]
    heads = ["label", *(f"{network} {size}" for network, size in groups)]
    rows = [[name, *(f"{column[i]:.3f}" for column in columns)] for i, name in enumerate(task.labels)]
    return ["### Dice of each label", "", *markdown_table(heads, rows)]


if __name__ == "__main__":
    run_command(main)
