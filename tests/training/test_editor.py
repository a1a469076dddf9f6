"""Edits by clicks: exact as promised, in the right place on any grid, and useful on real scans."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage

from deformux.data.cases import Case, find_cases
from deformux.data.preprocessing import Preprocessing
from deformux.data.transforms import inference_transforms, run_transforms
from deformux.inference.metrics import dice_per_label
from deformux.inference.sliding_window import segment
from deformux.interactive.click_windows import Lattice, edit_window
from deformux.interactive.editor import Editor
from deformux.interactive.open_scan import OpenScan, open_scan, scan_from_logits
from deformux.interactive.simulated_annotator import ClickAnnotator
from deformux.networks.deformux_net import PUBLISHED_STRIDES, DeformUXNet, StageStrides
from deformux.networks.model_file import load_model, with_guidance
from deformux.networks.pretrained import pretrained_path

Clicks = dict[int, list[tuple[int, int, int]]]
WINDOW = 32
NATIVE = Preprocessing("ct", patch_size=(WINDOW,) * 3)
# Coarser along one axis of the scan, finer along another.
RESAMPLED = Preprocessing("ct", spacing_mm=(2.6, 1.4, 3.0), patch_size=(WINDOW,) * 3)
ACQUISITION = Preprocessing("ct", spacing_mm=(1.4, 2.6, 3.0), patch_size=(WINDOW,) * 3, frame="acquisition")


@pytest.fixture(scope="module")
def network() -> Callable[..., DeformUXNet]:
    """Build untrained networks whose guidance has random weights, so that clicks change a lot."""

    def build(n_labels: int, strides: StageStrides = PUBLISHED_STRIDES) -> DeformUXNet:
        torch.manual_seed(n_labels)
        built = DeformUXNet(1, n_labels + 1, "tiny", guidance=True, strides=strides)
        for name, weight in built.named_parameters():
            if "guidance" in name:
                torch.nn.init.normal_(weight, std=0.3)
        return built.eval()

    return build


def random_clicks(shape: Sequence[int], n_labels: int, count: int, seed: int) -> Clicks:
    """Return clicks of all labels at different voxels, some of them adjacent."""
    rng = np.random.default_rng(seed)
    clicks: Clicks = {}
    taken = set()
    while len(taken) < count:
        voxel = tuple(int(v) for v in rng.integers(0, shape))
        for at in (voxel, (voxel[0], voxel[1], min(voxel[2] + 1, shape[2] - 1))):
            if at not in taken:
                taken.add(at)
                clicks.setdefault(int(rng.integers(0, n_labels + 1)), []).append(at)
    return clicks


def joined(*parts: Clicks) -> Clicks:
    both: Clicks = {}
    for part in parts:
        for label, voxels in part.items():
            both.setdefault(label, []).extend(voxels)
    return both


GRIDS = {
    "oblique": (NATIVE, (50, 40, 34), True, 2),
    "resampled": (RESAMPLED, (50, 40, 34), True, 2),
    "acquisition": (ACQUISITION, (50, 40, 20), True, 2),
    "small": (NATIVE, (20, 24, 18), False, 2),
    "slice": (NATIVE, (44, 36, 1), False, 2),
    "many labels": (NATIVE, (40, 34, 20), False, 40),
    "largest, oblique": (dataclasses.replace(NATIVE, keep_largest=True), (50, 40, 34), True, 2),
    "largest, resampled": (dataclasses.replace(RESAMPLED, keep_largest=True), (50, 40, 34), True, 2),
    "largest, acquisition": (dataclasses.replace(ACQUISITION, keep_largest=True), (50, 40, 20), True, 2),
    "thick": (Preprocessing("ct", patch_size=(32, 32, 6)), (40, 34, 10), False, 2),
    "slice by slice": (Preprocessing("ct", patch_size=(32, 32, 1)), (40, 34, 3), False, 2),
}
# Grids of thick slices, and how often the network halves them.
THICK: dict[str, StageStrides] = {
    "thick": ((2, 2, 1), (2, 2, 1), (2, 2, 2), (2, 2, 2)),
    "slice by slice": ((2, 2, 1),) * 4,
}
SHORT_AXIS = np.diag([1.25, 1.25, 8.0, 1.0])


@pytest.mark.parametrize("grid", GRIDS)
def test_the_result_depends_on_the_set_of_clicks_alone(grid: str, network, write_case, oblique: np.ndarray) -> None:
    prep, size, is_oblique, n_labels = GRIDS[grid]
    case = write_case("a", size=size, affine=oblique if is_oblique else SHORT_AXIS if grid in THICK else None)
    net = network(n_labels, THICK.get(grid, PUBLISHED_STRIDES))
    scan = open_scan(net, case.image, prep)
    automatic, _ = segment(net, case.image, prep)
    if prep.keep_largest:
        assert not np.array_equal(scan.classes, scan.network_classes)
    few = random_clicks(size, n_labels, 4, seed=1)
    more = joined(few, {label: v for label, v in random_clicks(size, n_labels, 3, seed=2).items() if label in few})
    more = {label: list(dict.fromkeys(voxels)) for label, voxels in more.items()}

    editor = Editor(scan, net, prep)
    np.testing.assert_array_equal(editor.apply({}), automatic[0].numpy())
    assert editor.windows_computed == 0
    first = editor.apply(few)
    second = editor.apply(more)
    undone = editor.apply(few)
    assert editor.windows_computed == 0
    np.testing.assert_array_equal(undone, first)
    np.testing.assert_array_equal(editor.apply({}), automatic[0].numpy())
    backwards = {label: voxels[::-1] for label, voxels in reversed(more.items())}
    np.testing.assert_array_equal(Editor(scan, net, prep).apply(backwards), second)

    assert first.dtype == np.uint8
    for clicks, mask in ((few, first), (more, second)):
        for label, voxels in clicks.items():
            assert all(mask[voxel] == label for voxel in voxels)
        # No voxel gets a label that was not clicked.
        changed = mask != scan.labels
        assert set(np.unique(mask[changed])) <= set(clicks)


def test_changes_stay_near_their_click_and_connected_with_it(network, write_case) -> None:
    size = (110, 34, 40)
    case = write_case("a", size=size)
    net = network(2)
    scan = open_scan(net, case.image, NATIVE)
    clicks = {1: [(8, 20, 10)], 2: [(70, 9, 30), (71, 9, 30)], 0: [(100, 30, 5)]}
    mask = Editor(scan, net, NATIVE).apply(clicks)
    changed = mask != scan.labels
    assert changed.sum() > 50  # the test covers something
    distance = np.full(size, 10**6)
    for voxels in clicks.values():
        for voxel in voxels:
            away = np.abs(np.indices(size) - np.array(voxel)[:, None, None, None]).max(0)
            distance = np.minimum(distance, away)
    assert distance[changed].max() < WINDOW
    for label, voxels in clicks.items():
        # Parts stay connected across gaps of up to two voxels.
        near = ndimage.binary_dilation(changed & (mask == label), np.ones((3, 3, 3)))
        components, count = ndimage.label(near, np.ones((3, 3, 3)))
        clicked = {int(components[voxel]) for voxel in voxels} - {0}
        assert clicked == set(range(1, count + 1))


def test_an_edit_starts_from_the_mask_on_the_screen(network, write_case, oblique: np.ndarray) -> None:
    size = (50, 40, 34)
    case = write_case("a", size=size, affine=oblique)
    net = network(2)
    for prep in (NATIVE, RESAMPLED):
        scan = open_scan(net, case.image, prep)
        drawn = np.zeros(size, np.uint8)
        drawn[5:20, 5:20, 5:20] = 1
        drawn[30:33, 30, 10:30] = 2
        editor = Editor(scan, net, prep, mask=drawn)
        np.testing.assert_array_equal(editor.apply({}), drawn)
        edited = editor.apply({2: [(12, 12, 12)]})
        assert edited[12, 12, 12] == 2
        assert np.all(edited[edited != drawn] == 2)
        np.testing.assert_array_equal(editor.apply({}), drawn)
    for wrong, reason in ((drawn[1:], "voxels"), (np.full(size, 3), "values")):
        with pytest.raises(ValueError, match=reason):
            Editor(scan, net, prep, mask=wrong)


def painter(x: torch.Tensor, guidance: torch.Tensor) -> torch.Tensor:
    """Segment a ball around each click, from the clicks' maps."""
    logits = 20 * guidance[:, : (guidance.shape[1] + 1) // 2] - 10
    logits[:, 0] += 5
    return logits


@pytest.mark.parametrize("prep", [NATIVE, RESAMPLED], ids=["native", "resampled"])
@pytest.mark.parametrize("size", [(70, 45, 36), (24, 20, 12), (40, 36, 1)])
def test_a_click_lands_where_it_was_placed(prep: Preprocessing, size, write_case, oblique: np.ndarray) -> None:
    """The ball drawn for a click is centred on it, through orientation, resampling, windows and padding."""
    case = write_case("a", size=size, affine=oblique)
    image = run_transforms(inference_transforms(prep), {"image": case.image})["image"]
    background = torch.zeros(3, *image.shape[1:])
    background[0] = 5
    scan = scan_from_logits(image, background)
    assert scan.labels.shape == size
    assert not scan.labels.any()
    editor = Editor(scan, painter, prep)
    spacing = np.maximum(nib.affines.voxel_sizes(oblique), nib.affines.voxel_sizes(image.affine.numpy()))
    for corner in product(*[(0.2, 0.55, 0.9)] * 3):
        click = tuple(int(part * n) for part, n in zip(corner, size, strict=True))
        mask = editor.apply({2: [click]})
        assert set(np.unique(mask)) == {0, 2}
        # The volume's border cuts balls, and moves their centre by less than their radius.
        offset = nib.affines.apply_affine(oblique, np.argwhere(mask == 2)) - nib.affines.apply_affine(oblique, click)
        free = min(min(v, n - 1 - v) if n > 1 else 9 for v, n in zip(click, size, strict=True))
        if free >= 6:
            assert np.linalg.norm(offset.mean(0)) <= spacing.max() / 2
        assert np.abs(offset).max() <= 4 * spacing.max() * 3**0.5
        assert mask[click] == 2


def test_a_click_that_the_network_ignores_changes_little(write_case) -> None:
    case = write_case("a", size=(40, 34, 20))
    image = run_transforms(inference_transforms(NATIVE), {"image": case.image})["image"]
    logits = torch.zeros(3, *image.shape[1:])
    logits[0] = 8
    editor = Editor(
        scan_from_logits(image, logits),
        lambda x, _guidance: 8 * torch.eye(3)[0][None, :, None, None, None].expand(1, 3, *x.shape[2:]),
        NATIVE,
    )
    mask = editor.apply({1: [(20, 20, 10)]})
    assert mask[20, 20, 10] == 1
    assert np.count_nonzero(mask) == 1


def test_a_click_counts_for_its_own_region_only(write_case) -> None:
    """The boxes of two regions around corners overlap; a third region lies in the box of both and touches neither."""
    size = (40, 24, 12)
    case = write_case("a", size=size)
    image = run_transforms(inference_transforms(NATIVE), {"image": case.image})["image"]
    regions = np.zeros(size, dtype=np.uint8)
    regions[:14, :2, 4:8] = regions[:2, :14, 4:8] = 1
    regions[9:34, 10:12, 4:8] = 1
    regions[22:26, 2:4, 4:8] = 1
    clicks: Clicks = {1: [(1, 1, 5), (30, 11, 5), (23, 3, 5)]}
    background = torch.stack([torch.ones(size), torch.zeros(size)]) * 8
    prep = Preprocessing("ct", patch_size=(48, 32, 32))

    def network(x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(1, 2, *x.shape[2:])
        logits[:, 0] = 8
        before = [(full - own) // 2 for full, own in zip(x.shape[2:], size, strict=True)]
        inside = tuple(slice(start, start + own) for start, own in zip(before, size, strict=True))
        logits[(0, 1, *inside)] = 16 * torch.from_numpy(regions).float()
        return logits

    editor = Editor(scan_from_logits(image, background), network, prep)
    np.testing.assert_array_equal(editor.apply(clicks), regions)


def test_memory_stays_bounded(network, write_case) -> None:
    case = write_case("a", size=(50, 30, 30))
    net = network(2)
    scan = open_scan(net, case.image, NATIVE)
    free, tight = Editor(scan, net, NATIVE), Editor(scan, net, NATIVE, cache_bytes=10_000)
    for seed in range(2):
        clicks = random_clicks(scan.labels.shape, 2, 3, seed=seed)
        np.testing.assert_array_equal(free.apply(clicks), tight.apply(clicks))
        assert tight.nbytes <= 10_000
    assert free.nbytes > 10_000


@pytest.mark.parametrize(
    ("clicks", "reason"),
    [
        ({1: [(0, 0, 20)]}, "inside the scan"),
        ({1: [(-1, 0, 0)]}, "inside the scan"),
        ({3: [(0, 0, 0)]}, r"0 \(background\) to 2"),
        ({-1: [(0, 0, 0)]}, r"0 \(background\) to 2"),
        ({1: [(0, 0, 0)], 2: [(0, 0, 0)]}, "labels 1 and 2"),
    ],
)
def test_an_impossible_click_is_refused(clicks: Mapping, reason: str, network, write_case) -> None:
    case = write_case("a", size=(20, 20, 20))
    net = network(2)
    with pytest.raises(ValueError, match=reason):
        Editor(open_scan(net, case.image, NATIVE), net, NATIVE).apply(clicks)


@pytest.mark.parametrize("patch", [(96, 96, 96), (10, 1, 4), (2, 7, 3)])
@pytest.mark.parametrize("size", [(122, 101, 112), (512, 30, 65), (33, 32, 31), (1, 70, 200)])
def test_every_voxel_has_one_window_with_enough_around_it(
    patch: tuple[int, int, int], size: tuple[int, int, int]
) -> None:
    window = edit_window(patch)
    lattice = Lattice(size, window)
    for axis, (length, side) in enumerate(zip(size, window, strict=True)):
        seen = np.zeros(length)
        for at in range(length):
            voxel = [0, 0, 0]
            voxel[axis] = at
            cell = lattice.cell(voxel)
            (start, stop), sight = (
                tuple(zip(*box, strict=True))[axis] for box in (lattice.inside(cell), lattice.sight(cell))
            )
            assert 0 <= start <= sight[0] <= at < sight[1] <= stop <= length
            # A fifth of the window on both sides of the click, within the volume.
            assert at - start >= min(at, side // 5)
            assert stop - 1 - at >= min(length - 1 - at, side // 5)
            weights = lattice.weights(cell)[axis]
            assert len(weights) == stop - start
            assert np.all(weights[sight[0] - start : sight[1] - start] == 1)
            assert weights.min() > 0
            seen[start:stop] = 1
        assert seen.all()


def test_the_window_follows_the_patch() -> None:
    assert edit_window((96, 96, 96)) == (64, 64, 64)
    assert edit_window((48, 64, 48)) == (48, 64, 48)
    assert edit_window((160, 160, 16))[2] == 16
    assert edit_window((256, 256, 10)) == (160, 160, 10)
    assert edit_window((320, 256, 1)) == (320, 256, 1)
    assert np.prod(edit_window((512, 512, 512))) <= 64**3


def test_a_heart_of_thick_slices_is_segmented_and_corrected(network, shared_data: Path) -> None:
    """The network is untrained: this is about geometry, not about Dice."""
    folder = shared_data / "heart_mr_acdc"
    if not folder.is_dir():
        pytest.skip("there are no hearts in ../shared/data")
    case = find_cases(folder)[0]
    native = Preprocessing("mr", patch_size=(64, 64, 8))
    # The thick axis of an oblique scan lies along any of the network's.
    image = run_transforms(inference_transforms(native), {"image": case.image})["image"]
    thick = int(np.argmin(image.shape[1:]))
    slices_mm = float(nib.affines.voxel_sizes(image.affine.numpy())[thick])
    spacing = tuple(slices_mm if axis == thick else slices_mm / 3 for axis in range(3))
    strides = tuple(tuple(1 if axis == thick else 2 for axis in range(3)) for _ in range(4))
    patch = tuple(min(n, 8 if axis == thick else 64) for axis, n in enumerate(image.shape[1:]))
    prep = Preprocessing("mr", spacing_mm=spacing, patch_size=patch)
    net = network(2, strides)
    net.head.conv.conv.weight.data *= 3
    scan = open_scan(net, case.image, prep)
    assert scan.labels.shape == nib.load(case.image).shape
    assert scan.coarseness[thick] == pytest.approx(3)
    assert sorted(scan.coarseness)[:2] == [1.0, 1.0]
    editor = Editor(scan, net, prep)
    x, y, z = (n // 2 for n in scan.labels.shape)
    clicks = {1: [(x, y, z)], 2: [(x + 9, y - 4, z), (x, y + 11, z - 1)]}
    edited = editor.apply(clicks)
    assert all(edited[voxel] == label for label, voxels in clicks.items() for voxel in voxels)
    assert set(np.unique(edited[edited != scan.labels])) <= {1, 2}
    np.testing.assert_array_equal(editor.apply({}), scan.labels)
    backwards = {label: clicks[label][::-1] for label in (2, 1)}
    np.testing.assert_array_equal(Editor(scan, net, prep).apply(backwards), edited)


@pytest.fixture(scope="module")
def hippocampus(shared_data: Path) -> list[tuple[Case, np.ndarray, OpenScan]]:
    """Return a few held-out real scans, their true labels and the shipped model's segmentations."""
    net, card = load_model(pretrained_path("hippocampus"))
    cases = find_cases(shared_data / "hippocampus", subset="val")[::20]
    return [
        (
            case,
            np.asarray(nib.load(case.label).dataobj).astype(np.uint8),
            open_scan(net, case.image, card.preprocessing),
        )
        for case in cases
    ]


def test_correct_clicks_help_around_their_place(hippocampus) -> None:
    """Each click improves its label's Dice around the error it was placed in, and all together the whole."""
    net, card = load_model(pretrained_path("hippocampus"))
    net = with_guidance(net).eval()
    for _, truth, scan in hippocampus:
        editor = Editor(scan, net, card.preprocessing)
        robot = ClickAnnotator(2)
        shown, clicks = scan.labels, {}
        for _ in range(4):
            (click,) = robot.clicks(truth, shown)
            clicks.setdefault(click.label, []).append(click.voxel)
            before, shown = shown, editor.apply(clicks)
            errors, _ = ndimage.label((truth == click.label) & (before != click.label))
            component = errors == errors[click.voxel]
            right = [np.count_nonzero((mask == click.label) & component) for mask in (before, shown)]
            assert right[0] == 0
            assert right[1] > 0
            assert all(shown[voxel] == label for label, voxels in clicks.items() for voxel in voxels)
        assert dice_per_label(shown, truth, 2).mean() > dice_per_label(scan.labels, truth, 2).mean()
