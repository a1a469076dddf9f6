"""The largest connected piece of a segmentation: the same on every path, and clicks bring islands back."""

import dataclasses
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn
from typer.testing import CliRunner

from deformux.cli.main import app
from deformux.data import components
from deformux.data.cases import Case
from deformux.data.components import Components
from deformux.data.grid import ScanGrid
from deformux.data.preprocessing import Preprocessing
from deformux.data.transforms import labelled_transforms, run_transforms
from deformux.inference.evaluate import evaluate
from deformux.inference.largest_component import keep_largest_component
from deformux.inference.metrics import dice_per_label
from deformux.inference.sliding_window import segment, segment_labels
from deformux.interactive import kept_logits
from deformux.interactive.editor import Editor
from deformux.interactive.open_scan import open_scan
from deformux.networks.deformux_net import DeformUXNet
from deformux.networks.model_file import ModelCard, read_card, save_model

SIZE = (70, 48, 36)
PREPS = {
    "native": Preprocessing("ct", patch_size=(32, 32, 32)),
    "coarser": Preprocessing("ct", spacing_mm=(3.4, 4.5, 2.2), patch_size=(32, 32, 32)),
    "finer": Preprocessing("ct", spacing_mm=(1.9, 2.6, 0.8), patch_size=(32, 32, 32)),
    "acquisition": Preprocessing("ct", spacing_mm=(1.6, 2.9, 3.2), patch_size=(32, 32, 16), frame="acquisition"),
}
# An organ of two labels, an island in the organ's windows and one beyond them.
ORGAN, OTHER_HALF = (slice(8, 26), slice(8, 26), slice(6, 20)), (slice(8, 26), slice(26, 32), slice(6, 20))
NEAR, FAR = (slice(38, 45), slice(10, 17), slice(8, 15)), (slice(56, 66), slice(38, 46), slice(26, 34))


def largest_by_scipy(labels: np.ndarray) -> np.ndarray:
    numbered, _ = ndimage.label(labels > 0, np.ones((3, 3, 3)))
    return np.where(numbered == np.bincount(numbered[numbered > 0]).argmax(), labels, 0)


class ByIntensity(nn.Module):
    """Labels bright voxels 1 and the brightest 2, and ignores clicks."""

    def forward(self, x: torch.Tensor, guidance: torch.Tensor | None = None) -> torch.Tensor:
        return 20 * torch.cat([torch.zeros_like(x), x - 0.65, 2 * x - 1.52], 1)


@pytest.fixture
def organ(tmp_path: Path, oblique: np.ndarray) -> Case:
    """Write a scan of an organ and islands that look like it, and the organ's label."""
    hu, label = np.full(SIZE, 20, np.float32), np.zeros(SIZE, np.uint8)
    hu += np.random.default_rng(0).normal(0, 5, SIZE).astype(np.float32)
    for part in (ORGAN, NEAR, FAR):
        hu[part] = 150
    hu[OTHER_HALF] = 240
    label[ORGAN], label[OTHER_HALF] = 1, 2
    paths = [tmp_path / "scan.nii.gz", tmp_path / "label.nii.gz"]
    for path, values in zip(paths, (hu, label), strict=True):
        nib.save(nib.Nifti1Image(values, oblique), path)
    return Case("organ", *paths)


