"""Cases of several sequences: which files belong together, one grid, one way of normalising each, missing ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch

import preloaded
from deformux.data.cases import Case, InvalidFolder, find_cases, folder_naming, sequence_naming
from deformux.data.loading import LoadVolumed, MissingSequence, missing_sequences
from deformux.data.preprocessing import Preprocessing
from deformux.data.sequences import SequenceNaming
from deformux.data.transforms import inference_transforms, labelled_transforms, run_transforms
from deformux.fitting.augmentation import training_augmentation
from deformux.fitting.fit import TrainingError, fit
from deformux.fitting.rank_task import RankTask
from deformux.fitting.recipe import RECIPES, Recipe
from deformux.fitting.sequence_augmentation import EachSequenced, RandDropSequencesd
from deformux.interactive.editor import Editor
from deformux.interactive.open_scan import open_scan
from deformux.networks.deformux_net import DeformUXNet
from deformux.networks.model_file import ModelCard, load_model, read_card, save_model

TUMOURS = Path(__file__).resolve().parents[3] / "shared/data/brain_tumour_mr"
NAMES = ("flair", "t1c")

needs_tumours = pytest.mark.skipif(not TUMOURS.is_dir(), reason=f"{TUMOURS} is absent")


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / f"{name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def write(path: Path, values: np.ndarray, affine: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, affine), path)
    return path


def smooth(shape: tuple[int, ...], seed: int) -> np.ndarray:
    x, y, z = np.meshgrid(*[np.linspace(0, 3, n) for n in shape], indexing="ij")
    return (100 * np.sin(x + seed) * np.cos(2 * y) + 30 * z + 10 * seed).astype(np.float32)


@pytest.fixture
def pair(tmp_path: Path) -> Case:
    """Return a case of two sequences; the second is shifted, rotated, coarser, and smaller than the first."""
    first = np.diag([1.0, 1.2, 2.0, 1.0])
    first[:3, 3] = [-10, 5, 30]
    angle = np.deg2rad(12)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    second = np.eye(4)
    second[:3, :3] = turn @ np.diag([-1.5, 1.5, 3.0])
    second[:3, 3] = [18, 4, 33]
    images = tmp_path / "data" / "images"
    files = (
        write(images / "a_0000.nii.gz", smooth((30, 28, 16), 1), first),
        write(images / "a_0001.nii.gz", smooth((22, 20, 9), 2), second),
    )
    label = np.zeros((30, 28, 16), dtype=np.uint8)
    label[8:20, 8:20, 4:12] = 1
    write(tmp_path / "data" / "labels" / "a.nii.gz", label, first)
    return Case("a", files[0], tmp_path / "data" / "labels" / "a.nii.gz", images=files)


@pytest.mark.parametrize(
    ("images", "labels", "found"),
    [
        # As before there were sequences: an image and a label of the same name.
        (["a", "b"], ["a", "b"], {"a": 1, "b": 1}),
        (["a_0000", "b_0000"], ["a_0000", "b_0000"], {"a_0000": 1, "b_0000": 1}),
        (["a_0000", "a_0001"], ["a_0000", "a_0001"], {"a_0000": 1, "a_0001": 1}),
        # nnU-Net's convention, shown by the labels.
        (["a_0000", "a_0001", "b_0000", "b_0001"], ["a", "b"], {"a": 2, "b": 2}),
        (["a_0000", "b_0000"], ["a", "b"], {"a": 1, "b": 1}),
        (["a_0000", "a_0001", "b_0001"], ["a", "b"], {"a": 2, "b": 2}),
        (["a_0001"], ["a"], {"a": 2}),
        (["a_0000", "a_0001", "b"], ["a", "b"], {"a": 2, "b": 1}),
    ],
)
def test_the_labels_say_which_files_belong_together(
    tmp_path: Path, images: list[str], labels: list[str], found: dict[str, int]
) -> None:
    touch(tmp_path / "images", *images)
    touch(tmp_path / "labels", *labels)
    cases = find_cases(tmp_path)
    assert {case.id: len(case.images) for case in cases} == found
    for case in cases:
        present = [path for path in case.images if path.exists()]
        assert case.image == present[0]
        assert case.label == tmp_path / "labels" / f"{case.id}.nii.gz"
        assert {path.name.split(".")[0] for path in present} == {n for n in images if n.startswith(case.id)}


def test_dataset_json_names_the_sequences(tmp_path: Path) -> None:
    touch(tmp_path / "images", "a_0000", "a_0001")
    touch(tmp_path / "labels", "a")
    settings = tmp_path / "dataset.json"
    assert sequence_naming(tmp_path).channels == ("0000", "0001")
    settings.write_text(json.dumps({"channel_names": {"0": "FLAIR", "1": "T1 Gd", "2": "T2"}}))
    assert sequence_naming(tmp_path) == SequenceNaming(("_0000", "_0001", "_0002"), ("flair", "t1_gd", "t2"))
    assert len(find_cases(tmp_path)[0].images) == 3
    settings.write_text(json.dumps({"modality": {"0": "CT", "1": "PET"}}))
    assert Preprocessing("mr", sequences=sequence_naming(tmp_path).channels).modalities == ("ct", "mr")
    # The decathlon's files of one sequence.
    settings.write_text(json.dumps({"modality": {"0": "MRI"}}))
    assert sequence_naming(tmp_path).channels == ("0000", "0001")
    touch(tmp_path / "images", "b_flair", "b_t1")
    touch(tmp_path / "labels", "b")
    settings.write_text(json.dumps({"image_channels": ["_t1=t1c", "_flair"]}))
    (case,) = find_cases(tmp_path)
    assert (case.id, [path.name for path in case.images]) == ("b", ["b_t1.nii.gz", "b_flair.nii.gz"])
    assert sequence_naming(tmp_path).channels == ("t1c", "flair")
    settings.write_text(json.dumps({"image_channels": ["_1", "_t1_1"]}))
    with pytest.raises(InvalidFolder, match=r"dataset.json: image channels must not end in each other"):
        find_cases(tmp_path)


def test_a_sequence_in_two_formats_is_ambiguous(tmp_path: Path) -> None:
    touch(tmp_path / "images", "a_0000", "a_0001")
    touch(tmp_path / "labels", "a")
    (tmp_path / "images" / "a_0001.nrrd").touch()
    with pytest.raises(InvalidFolder, match="differ only in their suffix"):
        find_cases(tmp_path)


def test_files_of_a_case_and_unlabelled_folders(tmp_path: Path) -> None:
    naming = SequenceNaming.parse(" _0000 = flair , _0001=t1c ")
    assert naming == SequenceNaming(("_0000", "_0001"), NAMES)
    assert SequenceNaming.parse(naming.text) == naming
    assert SequenceNaming.parse("") == SequenceNaming()
    names = ["x_0000.nii.gz", "x_0001.nrrd", "y_0001.nii", "z.nii.gz"]
    for name in names:
        (tmp_path / name).touch()
    paths = [tmp_path / name for name in names]
    assert naming.files_of(paths[0]) == naming.files_of(paths[1]) == (paths[0], paths[1])
    assert naming.files_of(paths[2]) == (tmp_path / "y_0000.nii", paths[2])
    assert naming.files_of(paths[3]) == (paths[3],)
    assert naming.group(paths) == [(paths[0], paths[1]), (tmp_path / "y_0000.nii", paths[2]), (paths[3],)]
    assert folder_naming(paths, NAMES).suffixes == ("_0000", "_0001")
    assert folder_naming([tmp_path / "x_flair.nii", tmp_path / "x_t1c.nii"], NAMES).suffixes == ("_flair", "_t1c")
    (tmp_path / "dataset.json").write_text(json.dumps({"image_channels": "_a,_b"}))
    assert folder_naming(paths, NAMES).suffixes == ("_a", "_b")
    for text in ("_0000,", "_0000,_0000=b", "a/b", "_0=x,_1=x"):
        with pytest.raises(ValueError, match=r"sequence|image channels"):
            SequenceNaming.parse(text)


def test_the_second_sequence_is_resampled_to_the_firsts_grid_as_by_simpleitk(pair: Case) -> None:
    read = LoadVolumed("image", sequences=NAMES)({"image": pair.images})["image"]
    assert read.shape == (2, 30, 28, 16)
    first, second = (nib.load(path) for path in pair.images)
    np.testing.assert_array_equal(read[0].numpy(), first.get_fdata(dtype=np.float32))
    np.testing.assert_allclose(read.affine.numpy(), first.affine)
    own = second.get_fdata(dtype=np.float32)
    expected = sitk.Resample(
        sitk.ReadImage(str(pair.images[1])), sitk.ReadImage(str(pair.image)), sitk.Transform(), sitk.sitkLinear,
        float(own.min()), sitk.sitkFloat32,
    )  # fmt: skip
    expected = sitk.GetArrayFromImage(expected).T
    outside = expected == own.min()
    assert 0.1 < outside.mean() < 0.9
    # A few voxels lie at the very edge of the field of view, on one side or the other by rounding.
    assert (outside != (read[1].numpy() == own.min())).mean() < 0.002
    same = outside == (read[1].numpy() == own.min())
    np.testing.assert_allclose(read[1].numpy()[same], expected[same], atol=2e-3)


def test_each_sequence_is_normalised_in_its_way(pair: Case) -> None:
    prep = Preprocessing("mr", spacing_mm=(2.0, 2.0, 2.0), sequences=("ct:native", "t1c"), window_hu=(-50.0, 100.0))
    image = run_transforms(inference_transforms(prep), {"image": pair.images})["image"]
    raw = LoadVolumed("image", sequences=NAMES)({"image": pair.images})["image"]
    for number, modality in enumerate(("ct", "mr")):
        alone = Preprocessing(modality, spacing_mm=(2.0, 2.0, 2.0), window_hu=(-50.0, 100.0))
        data = {"image": raw[number : number + 1].clone()}
        expected = run_transforms(inference_transforms(alone)[1:], data)["image"]
        torch.testing.assert_close(image[number].as_tensor(), expected[0].as_tensor())
    assert 0 <= image[0].min() < image[0].max() <= 1
    assert abs(float(image[1].mean())) < 1e-3
    assert float(image[1].std()) == pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize("gone", [0, 1])
def test_a_missing_sequence_is_empty_or_refused(pair: Case, gone: int) -> None:
    grid = nib.load(pair.images[1 - gone]).shape
    pair.images[gone].unlink()
    prep = Preprocessing("mr", sequences=NAMES)
    with pytest.raises(MissingSequence, match=f"without its sequence {NAMES[gone]} .a_000{gone}.nii.gz.*all of flair"):
        run_transforms(inference_transforms(prep), {"image": pair.images})
    image = run_transforms(inference_transforms(prep.with_dropout(0.1)), {"image": pair.images})["image"]
    assert image.shape == (2, *grid)
    assert not image[gone].any()
    assert float(image[1 - gone].std()) == pytest.approx(1, abs=1e-3)
    assert missing_sequences(image) == f"{NAMES[gone]} is missing among the sequences of this scan"
    pair.images[1 - gone].unlink()
    with pytest.raises(MissingSequence):
        run_transforms(inference_transforms(prep.with_dropout(0.1)), {"image": pair.images})


def test_one_file_for_a_model_of_several_sequences_is_its_first(pair: Case) -> None:
    prep = Preprocessing("mr", sequences=NAMES)
    with pytest.raises(MissingSequence, match=r"a_0000.nii.gz comes without its sequence t1c; the model needs"):
        run_transforms(inference_transforms(prep), {"image": pair.image})
    image = run_transforms(inference_transforms(prep.with_dropout(0.5)), {"image": pair.image})["image"]
    assert image[0].any()
    assert not image[1].any()
    # And a model of one takes the first of several.
    one = run_transforms(inference_transforms(Preprocessing("mr")), {"image": pair.images})["image"]
    assert torch.equal(one, run_transforms(inference_transforms(Preprocessing("mr")), {"image": pair.image})["image"])


def test_one_sequence_keeps_its_card_and_its_identity() -> None:
    prep, recipe = Preprocessing("mr"), RECIPES["finetune"]
    assert list(prep.to_dict()) == ["modality", "spacing_mm", "patch_size", "window_hu", "percentiles"]
    assert "sequence_dropout" not in recipe.to_dict()
    assert prep.with_dropout(0.5) == prep
    several = Preprocessing("mr", sequences=NAMES, missing_sequences=True)
    assert Preprocessing.from_dict(json.loads(json.dumps(several.to_dict()))) == several
    changed = recipe.replace(sequence_dropout=0.2)
    assert Recipe.from_dict(json.loads(json.dumps(changed.to_dict()))) == changed
    with pytest.raises(ValueError, match="sequence_dropout must be between 0 and 1"):
        recipe.replace(sequence_dropout=1.5)
    with pytest.raises(ValueError, match="at least two"):
        Preprocessing("mr", sequences=("flair",))


def test_todays_cards_load_and_are_written_the_same() -> None:
    for path in (Path(__file__).resolve().parents[2] / "training/deformux/pretrained").glob("*.json"):
        before = path.read_text()
        # It is older than the checksum, the last field.
        assert ModelCard.from_json(before).to_json().replace(',\n  "weights_sha256": ""', "") == before


def test_intensity_changes_of_sequences_are_independent(pair: Case) -> None:
    prep = Preprocessing("mr", sequences=("a", "b"), patch_size=(16, 16, 16))
    recipe = RECIPES["finetune"].replace(
        rotation_degrees=0.0, scaling=0.0, elastic_probability=0.0, intensity_probability=1.0, noise_std=0.0,
        gamma=(1.0, 1.0), low_resolution=1.0, intensity_scale=0.0, intensity_shift=0.5,
    )  # fmt: skip
    same = (pair.images[0], pair.images[0])
    data = run_transforms(labelled_transforms(prep, n_labels=1), {"image": same, "label": pair.label})
    data["annotated"] = np.ones(2, dtype=bool)
    patches = data
    for transform in training_augmentation(prep, recipe):
        if hasattr(transform, "set_random_state"):
            transform.set_random_state(seed=3)
        patches = [transform(one) for one in patches] if isinstance(patches, list) else transform(patches)
    image = patches[0]["image"]
    difference = image[0] - image[1]
    assert image.shape == (2, 16, 16, 16)
    assert float(difference.std()) < 1e-5 < abs(float(difference.mean()))
    several = EachSequenced([[], []])
    assert torch.equal(several({"image": image})["image"], image)


def test_dropout_keeps_at_least_one_sequence() -> None:
    drop = RandDropSequencesd(0.5)
    drop.set_random_state(seed=0)
    image = torch.ones(3, 2, 2, 2)
    image[1] = 0  # missing already
    kept = torch.stack([drop({"image": image})["image"][:, 0, 0, 0] for _ in range(400)])
    assert kept.sum(1).min() == 1
    assert not kept[:, 1].any()
    # Without the rule each of the two would stay in half of the draws, and both be gone in a quarter.
    assert kept[:, [0, 2]].mean(0).tolist() == pytest.approx([0.625, 0.625], abs=0.08)


def test_training_clicks_and_tasks_take_all_sequences(pair: Case, tmp_path: Path) -> None:
    prep = Preprocessing("mr", sequences=NAMES, patch_size=(16, 16, 16))
    recipe = RECIPES["finetune"].replace(steps=2, epochs=1, sequence_dropout=0.5)
    torch.manual_seed(0)
    network = DeformUXNet(prep.channels, 2, "tiny", guidance=True)
    with pytest.raises(TrainingError, match="the network takes 2 sequences, the preprocessing gives 1"):
        fit(network, [pair], recipe=recipe, prep=Preprocessing("mr"), labels=("x",))
    fit(network, [pair], recipe=recipe, prep=prep, labels=("x",))
    scan = open_scan(network, pair.images, prep)
    assert scan.image.shape[0] == 2
    changed = Editor(scan, network, prep).apply({1: [(3, 4, 5)]})
    assert changed[3, 4, 5] == 1
    task = RankTask(RankTask.describe(network), [pair], recipe, prep, ("x",))
    assert RankTask.from_json(task.to_json()).cases == [pair]
    card = ModelCard(("x",), prep.with_dropout(recipe.sequence_dropout), "tiny", 2, network_options={"guidance": True})
    save_model(tmp_path / "m.safetensors", network, card)
    loaded, read = load_model(tmp_path / "m.safetensors")
    assert (loaded.in_channels, read.preprocessing) == (2, card.preprocessing)


def deformux(*arguments: object) -> str:
    done = preloaded.deformux(*arguments, "--device", "cpu")
    return done.stdout + done.stderr + f"\nexit {done.returncode}"


@needs_tumours
def test_real_cases_of_two_sequences_through_the_commands(tmp_path: Path) -> None:
    for file in sorted(TUMOURS.glob("*/*_pat000[12]_*.nii.gz")):
        scan = nib.load(file)
        affine = scan.affine @ np.diag([5, 5, 5, 1])
        write(tmp_path / "data" / file.parent.name / file.name, np.asarray(scan.dataobj)[::5, ::5, ::5], affine)
    assert [len(case.images) for case in find_cases(TUMOURS)] == [2] * 4
    data, strict, tolerant = tmp_path / "data", tmp_path / "strict.safetensors", tmp_path / "tolerant.safetensors"
    training = ("--labels", "a,b,c,d", "--modality", "mr", "--patch-size", "16,16,16", "--set", "steps=2")
    for model, more in ((strict, ("--set", "sequence_dropout=0")), (tolerant, ("--set", "sequence_dropout=0.3"))):
        said = deformux("fit", data, model, *training, "--set", "epochs=1", *more)
        assert said.endswith("exit 0"), said
    cards = [read_card(model) for model in (strict, tolerant)]
    assert [card.in_channels for card in cards] == [2, 2]
    assert [card.preprocessing.missing_sequences for card in cards] == [False, True]
    assert cards[1].recipe["sequence_dropout"] == 0.3
    said = deformux("predict", strict, data / "images", tmp_path / "out")
    assert said.endswith("exit 0"), said
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {f"brats_2013_pat000{number}_1.nii.gz" for number in (1, 2)}
    for path in (tmp_path / "out").iterdir():
        scan = nib.load(data / "images" / path.name.replace(".nii", "_0000.nii"))
        np.testing.assert_allclose(nib.load(path).affine, scan.affine)
    assert "on 2 volumes" in deformux("evaluate", strict, data)
    shutil.move(data / "images" / "brats_2013_pat0001_1_0000.nii.gz", tmp_path)
    said = deformux("predict", strict, data / "images", tmp_path / "few")
    assert "comes without its sequence 0000" in said.replace("\n", " ")
    assert said.endswith("exit 1")
    said = deformux("predict", tolerant, data / "images", tmp_path / "all")
    assert "0000 is missing among the sequences of this scan" in said.replace("\n", " ")
    assert {path.name for path in (tmp_path / "all").iterdir()} == written
