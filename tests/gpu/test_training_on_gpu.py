"""Training steps replayed from CUDA graphs, against the same steps launch by launch."""

import copy
import os
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage

# cuBLAS is deterministic only with a fixed workspace, which it allocates on first use.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

engine = pytest.importorskip("deformux.fitting.fit", reason="training needs monai", exc_type=ImportError)
from deformux.data.preprocessing import Preprocessing  # noqa: E402
from deformux.fitting.click_steps import ClickTraining  # noqa: E402
from deformux.fitting.losses import PartialDiceCELoss  # noqa: E402
from deformux.fitting.optimizer import make_average, make_optimizer, make_schedule  # noqa: E402
from deformux.fitting.recipe import RECIPES  # noqa: E402
from deformux.fitting.training_step import TrainingStep  # noqa: E402
from deformux.networks.deformux_net import DeformUXNet  # noqa: E402

STEPS = 50
SHAPE = (2, 1, 32, 32, 32)
RECIPE = RECIPES["finetune"].replace(steps=STEPS, click_start=0.2, click_probability=0.4)


@pytest.fixture
def network():
    torch.manual_seed(0)
    net = DeformUXNet(1, 3, "tiny", guidance=True)
    for name, parameter in net.named_parameters():
        # Offsets as after some training: at initialisation they are zero.
        if ".offset." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return net


class Steps:
    """A training on random batches; some of their volumes are annotated for one label only."""

    def __init__(self, network, device, *, recipe=RECIPE, capture, loss=None):
        self.network = copy.deepcopy(network).to(device)
        self.optimizer = make_optimizer(self.network, recipe)
        self.schedule = make_schedule(self.optimizer, recipe, steps=recipe.steps)
        self.average = make_average(self.network, recipe)
        self.step = TrainingStep(
            self.network,
            self.optimizer,
            self.average,
            recipe,
            clicks=ClickTraining(self.network, recipe, seed=0) if recipe.clicks else None,
            device=torch.device(device),
            capture=capture,
        )
        if loss is not None:
            self.step._loss = loss

    def take(self, first, last):
        losses = []
        for step in range(first, last + 1):
            rng = torch.Generator().manual_seed(step)
            image = torch.randn(SHAPE, generator=rng)
            label = torch.randint(0, 3, SHAPE, generator=rng, dtype=torch.uint8)
            annotated = torch.tensor([[True, True, step % 5 > 0], [True, True, True]])
            losses.append(float(self.step(step, image, label, annotated)))
            self.schedule.step()
        return losses

    def tensors(self):
        averaged = {f"average {name}": value for name, value in self.average.module.state_dict().items()}
        return {**self.network.state_dict(), **averaged}


@pytest.mark.parametrize("mixed_precision", [False, True])
def test_graphs_equal_launches_bit_for_bit(network, device, deterministic, mixed_precision):
    recipe = RECIPE.replace(mixed_precision=mixed_precision)
    eager, captured = (Steps(network, device, recipe=recipe, capture=capture) for capture in (False, True))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*CUDA graphs")
        assert captured.take(1, STEPS) == eager.take(1, STEPS)
    assert len(captured.step._captured) == 4, "complete or not, with clicks or without"
    assert captured.step._captured_clicks
    for (name, ours), theirs in zip(captured.tensors().items(), eager.tensors().values(), strict=True):
        assert torch.equal(ours, theirs), name


class Asking(PartialDiceCELoss):
    """A loss that waits for the GPU."""

    def forward(self, *arguments):
        loss = super().forward(*arguments)
        assert bool(loss > 0)
        return loss


class Synchronizing(PartialDiceCELoss):
    """A loss that breaks a capture and that the check before it does not detect."""

    def forward(self, *arguments):
        torch.cuda.synchronize()
        return super().forward(*arguments)


@pytest.mark.parametrize("loss", [Asking(), Synchronizing()])
def test_failed_capture_changes_nothing(network, device, deterministic, loss):
    eager = Steps(network, device, capture=False)
    broken = Steps(network, device, capture=True, loss=loss)
    with pytest.warns(UserWarning, match="continues without CUDA graphs") as said:
        losses = broken.take(1, 12)
    assert len([w for w in said if "CUDA graphs" in str(w.message)]) == 1
    assert losses == eager.take(1, 12)
    torch.manual_seed(3)
    drawn = torch.rand(4, device=device)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(4, device=device), drawn)


@pytest.mark.slow
def test_compiled_network_learns_the_same(network, device):
    plain = RECIPE.replace(clicks=0)
    eager, compiled = (Steps(network, device, recipe=plain, capture=True) for _ in range(2))
    losses = compiled.take(1, 5)
    compiled.step.compile()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*continues without")
        losses += compiled.take(6, 10)
    np.testing.assert_allclose(losses, eager.take(1, 10), rtol=2e-3)
    assert compiled.step.compiled


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_capture_on_a_gpu_other_than_the_current_one(network):
    eager, captured = (Steps(network, "cuda:1", capture=capture) for capture in (False, True))
    np.testing.assert_allclose(captured.take(1, 12), eager.take(1, 12), rtol=1e-3)
    assert captured.step._captured


@pytest.fixture
def cases(tmp_path: Path):
    made = []
    for i in range(3):
        rng = np.random.default_rng(i)
        image = ndimage.gaussian_filter(rng.normal(size=(40, 44, 36)), 2).astype(np.float32)
        for name, volume in (("image", image), ("label", (image > 0.05).astype(np.uint8))):
            nib.save(nib.Nifti1Image(volume, np.eye(4)), tmp_path / f"{name}{i}.nii.gz")
        made.append(engine.Case(f"c{i}", tmp_path / f"image{i}.nii.gz", tmp_path / f"label{i}.nii.gz"))
    return made


def test_interrupted_training_ends_like_an_uninterrupted_one(cases, device, deterministic, tmp_path):
    recipe = RECIPES["finetune"].replace(steps=12, epochs=3, click_start=0.25, mixed_precision=False)

    def run(**options):
        torch.manual_seed(0)
        net = DeformUXNet(1, 2, "tiny", guidance=True)
        prep = Preprocessing("mr", patch_size=(32, 32, 32))
        options |= {"recipe": recipe, "prep": prep, "labels": ("a",), "val_cases": cases[:1], "device": device}
        return engine.fit(net, cases, **options), net

    whole, expected = run()
    asked = iter(range(100))
    file = tmp_path / "checkpoint.safetensors"
    with pytest.raises(engine.TrainingStopped):
        run(checkpoint=file, stop=lambda: next(asked) == 6)
    resumed, actual = run(checkpoint=file)
    assert resumed.resumed_from == 7
    np.testing.assert_allclose(resumed.losses, whole.losses, rtol=1e-5)
    for name, value in actual.state_dict().items():
        torch.testing.assert_close(value, expected.state_dict()[name], rtol=1e-4, atol=1e-5, msg=name)
