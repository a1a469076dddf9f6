"""Clicks near borders: they win, and hold along the border they were placed on, and nowhere else."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from deformux.data.preprocessing import Preprocessing
from deformux.data.transforms import inference_transforms, run_transforms
from deformux.inference.metrics import dice_per_label
from deformux.interactive.border_shift import border_evidence, reach
from deformux.interactive.editor import Editor
from deformux.interactive.open_scan import scan_from_logits
from deformux.interactive.simulated_annotator import ClickAnnotator

# Logits per voxel across a border: 3 to 7 in networks trained on the hippocampus data.
SLOPE = 5.0


def of_lead(lead: np.ndarray) -> np.ndarray:
    """Return logits of background and one label with the given lead."""
    return np.stack([np.zeros_like(lead), lead]).astype(np.float32)


def with_clicks(logits: np.ndarray, clicks: dict[int, np.ndarray]) -> np.ndarray:
    """Return the logits plus the evidence of clicks."""
    result = logits.copy()
    for label, added in border_evidence(logits, clicks).items():
        assert added.min() >= 0
        result[label] += added
    return result


def slab() -> np.ndarray:
    """Return logits of a slab of label 1, from 12 to 33 along the first axis."""
    x = np.arange(48)
    lead = SLOPE * np.clip(np.minimum(x - 11.5, 33.5 - x), -4, 4)
    return of_lead(np.broadcast_to(lead[:, None, None], (48, 40, 40)))


def test_a_click_moves_the_border_it_was_placed_on() -> None:
    logits = slab()
    before = logits.argmax(0)
    after = with_clicks(logits, {1: np.array([(11, 20, 20)])}).argmax(0)
    grown = np.argwhere((after == 1) & (before == 0))
    assert np.all(after >= before)
    # One layer changes, in a disc around the click several voxels wide, and nothing on the slab's other side.
    assert set(grown[:, 0]) == {11}
    radius = np.hypot(*(grown[:, 1:] - 20).T).max()
    assert 3 <= radius <= 10
    assert len(grown) > 0.8 * np.pi * radius**2


def test_distances_are_those_of_the_finest_voxels() -> None:
    """A stack of thick slices is every sixth slice of a finer volume, and changes as that does."""
    factor, at = 6, 20
    places = np.indices((40, 36, 41), dtype=float)
    centre = np.array([20, 18, at])[:, None, None, None]
    fine = of_lead(SLOPE * np.clip(12 - np.sqrt(((places - centre) ** 2).sum(0)), -4, 4))
    start = at % factor
    thick = np.ascontiguousarray(fine[..., start::factor])
    coarseness = (1.0, 1.0, float(factor))
    assert tuple(reach()) == (15, 15, 15)
    assert tuple(reach(coarseness)) == (15, 15, 2)
    click = np.array([(32, 18, at)])
    of_fine = border_evidence(fine, {1: click})[1][..., start::factor]
    of_thick = border_evidence(thick, {1: click // (1, 1, factor)}, coarseness=coarseness)[1]
    as_voxels = border_evidence(thick, {1: click // (1, 1, factor)})[1]
    differences = [np.abs(found - of_fine).mean() for found in (of_thick, as_voxels)]
    assert differences[0] < 0.25 * differences[1]
    # The click's own slice changes most; four slices away nothing does, of voxels as long as wide they all do.
    layers = of_thick.max((0, 1))
    own = at // factor
    assert layers.argmax() == own
    assert not layers[np.abs(np.arange(len(layers)) - own) > 2].any()
    assert of_thick[31:34, 18, own].min() > 0


@pytest.mark.parametrize("shape", [(40, 36, 30), (40, 36, 1)])
def test_every_click_wins_where_it_is_and_only_its_label_gains(shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(3)
    noise = rng.standard_normal((4, *shape))
    logits = (15 * ndimage.gaussian_filter(noise, (0, 3, 3, 3))).astype(np.float32)
    places = rng.permutation(np.argwhere(np.ones(shape, bool)))[:12]
    # Adjacent clicks with different labels.
    places[1] = places[0] + [1 if places[0][0] + 1 < shape[0] else -1, 0, 0]
    clicks = {label: places[label::3] for label in range(3)}
    after = with_clicks(logits, clicks)
    np.testing.assert_array_equal(after[3], logits[3])
    for label, voxels in clicks.items():
        for voxel in voxels:
            at = after[(slice(None), *voxel)]
            assert at[label] - np.delete(at, label).max() > 2


def test_a_click_where_its_label_leads_clearly_changes_nothing() -> None:
    logits = slab()
    clicks = {1: np.array([(23, 20, 20)]), 0: np.array([(3, 5, 5)])}
    np.testing.assert_array_equal(with_clicks(logits, clicks), logits)
    assert border_evidence(logits, {}) == {}


@pytest.fixture
def ball(write_case) -> tuple[Editor, np.ndarray]:
    """Return an editor of a ball of radius 12, whose network ignores clicks, and distances from the centre."""
    size = (44, 44, 44)
    prep = Preprocessing("ct", patch_size=(48, 48, 48))
    image = run_transforms(inference_transforms(prep), {"image": write_case("a", size=size).image})["image"]
    distance = np.sqrt(sum((axis - 21.7) ** 2 for axis in np.indices(size)))
    logits = torch.from_numpy(of_lead(SLOPE * (12 - distance)))
    padded = torch.nn.functional.pad(logits[None], (2,) * 6, mode="replicate")
    return Editor(scan_from_logits(image, logits), lambda *_: padded, prep), distance


@pytest.mark.parametrize("radius", [11, 13])
def test_five_clicks_move_the_border_of_a_ball(radius: int, ball: tuple[Editor, np.ndarray]) -> None:
    editor, distance = ball
    truth = (distance < radius).astype(np.uint8)
    begin = shown = editor.apply({})
    robot, clicks = ClickAnnotator(1), {}
    for _ in range(5):
        (click,) = robot.clicks(truth, shown)
        clicks.setdefault(click.label, []).append(click.voxel)
        shown = editor.apply(clicks)
    assert np.count_nonzero((begin != truth) & (shown == truth)) > 5 * 50
    assert np.count_nonzero((begin == truth) & (shown != truth)) < 0.03 * np.count_nonzero(begin != truth)
    assert dice_per_label(shown, truth, 1)[0] > dice_per_label(begin, truth, 1)[0] + 0.01


def test_a_click_deep_inside_moves_no_border(ball: tuple[Editor, np.ndarray]) -> None:
    editor, distance = ball
    begin, centre = editor.apply({}), np.unravel_index(distance.argmin(), distance.shape)
    changed = np.argwhere(editor.apply({0: [tuple(int(v) for v in centre)]}) != begin)
    assert len(changed) < 10
    assert np.abs(changed - centre).max() <= 1
