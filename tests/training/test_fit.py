"""fit() and evaluate() on real files."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from deformux.data.cases import Case
from deformux.data.preprocessing import Preprocessing
from deformux.fitting.fit import Progress, TrainingError, fit
from deformux.fitting.recipe import RECIPES, Recipe
from deformux.inference.evaluate import evaluate
from deformux.inference.sliding_window import segment
from deformux.networks.deformux_net import DeformUXNet

PREP = Preprocessing("ct", patch_size=(32, 32, 16))
QUICK = RECIPES["finetune"].replace(steps=4, epochs=2)
# oneDNN's bfloat16 weight gradients differ in the last bit from run to run; float32 ones do not.
REPEATABLE = QUICK.replace(mixed_precision=False)
LABELS = ("ball", "box")


def network(seed: int = 0) -> DeformUXNet:
    torch.manual_seed(seed)
    return DeformUXNet(1, 3, "tiny")


def manual_dice(pred: np.ndarray, truth: np.ndarray, label: int) -> float:
    a, b = pred == label, truth == label
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def test_a_network_learns_two_objects_and_finds_them_in_a_new_scan(write_case) -> None:
    cases = [write_case(f"case{i}", seed=i) for i in range(4)]
    net = network()
    recipe = RECIPES["finetune"].replace(steps=40, epochs=4, learning_rate=4e-3, rotation_degrees=0.0)
    fit(net, cases, recipe=recipe, prep=PREP, labels=LABELS)
    new = write_case("new", seed=99)
    labels, probabilities = segment(net, new.image, PREP)
    truth = np.asarray(nib.load(new.label).dataobj)
    by_hand = [manual_dice(labels[0].numpy(), truth, label) for label in (1, 2)]
    assert min(by_hand) > 0.8
    np.testing.assert_allclose(evaluate(net, [new], PREP, n_labels=2)["new"], by_hand, atol=1e-6)
    assert probabilities.shape[0] == 3
    torch.testing.assert_close(probabilities.sum(0), torch.ones(probabilities.shape[1:]))


def test_single_slices_train_as_volumes(write_case) -> None:
    """A 2D image, and volumes of one voxel along each axis, with clicks and without."""
    cases = [
        write_case(f"case{i}", seed=i, size=size) for i, size in enumerate([(32, 32, 1), (32, 1, 32), (1, 32, 32)])
    ]
    for path in (cases[0].image, cases[0].label):
        flat = nib.load(path)
        nib.save(nib.Nifti1Image(np.asarray(flat.dataobj)[:, :, 0], flat.affine), path)
    torch.manual_seed(0)
    net = DeformUXNet(1, 3, "tiny", guidance=True)
    result = fit(net, cases, recipe=QUICK, prep=PREP, labels=LABELS, val_cases=cases)
    assert set(result.per_case) == {"case0", "case1", "case2"}
    assert all(parameter.isfinite().all() for parameter in net.parameters())


def test_progress_runs_to_the_end(write_case) -> None:
    seen: list[Progress] = []
    cases = [write_case(f"case{i}", seed=i) for i in range(3)]
    result = fit(
        network(), cases[:2], recipe=QUICK, prep=PREP, labels=LABELS, val_cases=cases[2:], on_progress=seen.append
    )
    assert seen[-1].step == seen[-1].total_steps == 4
    assert seen[-1].epoch == seen[-1].total_epochs == 2
    assert seen[-1].eta_s == 0
    assert [p.step for p in seen] == sorted(p.step for p in seen)
    assert 0 <= seen[-1].best_dice <= 1
    assert set(result.per_case) == {"case2"}
    assert len(result.losses) == 2


def test_the_best_weights_by_validation_are_kept(write_case) -> None:
    cases = [write_case(f"case{i}", seed=i) for i in range(3)]
    net = network()
    result = fit(
        net,
        cases[:2],
        recipe=RECIPES["finetune"].replace(steps=12, epochs=6, ema_decay=None),
        prep=PREP,
        labels=LABELS,
        val_cases=cases[2:],
    )
    again = evaluate(net, cases[2:], PREP, n_labels=2)
    assert again == result.per_case


def test_the_moving_average_of_all_steps_is_kept(write_case) -> None:
    """Compare with the average of the weights after each step, in float64."""
    net, decay = network(), 0.75
    left: list[torch.Tensor] = []

    def after_step() -> bool:
        left.append(torch.cat([p.detach().flatten() for p in net.parameters()]).double())
        return False

    fit(net, [write_case("a")], recipe=QUICK.replace(ema_decay=decay), prep=PREP, labels=LABELS, stop=after_step)
    average = left[0]
    for weights in left[1:]:
        average = decay * average + (1 - decay) * weights
    kept = torch.cat([p.detach().flatten() for p in net.parameters()])
    torch.testing.assert_close(kept, average.float())
    assert not torch.allclose(kept, left[-1].float())


def test_the_same_seed_gives_the_same_weights(write_case) -> None:
    cases = [write_case(f"case{i}", seed=i) for i in range(2)]
    states = []
    for seed in (1, 1, 2):
        net = network()
        fit(net, cases, recipe=REPEATABLE, prep=PREP, labels=LABELS, seed=seed)
        states.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    assert not torch.equal(states[0], states[2])


def test_volumes_beyond_the_memory_budget_are_read_again(write_case) -> None:
    cases = [write_case(f"case{i}", seed=i) for i in range(2)]
    states = []
    for cache_gb in (4.0, 0.0):
        net = network()
        fit(net, cases, recipe=REPEATABLE.replace(cache_gb=cache_gb), prep=PREP, labels=LABELS)
        states.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    torch.testing.assert_close(*states)


@pytest.mark.parametrize("schedule", ["plateau", "one_cycle", "cosine", "constant"])
def test_every_schedule_runs(write_case, schedule: str) -> None:
    recipe = Recipe(steps=2, epochs=2, schedule=schedule, low_resolution=0.5, flip_axes=(0,))
    result = fit(network(), [write_case("a")], recipe=recipe, prep=PREP, labels=LABELS)
    assert all(np.isfinite(result.losses))


def test_a_scan_smaller_than_the_patch_is_padded(write_case) -> None:
    case = write_case("small", size=(20, 24, 14))
    fit(network(), [case], recipe=QUICK, prep=PREP, labels=LABELS)


def test_without_cases_there_is_nothing_to_train_on() -> None:
    with pytest.raises(TrainingError, match="no labelled volumes"):
        fit(network(), [], recipe=QUICK, prep=PREP, labels=LABELS)


def test_a_network_for_other_labels_is_refused(write_case) -> None:
    with pytest.raises(TrainingError, match="3 classes, the labels need 4"):
        fit(network(), [write_case("a")], recipe=QUICK, prep=PREP, labels=("a", "b", "c"))


def test_an_unusable_case_is_named(write_case, tmp_path: Path) -> None:
    case = write_case("a")
    wrong = tmp_path / "wrong.nii.gz"
    file = nib.load(case.label)
    nib.save(nib.Nifti1Image(np.asarray(file.dataobj)[2:], file.affine), wrong)
    for cases in ([Case("b", case.image, wrong)], [case, Case("b", case.image, wrong)]):
        with pytest.raises(TrainingError, match=r"wrong\.nii\.gz is not on its image's grid"):
            fit(network(), cases, recipe=QUICK, prep=PREP, labels=LABELS)


def test_a_diverged_training_ends_with_a_reason(write_case) -> None:
    wild = Recipe(steps=12, epochs=1, learning_rate=1e30, schedule="constant", mixed_precision=False)
    with pytest.raises(TrainingError, match="no longer finite"):
        fit(network(), [write_case("a")], recipe=wild, prep=PREP, labels=LABELS)


def test_a_bad_recipe_names_the_valid_values() -> None:
    with pytest.raises(ValueError, match="plateau, one_cycle, cosine, constant"):
        Recipe(schedule="linear")
    with pytest.raises(ValueError, match="steps"):
        Recipe(steps=0)
    with pytest.raises(ValueError, match="it has steps"):
        Recipe().replace(step=3)
    with pytest.raises(ValueError, match="whole number"):
        Recipe().replace(steps=2.5)


def test_the_defaults_are_those_of_the_paper() -> None:
    recipe = Recipe()
    assert (recipe.steps, recipe.batch_size, recipe.learning_rate, recipe.weight_decay) == (40_000, 2, 1e-4, 0.08)
    assert (recipe.betas, recipe.eps, recipe.schedule) == ((0.9, 0.999), 1e-8, "plateau")
    assert (recipe.rotation_degrees, recipe.scaling, recipe.intensity_shift) == (30.0, 0.1, 0.1)
