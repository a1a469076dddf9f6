"""Training with a simulated annotator: where it clicks, and what a network learns from it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch

from deformux.data.cases import Case
from deformux.data.preprocessing import Preprocessing
from deformux.fitting.click_steps import ClickTraining
from deformux.fitting.fit import fit
from deformux.fitting.recipe import RECIPES, Recipe
from deformux.networks.deformux_net import DeformUXNet
from deformux.networks.guidance import encode_guidance
from deformux.networks.presets import PRESETS, Preset

PREP = Preprocessing("ct", patch_size=(16, 16, 16))
LABELS = ("ball", "box")
EVERY_STEP = RECIPES["finetune"].replace(click_probability=1.0, click_start=0.0, mixed_precision=False)
QUICK = EVERY_STEP.replace(steps=3, epochs=1, elastic_probability=0.0)


@pytest.fixture(autouse=True)
def small_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "deformux.networks.deformux_net.PRESETS", {**PRESETS, "small-test": Preset((8, 8, 16, 16), 16, (1, 1, 1, 1))}
    )


def network(*, guidance: bool = True, out_channels: int = 3) -> DeformUXNet:
    torch.manual_seed(0)
    return DeformUXNet(1, out_channels, "small-test", guidance=guidance)


def peaks(guidance: torch.Tensor, value: int) -> list[tuple[int, ...]]:
    """Return the clicks of a class: where its map is 1."""
    return [tuple(voxel) for voxel in (guidance[value] == 1).nonzero().tolist()]


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two noisy images, and labels 1 and 2 with an unlabelled part."""
    torch.manual_seed(seed)
    label = torch.zeros(2, 1, 16, 16, 16, dtype=torch.uint8)
    label[:, :, 2:9, 2:9, 2:9] = 1
    label[:, :, 9:13, 4:12, 4:12] = 2
    label[:, :, 14:] = 255
    return torch.randn(2, 1, 16, 16, 16), label


def test_clicks_give_the_true_label_and_start_from_the_prediction() -> None:
    net = network()
    image, label = batch()
    everything = torch.ones(2, 3, dtype=torch.bool)
    with torch.no_grad():
        logits = net(image)
    automatic = logits.argmax(1)
    training = ClickTraining(net, EVERY_STEP, seed=0)
    counts, automatic_masks, seen = [], 0, set()
    for step in range(1, 41):
        guidance = training.guidance(step, image, logits, label, everything)
        assert guidance is not None
        assert guidance.shape == (2, 5, 16, 16, 16)
        for given, truth, mask in zip(guidance, label[:, 0], automatic, strict=True):
            clicks = {value: peaks(given, value) for value in range(3)}
            assert all(truth[voxel] == value for value, voxels in clicks.items() for voxel in voxels)
            counts.append(sum(map(len, clicks.values())))
            seen |= {value for value, voxels in clicks.items() if voxels}
            automatic_masks += bool((given[3:] == torch.stack([mask == 1, mask == 2])).all())
            again = encode_guidance({v: np.array(c) for v, c in clicks.items()}, None, n_labels=2, size=(16, 16, 16))
            assert torch.equal(given[:3], again[:3])
    assert seen == {0, 1, 2}
    # Up to ten and a needless one each; few more often than many.
    assert 1 <= min(counts) < max(counts) <= 12
    assert np.median(counts) <= 3
    assert 40 < automatic_masks < 80, "mostly the network's own mask, but not only"


