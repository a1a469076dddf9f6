"""The loss for incomplete labels: equal to MONAI's for complete ones, unchanged by what must not matter."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.losses import DiceCELoss, DiceLoss
from monai.networks.nets import UNet
from torch import Tensor
from torch.nn import functional as F

from deformux.data.cases import Case
from deformux.data.preprocessing import Preprocessing
from deformux.data.transforms import labelled_transforms
from deformux.fitting.augmentation import training_augmentation
from deformux.fitting.fit import TrainingError, fit
from deformux.fitting.losses import PartialDiceCELoss
from deformux.fitting.recipe import RECIPES
from deformux.inference.evaluate import evaluate

ALL = torch.ones(2, 4, dtype=torch.bool)


def problem(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return logits (2, 4, 6, 5, 7) and a label (2, 1, 6, 5, 7) with values 0..3, in double precision."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 4, 6, 5, 7, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), torch.randint(0, 4, (2, 1, 6, 5, 7), generator=generator)


def gradient(logits: Tensor, label: Tensor, annotated: Tensor = ALL) -> Tensor:
    (found,) = torch.autograd.grad(PartialDiceCELoss()(logits, label, annotated), logits)
    return found


def test_complete_labels_give_monais_loss() -> None:
    logits, label = problem()
    peer = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False, batch=True)(logits, label)
    torch.testing.assert_close(PartialDiceCELoss()(logits, label, ALL), peer, rtol=0, atol=1e-7)
    torch.testing.assert_close(gradient(logits, label), torch.autograd.grad(peer, logits)[0], rtol=0, atol=1e-7)


def test_unlabelled_voxels_count_nowhere() -> None:
    logits, label = problem()
    label[:, :, :3] = 255
    found = gradient(logits, label)
    assert (found[:, :, :3] == 0).all()
    # The loss is that of a volume that ends there.
    rest = logits[:, :, 3:].detach().requires_grad_()
    torch.testing.assert_close(found[:, :, 3:], gradient(rest, label[:, :, 3:]), rtol=0, atol=1e-12)
    nothing = PartialDiceCELoss()(logits, torch.full_like(label, 255), ALL)
    assert nothing == 0
    assert (torch.autograd.grad(nothing, logits)[0] == 0).all()


def test_emphasis_adds_the_cross_entropy_of_some_voxels() -> None:
    logits, label = problem()
    label[:, :, :2] = 255
    weights = torch.rand(2, 1, 6, 5, 7, dtype=torch.float64) * 9
    nll = F.cross_entropy(logits, label[:, 0], ignore_index=255, reduction="none")
    mean = np.average(nll.detach().numpy(), weights=(weights * (label != 255))[:, 0].numpy())
    loss = PartialDiceCELoss()
    added = loss(logits, label, ALL, weights) - loss(logits, label, ALL)
    assert added.item() == pytest.approx(mean)
    nowhere = loss(logits, label, ALL, weights * (label == 255))
    assert nowhere == loss(logits, label, ALL)


def test_a_label_that_was_not_annotated_may_be_background() -> None:
    logits, label = problem()
    label[label == 2] = 0
    annotated = ALL.clone()
    annotated[:, 2] = False
    # Merged by hand: a network with one output less, whose background stands for both.
    merged = torch.cat([logits[:, [0, 2]].logsumexp(1, keepdim=True), logits[:, [1, 3]]], 1)
    renumbered = torch.where(label == 3, 2, label)
    dice = DiceLoss(to_onehot_y=True, softmax=True, include_background=False, batch=True, reduction="sum")
    # MONAI's mean is over two labels; here the third contributes a loss of 0.
    expected = dice(merged, renumbered) / 3 + F.cross_entropy(merged, renumbered.squeeze(1))
    torch.testing.assert_close(PartialDiceCELoss()(logits, label, annotated), expected, rtol=0, atol=1e-6)
    # Moving probability between background and the label changes nothing: no gradient in that direction.
    shares = logits[:, [0, 2]].softmax(1)
    found = gradient(logits, label, annotated)[:, [0, 2]]
    torch.testing.assert_close(found[:, 0] * shares[:, 1], found[:, 1] * shares[:, 0], rtol=0, atol=1e-9)


def test_each_volume_has_its_own_annotation() -> None:
    logits, label = problem()
    label[1][label[1] == 1] = 0
    annotated = ALL.clone()
    annotated[1, 1] = False
    moved = logits.detach().clone()
    # In the second volume all of background goes to the label that was not annotated there.
    moved[1, [0, 1]] = torch.stack([moved[1, [0, 1]].logsumexp(0), torch.full((6, 5, 7), -50.0).double()]).flip(0)
    torch.testing.assert_close(
        PartialDiceCELoss()(moved, label, annotated), PartialDiceCELoss()(logits, label, annotated), rtol=0, atol=1e-9
    )


def test_patches_are_centred_on_labelled_voxels(write_case) -> None:
    case = write_case("a", size=(48, 16, 16))
    file = nib.load(case.label)
    values = np.asarray(file.dataobj).copy()
    values[16:] = 255
    nib.save(nib.Nifti1Image(values, file.affine), case.label)
    prep = Preprocessing("ct", patch_size=(16, 16, 16))
    recipe = RECIPES["finetune"].replace(affine_probability=0.0, elastic_probability=0.0)
    data = {"image": case.image, "label": case.label, "annotated": np.ones(3, bool)}
    for transform in labelled_transforms(prep, n_labels=2):
        data = transform(data)
    for seed in range(20):
        patches: object = data
        for transform in training_augmentation(prep, recipe):
            if hasattr(transform, "set_random_state"):
                transform.set_random_state(seed)
            patches = [transform(p) for p in patches] if isinstance(patches, list) else transform(patches)
        label = patches[0]["label"]
        assert label.shape == (1, 16, 16, 16)
        assert (label[0, 8] != 255).any()


def test_a_partly_painted_volume_trains_and_is_scored(write_case, tmp_path) -> None:
    whole, partly = (write_case(name, seed=seed, size=(16, 16, 16)) for seed, name in enumerate(("whole", "partly")))
    file = nib.load(partly.label)
    values = np.asarray(file.dataobj).copy()
    values[8:] = 255
    painted = tmp_path / "painted.nii.gz"
    nib.save(nib.Nifti1Image(values, file.affine), painted)
    cases = [Case("painted", partly.image, painted), Case("whole", whole.image, whole.label, ("ball",))]
    prep = Preprocessing("ct", patch_size=(16, 16, 16))
    quick = RECIPES["finetune"].replace(steps=2, epochs=1, batch_size=2)
    network = UNet(3, 1, 3, channels=(8, 16), strides=(2,))
    fit(network, cases, recipe=quick, prep=prep, labels=("ball", "box"))
    scores = evaluate(network, cases, prep, n_labels=2, labels=("ball", "box"))
    assert np.isnan(scores["whole"][1])
    assert not np.isnan(scores["whole"][0])
    with pytest.raises(ValueError, match="'spleen', which is not a label"):
        fit(network, [Case("x", whole.image, whole.label, ("spleen",))], recipe=quick, prep=prep, labels=("a", "b"))
    nib.save(nib.Nifti1Image(np.full_like(values, 255), file.affine), painted)
    with pytest.raises(TrainingError, match=r"painted\.nii\.gz has no labelled voxel"):
        fit(network, cases[:1], recipe=quick, prep=prep, labels=("ball", "box"))
