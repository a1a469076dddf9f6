"""Plans: each choice on sets whose right answer is known, and the command."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import preloaded
from deformux.data.cases import find_cases
from deformux.data.choices import Choices
from deformux.data.fingerprint import Fingerprint, read_fingerprint
from deformux.data.planned_intensities import is_hounsfield, planned_modality, planned_window
from deformux.data.planning import Plan, Speed, make_plan
from deformux.data.preprocessing import Preprocessing
from deformux.data.scan_facts import LEVELS, Intensities, LabelledFacts, ScanFacts
from deformux.fitting.recipe import RECIPES
from deformux.fitting.speed import measure_speed

MR = Intensities(0, 0, 900, 1200, True)
CT = Intensities(-1024, -1000, 400, 1500, True)


def scan(shape=(60, 70, 50), spacing=(1.0, 1.0, 1.0), *, rotation=None, intensities=MR, modality="") -> ScanFacts:
    affine = np.eye(4)
    affine[:3, :3] = (np.eye(3) if rotation is None else rotation) @ np.diag(spacing)
    return ScanFacts(shape, tuple(map(tuple, affine)), modality, intensities)


def label(*boxes, chords=None, percentiles=()) -> LabelledFacts:
    """Facts of labels 1..n that fill the boxes."""
    sizes = [np.subtract(stop, start) for start, stop in boxes]
    return LabelledFacts(
        voxels={i: int(np.prod(size)) for i, size in enumerate(sizes, 1)},
        boxes=dict(enumerate(boxes, 1)),
        chords_vox={i: tuple(map(float, chords or size)) for i, size in enumerate(sizes, 1)},
        percentiles=percentiles,
        largest_share=1.0,
    )


def project(*pairs: tuple[ScanFacts, LabelledFacts | None], modality: str = "") -> Fingerprint:
    scans = {f"s{i}": facts for i, (facts, _) in enumerate(pairs)}
    return Fingerprint(scans, {f"s{i}": facts for i, (_, facts) in enumerate(pairs) if facts}, modality=modality)


def speed(voxels_per_second: float, **changes) -> object:
    return lambda preset, strides: Speed(voxels_per_second, **changes)


# Spacing


def test_the_spacing_is_named_even_where_all_scans_agree() -> None:
    same = project((scan(), label(((5, 5, 5), (25, 30, 25)))), (scan(spacing=(1.005, 1, 1)), None))
    assert make_plan(same, labels=["a"]).preprocessing.spacing_mm == pytest.approx((1, 1, 1), rel=0.01)
    differ = project((scan(), label(((5, 5, 5), (25, 30, 25)))), (scan(spacing=(1.1, 1, 1)), None))
    assert make_plan(differ, labels=["a"]).preprocessing.spacing_mm == pytest.approx((1.05, 1, 1))


def test_spacing_is_coarsened_until_the_labels_fit_and_thin_labels_remain() -> None:
    wide = ((10, 10, 10), (170, 170, 110))

    def planned(*thin: float, voxels_per_second: float = 100e3) -> Plan:
        """Plan for a wide organ and labels beside it of these thicknesses in voxels of 1 mm."""
        chords = [(100.0, 100.0, 100.0), *((t,) * 3 for t in thin)]
        facts = label(*(wide,) * len(chords))
        facts = dataclasses.replace(facts, chords_vox=dict(enumerate(chords, 1)))
        names = [str(n) for n in range(len(chords))]
        return make_plan(project((scan((256, 256, 128)), facts)), labels=names, measure=speed(voxels_per_second))

    free = planned()
    assert free.preprocessing.spacing_mm is not None
    assert min(free.preprocessing.spacing_mm) > 3.5
    assert "coarser than nnU-Net's 1 × 1 × 1 mm" in free.reasons["spacing_mm"]
    assert "one patch sees all labels" in free.reasons["spacing_mm"]
    seen = np.array(free.preprocessing.spacing_mm) * free.preprocessing.patch_size
    assert (seen > (160, 160, 100)).sum() >= 2
    # A vessel of 6 voxels beside it keeps two, and one of 2 forbids any coarsening.
    vessel = planned(6)
    assert vessel.preprocessing.spacing_mm == pytest.approx((3, 3, 3))
    assert "three quarters of the labels stay 2 voxels thick" in vessel.reasons["spacing_mm"]
    assert planned(2).preprocessing.spacing_mm == (1, 1, 1)
    # One thin label of many does not make the others unlearnable.
    assert planned(2, 6, 12, 15, 18, 21, 24).preprocessing.spacing_mm == pytest.approx((3, 3, 3))
    # A device that is fast enough keeps nnU-Net's.
    assert planned(voxels_per_second=100e6).preprocessing.spacing_mm == (1, 1, 1)


def test_a_patch_sees_long_labels_although_its_sides_are_multiples_of_the_strides() -> None:
    """As five vertebrae: of 80 × 80 × 200 mm, the voxels that a patch has, a patch of 24×32×32 saw half."""
    spine = label(*(((5, 70, 12 + 40 * n), (15, 150, 52 + 40 * n)) for n in range(5)))
    found = project((scan((20, 224, 224), (4, 1, 1)), spine))
    for thousands in (70, 84, 100, 120, 140):
        plan = make_plan(found, labels=[f"L{n}" for n in range(1, 6)], measure=speed(1e3 * thousands))
        prep = plan.preprocessing
        sides = np.array(prep.patch_size) * prep.spacing_mm
        assert np.prod(np.minimum(sides / (40, 80, 200), 1)) >= 0.75, (thousands, prep)


# Strides and patch


def test_a_patch_sees_the_labels_with_a_margin_and_no_more() -> None:
    box = ((100, 100, 50), (124, 130, 80))
    plan = make_plan(project((scan((256, 256, 128)), label(box))), labels=["a"], measure=speed(10e6), minutes=30)
    assert all(
        mm < side <= 1.25 * mm + 24 for mm, side in zip((24, 30, 30), plan.preprocessing.patch_size, strict=True)
    )
    # Without labels, it sees the scans.
    plan = make_plan(project((scan((64, 64, 64)), None)), labels=["a"], measure=speed(10e6), minutes=30)
    assert plan.preprocessing.patch_size == (64, 64, 64)
    assert "no labels" in plan.reasons["patch_size"]


def test_more_speed_or_minutes_give_more_voxels_and_steps() -> None:
    found = project((scan((256, 256, 128)), label(((0, 0, 0), (200, 200, 100)), chords=(6, 6, 6))))
    slow, fast, long = (
        make_plan(found, labels=["a"], measure=speed(s), minutes=m) for s, m in ((50e3, 10), (500e3, 10), (50e3, 100))
    )
    for more in (fast, long):
        assert math.prod(more.preprocessing.patch_size) > math.prod(slow.preprocessing.patch_size)
        assert more.facts["steps"] >= slow.facts["steps"]
        assert more.facts["seconds_per_step"] * more.facts["steps"] <= 60 * more.facts["minutes"]


def test_memory_bounds_the_patch_of_a_gpu() -> None:
    found = project((scan((512, 512, 300)), label(((0, 0, 0), (500, 500, 290)))))
    measure = speed(60e6, bytes_per_voxel=5000.0, free_bytes=8e9)
    plan = make_plan(found, labels=["a"], device="cuda", measure=measure)
    voxels = plan.recipe_changes["batch_size"] * math.prod(plan.preprocessing.patch_size)
    assert 5000 * voxels < 8e9
    assert math.prod(plan.preprocessing.patch_size) > 64**3


@pytest.mark.parametrize(("gigabytes", "preset"), [(6.0, "tiny"), (12.0, "small"), (80.0, "base"), (None, "small")])
def test_preset_by_device(gigabytes: float | None, preset: str) -> None:
    found = project((scan(), None))
    assert make_plan(found, labels=["a"]).preset == "tiny"
    assert make_plan(found, labels=["a"], device="cuda:0", gpu_gigabytes=gigabytes).preset == preset


def test_the_speed_is_measured_with_preset_and_strides() -> None:
    asked = []

    def measure(preset: str, strides) -> Speed:
        asked.append((preset, strides))
        return Speed(1e5)

    make_plan(project((scan((256, 256, 10), (1.5, 1.5, 10.0)), None)), labels=["a"], measure=measure)
    assert asked == [("tiny", ((2, 2, 1), (2, 2, 1), (2, 2, 2), (2, 2, 1)))]


def test_turning_all_scans_changes_frame_and_nothing_else() -> None:
    """The plan of short-axis hearts at random angles is that of the same hearts straight."""
    rng = np.random.default_rng(1)
    heart = label(((80, 90, 1), (140, 160, 9)), chords=(8, 8, 2))
    turned = []
    for _ in range(6):
        q, _ = np.linalg.qr(rng.normal(size=(3, 3)))
        turned.append((scan((256, 216, 10), (1.5, 1.5, 9.0), rotation=q * np.sign(np.linalg.det(q))), heart))
    oblique = make_plan(project(*turned), labels=["a"])
    straight = make_plan(project(*[(scan((256, 216, 10), (1.5, 1.5, 9.0)), heart)] * 6), labels=["a"])
    assert (oblique.preprocessing.frame, straight.preprocessing.frame) == ("acquisition", "ras")
    assert dataclasses.replace(oblique.preprocessing, frame="ras") == straight.preprocessing
    assert oblique.strides == straight.strides


# Intensities


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (CT, True),
        (Intensities(-1024.0, -1001.3, 380.2, 1403.5, False), True),  # resampled
        (Intensities(-160, -95, 210, 900, True), True),  # cropped to soft tissue
        (Intensities(-3024, -3024, 1200, 3071, True), True),  # padded
        (MR, False),
        (Intensities(-12, 0, 900, 1200, True), False),  # MR that a cubic resampling overshot
        (Intensities(-4.1, -2.2, 3.0, 8.0, False), False),  # standardised
        (Intensities(0, 10, 2200, 4095, True), False),  # CT with an offset, or MR
        (Intensities(-32768, -30000, 30000, 32767, True), False),
    ],
)
def test_hounsfield_units_are_told_from_others(found: Intensities, expected: bool) -> None:
    assert is_hounsfield(found) is expected
    modality, _ = planned_modality(project((scan(intensities=found), None)))
    assert modality == ("ct" if expected else "mr")


def test_headers_count_before_values() -> None:
    assert planned_modality(project((scan(intensities=CT, modality="MR"), None)))[0] == "mr"
    assert planned_modality(project((scan(intensities=MR), None), modality="CT"))[0] == "ct"
    # What is neither decides nothing.
    assert planned_modality(project((scan(intensities=CT, modality="OT"), None), modality="?"))[0] == "ct"
    assert planned_modality(project((scan(intensities=None), None)))[0] == "mr"


def test_modality_of_real_scans(shared_data: Path) -> None:
    folders = {"hippocampus": "mr", "heart_mr_acdc": "mr", "spine_mr": "mr", "abdomen_mr": "mr", "mouse_brain_mr": "mr"}
    for folder, expected in folders.items():
        images = sorted((shared_data / folder / "images").iterdir())[:6]
        assert planned_modality(read_fingerprint(images))[0] == expected, folder
    for path in ("ct/example_ct.nii.gz", "ct/example_ct_sm.nii.gz", "odd/chest_ct/images/ct64.nii.gz"):
        found = read_fingerprint([shared_data / path])
        assert found.scans, found.unusable
        assert planned_modality(found)[0] == "ct", path
    assert planned_modality(read_fingerprint([shared_data / "ct/example_mr_sm.nii.gz"]))[0] == "mr"


def test_the_window_is_that_of_the_labelled_voxels() -> None:
    values = np.random.default_rng(0).normal(60, 20, 50_000)
    facts = label(((0, 0, 0), (9, 9, 9)), percentiles=tuple(np.percentile(values, LEVELS)))
    window, reason = planned_window(project((scan(intensities=CT), facts)))
    assert window == pytest.approx(np.percentile(values, (0.5, 99.5)), abs=1)
    assert "labelled voxels of 1 scan" in reason
    assert planned_window(project((scan(intensities=CT), None)))[0] == (-175, 250)
    # Bounded: neither padding nor metal, nor a window of one value.
    flat = label(((0, 0, 0), (9, 9, 9)), percentiles=(40.0,) * len(LEVELS))
    assert planned_window(project((scan(), flat)))[0] == (-10, 90)
    wild = label(((0, 0, 0), (9, 9, 9)), percentiles=tuple(np.linspace(-9000, 9000, len(LEVELS))))
    assert planned_window(project((scan(), wild)))[0] == (-1024, 3071)


def test_the_window_of_a_real_ct_equals_numpy(shared_data: Path) -> None:
    image, mask = shared_data / "ct/example_ct_sm.nii.gz", shared_data / "ct/example_seg.nii.gz"
    case = dataclasses.replace(find_cases(shared_data / "hippocampus")[0], image=image, label=mask)
    case = dataclasses.replace(case, id="ct")
    plan = make_plan(read_fingerprint([], [case]), labels=[f"l{i}" for i in range(1, 100)])
    values, labels = (np.asarray(nib.load(path).dataobj) for path in (image, mask))
    assert plan.preprocessing.modality == "ct"
    np.testing.assert_allclose(plan.preprocessing.window_hu, np.percentile(values[labels > 0], (0.5, 99.5)), atol=3)


# What the user decides, and files


def test_what_is_given_is_kept() -> None:
    given = Choices.from_options(
        modality="ct",
        spacing="2,2,3",
        patch_size="32,48,16",
        window="-1000,400",
        percentiles="1,99",
        frame="acquisition",
        preset="small",
    )
    given = dataclasses.replace(given, batch_size=4)
    plan = make_plan(project((scan(), label(((0, 0, 0), (9, 9, 9))))), labels=["a"], given=given)
    assert plan.preprocessing == Preprocessing(
        "ct", (2.0, 2.0, 3.0), (32, 48, 16), (-1000.0, 400.0), (1.0, 99.0), frame="acquisition"
    )
    assert (plan.preset, plan.recipe_changes["batch_size"]) == ("small", 4)
    for name in ("modality", "window_hu", "frame", "spacing_mm", "patch_size", "preset", "batch_size"):
        assert plan.reasons[name] == "given"
    native = Choices.from_options(spacing="native")
    mixed = project((scan(), None), (scan(spacing=(3, 3, 3)), None))
    assert make_plan(mixed, labels=["a"], given=native).preprocessing.spacing_mm is None
    assert Choices.from_options() == Choices()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window": "1"}, "HU window must be two numbers such as -175,250; got '1'"),
        ({"window": "5,nan"}, "HU window must be two numbers"),
        ({"window": "5,1"}, "low < high"),
        ({"percentiles": "1,101"}, "percentiles must be"),
        ({"frame": "lps"}, "frame must be one of"),
        ({"patch_size": "0,1,1"}, "patch size must be"),
        ({"spacing": "1,1"}, "spacing must be"),
    ],
)
def test_bad_choices(options: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Choices.from_options(**options)


def test_a_plan_survives_json_and_changes_a_recipe() -> None:
    plan = make_plan(project((scan((99, 99, 12), (1, 1, 7)), label(((0, 0, 0), (50, 50, 9))))), labels=["a"])
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    recipe = RECIPES["finetune"].replace(**plan.recipe_changes)
    assert recipe.batch_size == plan.recipe_changes["batch_size"] == 2
    assert set(plan.recipe_changes) <= {field.name for field in dataclasses.fields(recipe)}
    with pytest.raises(ValueError, match="a plan cannot be read"):
        Plan.from_dict({"preset": "tiny"})


def test_a_project_without_usable_scans_has_no_plan() -> None:
    with pytest.raises(ValueError, match="no usable scans"):
        make_plan(Fingerprint({}), labels=["a"])


def test_labels_that_the_project_does_not_have_do_not_count() -> None:
    far = label(((5, 5, 5), (20, 20, 20)), ((0, 0, 0), (60, 70, 50)))
    one, two = (make_plan(project((scan(), far)), labels=names) for names in (["a"], ["a", "b"]))
    assert one.facts["field_of_view_mm"] == pytest.approx((15, 15, 15))
    assert two.facts["field_of_view_mm"] == pytest.approx((60, 70, 50))


def test_measured_speed_leaves_random_numbers_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    found = measure_speed("cpu", "tiny", ((2, 2, 1),) * 4, n_labels=3, seconds=0.0)
    assert torch.equal(torch.rand(3), expected)
    assert 1e2 < found.voxels_per_second < 1e9
    assert found.measured
    assert found.free_bytes is None


# The command


def deformux(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deformux.cli.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_prints_a_plan_and_writes_nothing_into_the_data(write_case, tmp_path: Path) -> None:
    for i in range(2):
        write_case(f"case{i}", seed=i)
    (tmp_path / "images" / "broken.nii.gz").write_text("no image")
    before = sorted(tmp_path.rglob("*"))
    out = tmp_path.parent / f"{tmp_path.name}-out" / "plan.json"
    options = ("--labels", "ball,box", "--frame", "ras", "--device", "cpu")
    done = preloaded.deformux("plan", tmp_path, "--json", out, *options)
    assert done.returncode == 0, done.stderr + done.stdout
    assert sorted(tmp_path.rglob("*")) == before
    text = " ".join(done.stdout.split())
    assert "3 scans" not in text
    assert "2 scans, 2 of them labelled: ball, box" in text
    assert "broken.nii.gz cannot be read" in text
    plan = Plan.from_dict(json.loads(out.read_text()))
    # Noise of 10 around 20 HU, a ball at 140, a box at -100: neither air nor whole numbers.
    assert plan.preprocessing.frame == "ras"
    assert plan.reasons["frame"] == "given"
    assert plan.preset == "tiny"
    for name in plan.reasons:
        assert name in text
    assert out.with_suffix(".scans.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("plan", "nowhere"), "there is no folder nowhere"),
        (("plan", "."), "holds no volume"),
        (("plan", ".", "--window", "3"), "HU window must be two numbers"),
        (("plan", ".", "--preset", "huge"), "preset must be one of"),
        (("plan", ".", "--device", "tpu"), "device must be"),
        (("fit", ".", "m.safetensors", "--labels", "a", "--window", "1,0"), "HU window must be"),
        (("fit", ".", "m.safetensors", "--labels", "a", "--percentiles", "a"), "percentiles must be two numbers"),
        (("fit", ".", "m.safetensors", "--labels", "a", "--frame", "x"), "frame must be one of"),
    ],
)
def test_the_command_ends_in_one_sentence(
    arguments: tuple[str, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = deformux(*arguments)
    assert done.returncode == 2
    assert words in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