@pytest.mark.parametrize("slab", [1, 700, 10**7])
@pytest.mark.parametrize(
    ("shape", "density"), [((20, 30, 25), 0.09), ((1, 30, 40), 0.3), ((9, 8, 7), 0), ((9, 8, 7), 1)]
)
def test_components_are_those_of_scipy(
    shape: tuple[int, int, int], density: float, slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(components, "_SLAB_VOXELS", slab)
    rng = np.random.default_rng(1)
    mask = np.where(rng.random(shape) < density, rng.integers(1, 4, shape), 0).astype(np.uint8)
    expected, count = ndimage.label(mask > 0, np.ones((3, 3, 3)))
    sizes = np.bincount(expected.ravel(), minlength=1)[1:]
    found = Components(mask)
    numbers = np.zeros(shape, int)
    for part, values in found.numbered():
        numbers[part] = values
    np.testing.assert_array_equal(numbers > 0, mask > 0)
    assert len(np.unique(numbers * (count + 1) + expected)) == len(np.unique(expected))
    np.testing.assert_array_equal(found.sizes, np.bincount(numbers[numbers > 0], minlength=1))
    assert found.largest_share == (sizes.max() / sizes.sum() if count else 1)
    kept = mask.copy()
    assert keep_largest_component(kept) == (count > 1)
    assert np.count_nonzero(kept) == sizes.max(initial=0)
    assert len(np.unique(numbers[kept > 0])) <= 1
    np.testing.assert_array_equal(kept[kept > 0], mask[kept > 0])


@pytest.mark.parametrize("name", PREPS)
def test_every_path_gives_the_same_mask(name: str, organ: Case) -> None:
    plain, network = PREPS[name], ByIntensity().eval()
    prep = dataclasses.replace(plain, keep_largest=True)
    everything = segment_labels(network, organ.image, plain)[0].numpy()
    expected = largest_by_scipy(everything)
    assert everything[NEAR].any()
    assert everything[FAR].any()
    assert set(np.unique(expected)) == {0, 1, 2}
    assert not expected[NEAR].any()
    assert not expected[FAR].any()
    np.testing.assert_array_equal(segment_labels(network, organ.image, prep)[0].numpy(), expected)
    labels, probabilities = segment(network, organ.image, prep)
    np.testing.assert_array_equal(labels[0].numpy(), expected)
    assert torch.equal(probabilities, segment(network, organ.image, plain)[1])
    scan = open_scan(network, organ.image, prep)
    np.testing.assert_array_equal(scan.labels, expected)
    np.testing.assert_array_equal(Editor(scan, network, prep).apply({}), expected)
    dice = evaluate(network, [organ], prep, n_labels=2)["organ"]
    truth = np.asarray(nib.load(organ.label).dataobj)
    assert dice == pytest.approx(dice_per_label(expected, truth, 2))
    assert dice[0] > evaluate(network, [organ], plain, n_labels=2)["organ"][0]


@pytest.mark.parametrize("name", PREPS)
def test_labels_at_the_networks_voxels_are_those_of_training(name: str, organ: Case) -> None:
    prep = PREPS[name]
    made = run_transforms(labelled_transforms(prep, n_labels=2), {"image": organ.image, "label": organ.label})
    grid = ScanGrid.of(made["image"])
    truth = np.asarray(nib.load(organ.label).dataobj)
    found = grid.at_network(truth, tuple(slice(0, n) for n in grid.network_size))
    # Voxels half way between two may go to either.
    assert (found != made["label"][0].numpy()).sum() <= 0.01 * np.count_nonzero(found)


def middle(part: tuple[slice, slice, slice]) -> tuple[int, int, int]:
    x, y, z = ((axis.start + axis.stop) // 2 for axis in part)
    return x, y, z


@pytest.mark.parametrize("bounded", [False, True], ids=["all logits", "highest logits"])
@pytest.mark.parametrize("name", PREPS)
def test_only_a_click_on_an_island_brings_it_back(
    name: str, bounded: bool, organ: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FiveClasses(ByIntensity):
        def forward(self, x: torch.Tensor, guidance: torch.Tensor | None = None) -> torch.Tensor:
            logits = super().forward(x, guidance)
            return torch.cat([logits, torch.full_like(logits[:, :2], -9)], 1)

    if bounded:
        monkeypatch.setattr(kept_logits, "_ALL_BYTES", 0)
    network, prep = FiveClasses().eval(), dataclasses.replace(PREPS[name], keep_largest=True)
    everything = segment_labels(network, organ.image, PREPS[name])[0].numpy()
    scan = open_scan(network, organ.image, prep)
    removed = scan.classes != scan.network_classes
    assert removed.any()
    assert not scan.classes[removed].any()
    editor = Editor(scan, network, prep)
    # Beside the near island, in the organ and on its surface, with the organ's labels and others.
    elsewhere = {1: [(27, 14, 11), (20, 33, 12)], 2: [(24, 20, 12)], 0: [(12, 12, 10)], 3: [(28, 20, 12)]}
    edited = editor.apply(elsewhere)
    assert (edited != scan.labels).any()
    for part in (NEAR, FAR):
        assert not edited[part].any()
    for part in (NEAR, FAR):
        back = editor.apply({1: [middle(part)]})
        # Away from the click the mask to start from counts too.
        assert (back[part] != everything[part]).mean() < 0.02
        assert back[middle(part)] == 1
        other = FAR if part is NEAR else NEAR
        assert not back[other].any()
        outside = np.ones(SIZE, dtype=bool)
        outside[tuple(slice(axis.start - 3, axis.stop + 3) for axis in part)] = False
        np.testing.assert_array_equal(back[outside], scan.labels[outside])
    both = editor.apply({**elsewhere, 1: [*elsewhere[1], middle(FAR)]})
    assert (both[FAR] != everything[FAR]).mean() < 0.02
    np.testing.assert_array_equal(editor.apply(elsewhere), edited)
    np.testing.assert_array_equal(editor.apply({}), scan.labels)


def test_a_mask_to_start_from_is_never_filtered(organ: Case) -> None:
    network, prep = ByIntensity().eval(), dataclasses.replace(PREPS["coarser"], keep_largest=True)
    drawn = np.zeros(SIZE, np.uint8)
    for part in (NEAR, FAR, ORGAN):
        drawn[part] = 1
    editor = Editor(open_scan(network, organ.image, prep), network, prep, mask=drawn)
    np.testing.assert_array_equal(editor.apply({}), drawn)
    edited = editor.apply({2: [middle(OTHER_HALF)]})
    np.testing.assert_array_equal(edited[FAR], drawn[FAR])
    assert edited[NEAR].all()


def test_predict_keeps_the_largest_if_the_card_says_so(organ: Case, tmp_path: Path) -> None:
    torch.manual_seed(3)
    network = DeformUXNet(1, 3, "tiny")
    network.head.conv.conv.bias.data[0] += 0.3
    found = {}
    for keep in (False, True):
        prep = dataclasses.replace(PREPS["coarser"], keep_largest=keep)
        model = tmp_path / f"{keep}.safetensors"
        save_model(model, network, ModelCard(labels=("a", "b"), preprocessing=prep, preset="tiny"))
        assert read_card(model).preprocessing == prep
        assert ("keep_largest" in model.with_suffix(".json").read_text()) == keep
        arguments = ["predict", model, organ.image, tmp_path / str(keep)]
        done = CliRunner().invoke(app, list(map(str, arguments)))
        assert done.exit_code == 0, done.output
        found[keep] = np.asarray(nib.load(tmp_path / str(keep) / "scan.nii.gz").dataobj)
    assert (found[True] != found[False]).any()
    np.testing.assert_array_equal(found[True], largest_by_scipy(found[False]))


def place_in(part: tuple[slice, ...], prep: Preprocessing, organ: Case, folder: Path) -> tuple[float, ...]:
    """Where a part of the scan lies on the network's grid, as shares of its sides, by resampling a mask of it."""
    mask = np.zeros(SIZE, np.uint8)
    mask[part] = 1
    nib.save(nib.Nifti1Image(mask, nib.load(organ.image).affine), folder / "place.nii.gz")
    given = {"image": organ.images, "label": folder / "place.nii.gz"}
    label = run_transforms(labelled_transforms(prep, n_labels=1), given)["label"][0].numpy()
    return tuple(((np.argwhere(label) + 0.5).mean(0) / label.shape).tolist())


@pytest.mark.parametrize("name", PREPS)
def test_a_component_where_labels_usually_lie_counts_for_more(name: str, organ: Case, tmp_path: Path) -> None:
    """The organ is ten times as large as the island that is kept; a small island is never kept."""
    plain, network = PREPS[name], ByIntensity().eval()
    everything = segment_labels(network, organ.image, plain)[0].numpy()
    for part, kept in ((FAR, FAR), (ORGAN, None), (NEAR, None)):
        prep = dataclasses.replace(plain, keep_largest=True, labels_center=place_in(part, plain, organ, tmp_path))
        expected = largest_by_scipy(everything)
        if kept is not None:
            numbered, _ = ndimage.label(everything > 0, np.ones((3, 3, 3)))
            expected = np.where(numbered == numbered[61, 42, 30], everything, 0)
            assert expected[FAR].any()
            assert not expected[ORGAN].any()
        np.testing.assert_array_equal(segment_labels(network, organ.image, prep)[0].numpy(), expected)
        np.testing.assert_array_equal(segment(network, organ.image, prep)[0][0].numpy(), expected)
        np.testing.assert_array_equal(open_scan(network, organ.image, prep).labels, expected)


def test_older_settings_stay_as_they_are() -> None:
    assert not {"keep_largest", "labels_center"} & Preprocessing().to_dict().keys()
    assert Preprocessing.from_dict(Preprocessing().to_dict()) == Preprocessing()
    keeping = Preprocessing(keep_largest=True)
    assert Preprocessing.from_dict(keeping.to_dict()) == keeping
    near = Preprocessing(keep_largest=True, labels_center=(0.5, 0.25, 0.75))
    assert Preprocessing.from_dict(json.loads(json.dumps(near.to_dict()))) == near
    assert near.without_output() == Preprocessing()
    with pytest.raises(ValueError, match="labels_center must be three shares from 0 to 1"):
        Preprocessing(labels_center=(0.5, 0.5, 1.5))