def test_clicks_follow_from_seed_and_step() -> None:
    net = network()
    image, label = batch()
    with torch.no_grad():
        logits = net(image)
    everything = torch.ones(2, 3, dtype=torch.bool)

    def draw(seed: int, step: int) -> torch.Tensor | None:
        # Other draws from the global generator do not matter.
        torch.rand(3)
        return ClickTraining(net, EVERY_STEP, seed=seed).guidance(step, image, logits, label, everything)

    for step in range(1, 6):
        torch.testing.assert_close(draw(0, step), draw(0, step), rtol=0, atol=0)
    assert not torch.equal(draw(0, 1), draw(0, 2))
    assert not torch.equal(draw(0, 1), draw(1, 1))
    rare = ClickTraining(net, EVERY_STEP.replace(click_probability=0.25), seed=0)
    share = np.mean([rare.takes_part(step) for step in range(200)])
    assert 0.15 < share < 0.35
    late = ClickTraining(net, EVERY_STEP.replace(steps=8, click_start=0.25), seed=0)
    assert [late.takes_part(step) for step in range(1, 5)] == [False] * 2 + [True] * 2
    with pytest.raises(ValueError, match="step 2 has no clicks"):
        late.guidance(2, image, logits, label, everything)


def test_a_label_that_was_not_annotated_is_never_corrected() -> None:
    net = network()
    with torch.no_grad():
        # It sees label 2 everywhere.
        net.head.conv.conv.bias.copy_(torch.tensor([0.0, 0.0, 1e4]))
    image, label = batch()
    label[label == 2] = 0
    looked_for = torch.tensor([[True, True, False], [True, True, True]])
    training = ClickTraining(net, EVERY_STEP, seed=0)
    with torch.no_grad():
        logits = net(image)
    background = [0, 0]
    for step in range(1, 31):
        guidance = training.guidance(step, image, logits, label, looked_for)
        assert guidance is not None
        if bool((guidance[:, 4] == 1).all()):
            for index in range(2):
                assert not peaks(guidance[index], 2)
                background[index] += len(peaks(guidance[index], 0))
    assert background[0] == 0
    assert background[1] > 0


def weights(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in net.state_dict().items() if not name.endswith(".guidance")}


def test_a_network_without_guidance_trains_as_without_clicks(write_case) -> None:
    cases = [write_case(f"c{seed}", seed=seed, size=(18, 16, 16)) for seed in range(2)]
    trained = []
    # An automatic network, with and without clicks in the recipe; and one with guidance, in steps without clicks.
    for guidance, change in (
        (False, {"clicks": 0}),
        (False, {}),
        (True, {"clicks": 0}),
        (True, {"click_probability": 0.0}),
    ):
        net = network(guidance=guidance)
        fit(net, cases, recipe=QUICK.replace(**change), prep=PREP, labels=LABELS)
        trained.append(weights(net))
        assert not any(value.any() for name, value in net.named_parameters() if name.endswith(".guidance"))
    for other in trained[1:]:
        torch.testing.assert_close(other, trained[0], rtol=0, atol=0)


def test_a_step_with_clicks_contains_an_ordinary_step(write_case) -> None:
    cases = [write_case("c0", size=(18, 16, 16))]
    without, with_clicks = network(), network()
    first = QUICK.replace(steps=1)
    told = fit(without, cases, recipe=first.replace(clicks=0), prep=PREP, labels=LABELS).losses
    assert fit(with_clicks, cases, recipe=first, prep=PREP, labels=LABELS).losses == told, "the loss without clicks"
    assert all(p.grad is None or not p.grad.any() for n, p in without.named_parameters() if n.endswith(".guidance"))
    assert all(p.grad.any() for n, p in with_clicks.named_parameters() if n.endswith(".guidance"))
    # The head is reached by both passes.
    assert not torch.equal(with_clicks.head.conv.conv.weight.grad, without.head.conv.conv.weight.grad)


def test_a_partly_annotated_volume_trains_with_clicks(write_case, tmp_path: Path) -> None:
    whole, partly = (write_case(name, seed=seed, size=(16, 16, 16)) for seed, name in enumerate(("whole", "partly")))
    file = nib.load(partly.label)
    values = np.asarray(file.dataobj).copy()
    values[8:] = 255
    painted = tmp_path / "painted.nii.gz"
    nib.save(nib.Nifti1Image(values, file.affine), painted)
    cases = [Case("painted", partly.image, painted), Case("whole", whole.image, whole.label, ("ball",))]
    net = network()
    result = fit(net, cases, recipe=QUICK, prep=PREP, labels=LABELS)
    assert np.isfinite(result.losses).all()
    assert any(value.any() for name, value in net.named_parameters() if name.endswith(".guidance"))


