"""The plan's choice to keep the largest piece of a segmentation."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage
from typer.testing import CliRunner

from deformux.cli.main import app
from deformux.data.cases import Case, find_cases
from deformux.data.choices import Choices
from deformux.data.fingerprint import read_fingerprint
from deformux.data.planned_output import planned_keep_largest
from deformux.data.planning import Plan, make_plan

SIZE = (30, 24, 20)


def write_cases(folder: Path, *labels: np.ndarray) -> list[Case]:
    cases = []
    for number, label in enumerate(labels):
        scan = np.random.default_rng(number).integers(0, 1000, SIZE).astype(np.int16)
        case = Case(f"c{number}", folder / "images" / f"c{number}.nii.gz", folder / "labels" / f"c{number}.nii.gz")
        for path, values in ((case.image, scan), (case.label, label)):
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(values, np.eye(4)), path)
        cases.append(case)
    return cases


def whole(*values: int) -> np.ndarray:
    """Return one piece of labels, each of which touches the next by a side."""
    label = np.zeros(SIZE, np.uint8)
    for at, value in enumerate(values):
        label[2 + 6 * at : 8 + 6 * at, 3:9, 4:10] = value
    return label


def apart(share: float) -> np.ndarray:
    """Return labels 1 and 2 of which a share is in another piece, beside unlabelled voxels."""
    label = whole(1, 2)
    small = round(share * np.count_nonzero(label) / (1 - share))
    label[25, 2:22, :].flat[:small] = 2
    label[0] = 255
    return label


def joined(*, far: bool) -> np.ndarray:
    """Return two organs, 1 and 2, near to or far from each other, and a vessel, 3, along both."""
    label = np.zeros(SIZE, np.uint8)
    label[2:28, 15:17, 5:7] = 3
    label[2:8, 5:15, 2:12], label[slice(22, 28) if far else slice(8, 14), 5:15, 2:12] = 1, 2
    return label


def planned(cases: list[Case], labels: int = 2, **given: bool) -> Plan:
    names = [str(n) for n in range(labels)]
    return make_plan(read_fingerprint([], cases), labels=names, given=Choices(**given))


@pytest.mark.parametrize(
    ("labels", "keep", "reason"),
    [
        ([whole(1, 2)] * 3, True, "the labels are one piece in all 3 labelled scans"),
        ([whole(1, 2)] * 3 + [apart(0.005), whole(1)], True, "in all 5 labelled scans"),
        ([whole(1, 2)] * 3 + [apart(0.02)], False, "in 1 of 4 labelled scans the labels are several pieces"),
        ([whole(1, 2)] * 2, False, "2 labelled scans are too few"),
        # Organs that are annotated in different scans.
        ([whole(1)] * 3 + [whole(2)] * 3, False, "only 0 labelled scans have all labels"),
        ([whole(1, 2)] * 2 + [np.zeros(SIZE, np.uint8)] * 2, False, "2 labelled scans are too few"),
    ],
)
def test_the_labels_decide(labels: list[np.ndarray], keep: bool, reason: str, tmp_path: Path) -> None:
    plan = planned(write_cases(tmp_path, *labels))
    assert plan.preprocessing.keep_largest == keep
    assert reason in plan.reasons["keep_largest"]
    row = next(row for row in plan.rows() if row[0] == "keep_largest")
    assert row[1] == ("yes" if keep else "no")
    assert Plan.from_dict(plan.to_dict()) == plan


@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, -1, 1)])
def test_the_place_of_the_labels_is_planned_where_scans_agree(signs: tuple[int, ...], tmp_path: Path) -> None:
    """Of the patient, whichever way the file's axes point."""
    cases = write_cases(tmp_path, *[whole(1, 2)] * 3)
    for case in cases:
        for path in (case.image, case.label):
            image = nib.load(path)
            nib.save(nib.Nifti1Image(np.asarray(image.dataobj), np.diag([*signs, 1.0])), path)
    plan = planned(cases)
    share = np.array([8, 6, 7]) / SIZE
    expected = np.where(np.array(signs) > 0, share, 1 - share)
    np.testing.assert_allclose(plan.preprocessing.labels_center, expected, atol=1e-3)
    assert "pieces far from where they lie" in plan.reasons["keep_largest"]
    apart_ = Choices(keep_largest=False).applied_to(plan.preprocessing)
    turned = Choices(frame="acquisition").applied_to(plan.preprocessing)
    assert apart_.labels_center is turned.labels_center is None


def test_scans_that_do_not_agree_have_no_usual_place(tmp_path: Path) -> None:
    moved = np.roll(whole(1, 2), (14, 10, 0), (0, 1, 2))
    plan = planned(write_cases(tmp_path, whole(1, 2), moved, whole(1, 2)))
    assert plan.preprocessing.keep_largest
    assert plan.preprocessing.labels_center is None


@pytest.mark.parametrize("far", [False, True])
def test_organs_that_a_vessel_joins_are_kept(far: bool, tmp_path: Path) -> None:
    """A network that misses a part of the vessel must not lose an organ."""
    assert ndimage.label(joined(far=far))[1] == 1
    plan = planned(write_cases(tmp_path, *[joined(far=far)] * 3), labels=3)
    assert plan.preprocessing.keep_largest != far
    assert ("thin bridges" in plan.reasons["keep_largest"]) == far


def test_a_given_choice_is_taken_as_it_is(tmp_path: Path) -> None:
    cases = write_cases(tmp_path, *[whole(1, 2)] * 3)
    for keep in (False, True):
        plan = planned(cases, keep_largest=keep)
        assert (plan.preprocessing.keep_largest, plan.reasons["keep_largest"]) == (keep, "given")
        choices = Choices(keep_largest=keep)
        assert Choices.from_options(**choices.to_options()) == choices
        assert choices.applied_to(planned(cases).preprocessing).keep_largest == keep
    with pytest.raises(ValueError, match="keep_largest must be yes or no; got 'maybe'"):
        Choices.from_options(keep_largest="maybe")


def test_the_command_shows_and_takes_the_choice(tmp_path: Path) -> None:
    write_cases(tmp_path, *[whole(1, 2)] * 3)
    shown = {}
    for given in ("auto", "no"):
        arguments = ["plan", str(tmp_path), "--keep-largest", given, "--spacing", "native", "--patch-size", "16,16,16"]
        done = CliRunner().invoke(app, arguments, env={"COLUMNS": "300"})
        assert done.exit_code == 0, done.output
        shown[given] = next(line for line in done.output.splitlines() if "keep_largest" in line)
    assert "yes" in shown["auto"]
    assert "one piece in all 3" in shown["auto"]
    assert "given" in shown["no"]


@pytest.mark.parametrize(("name", "keep"), [("heart_mr_acdc", True), ("hippocampus", True), ("abdomen_mr", False)])
def test_real_labels_decide(shared_data: Path, name: str, keep: bool) -> None:
    if not (shared_data / name).is_dir():
        pytest.skip(f"there is no {name} in ../shared/data")
    found = read_fingerprint([], find_cases(shared_data / name)[:6])
    assert planned_keep_largest(found, max(max(facts.voxels) for facts in found.labels.values()))[0] == keep