def test_a_network_learns_to_follow_clicks(tmp_path: Path) -> None:
    # One of two equal balls is the label, and only a click can tell which.
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in (32, 16, 16)], indexing="ij"))
    rng = np.random.default_rng(0)
    centres = np.array([[8, 8, 8], [23, 8, 8]])
    balls = [((grid - centre[:, None, None, None]) ** 2).sum(0) < 20 for centre in centres]
    cases = []
    for number in range(2):
        paths = [tmp_path / f"{kind}{number}.nii.gz" for kind in ("image", "label")]
        scan = 100 * (balls[0] | balls[1]) + rng.normal(0, 5, balls[0].shape)
        for path, values in zip(paths, (scan.astype(np.float32), balls[number].astype(np.uint8)), strict=True):
            nib.save(nib.Nifti1Image(values, np.eye(4)), path)
        cases.append(Case(str(number), *paths))
    net = network(out_channels=2)
    prep = Preprocessing("ct", patch_size=(32, 16, 16))
    recipe = Recipe(
        steps=60,
        epochs=1,
        patches_per_volume=1,
        learning_rate=5e-3,
        schedule="one_cycle",
        affine_probability=0.0,
        intensity_probability=0.0,
        foreground_ratio=1.0,
        clicks=2,
        click_probability=0.8,
        click_start=0.25,
        mixed_precision=False,
    )
    fit(net, cases, recipe=recipe, prep=prep, labels=("ball",))
    scan = torch.from_numpy(np.clip((100.0 * (balls[0] | balls[1]) + 175) / 425, 0, 1)).float()[None, None]
    for number in range(2):
        clicks = {1: centres[number : number + 1], 0: centres[1 - number : 2 - number]}
        guidance = encode_guidance(clicks, torch.zeros(32, 16, 16), n_labels=1, size=(32, 16, 16))
        with torch.no_grad():
            found = net(scan, guidance[None]).argmax(1)[0].numpy()
        dice = 2 * (found * balls[number]).sum() / (found.sum() + balls[number].sum())
        assert dice > 0.8, (number, dice)


def test_steps_with_clicks_count_twice_in_the_effort() -> None:
    recipe = EVERY_STEP.replace(steps=100, click_start=0.4, click_probability=0.5)
    assert [recipe.effort(step) for step in (0, 40, 60, 100)] == [0, 40, 70, 130]
    assert recipe.replace(clicks=0).effort(100) == 100


def test_the_time_left_accounts_for_clicks_to_come(write_case, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr("deformux.fitting.fit.time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    left = []
    recipe = QUICK.replace(steps=4, epochs=4, click_start=0.5)
    case = [write_case("c0", size=(18, 16, 16))]
    fit(
        network(),
        case,
        recipe=recipe,
        prep=PREP,
        labels=LABELS,
        on_progress=lambda p: left.append((p.step, p.eta_s, p.seconds)),
    )
    eta, seconds = next(entry[1:] for entry in left if entry[0] == 2)
    # Two ordinary steps are done; two with clicks are to come.
    assert eta > 1.5 * seconds
    assert left[-1][1] == 0


def test_a_recipe_without_clicks_has_no_fields_for_them() -> None:
    said = {"clicks", "click_probability", "click_start"}
    assert said <= set(EVERY_STEP.to_dict())
    plain = EVERY_STEP.replace(clicks=0)
    assert not said & set(plain.to_dict())
    assert Recipe(**plain.to_dict()).replace(click_probability=1.0, click_start=0.0) == plain


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"clicks": -1}, "clicks must be a whole number from 0 to 100; got -1"),
        ({"clicks": 2.5}, "clicks must be a whole number"),
        ({"click_probability": 1.5}, "click_probability must be between 0 and 1; got 1.5"),
        ({"click_start": -0.5}, "click_start must be between 0 and 1; got -0.5"),
    ],
)
def test_a_recipe_with_impossible_clicks_is_refused(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Recipe(**change)
