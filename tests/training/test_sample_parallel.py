"""A batch shared between threads gives the same as a whole batch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from deformux.data.preprocessing import Preprocessing
from deformux.fitting.fit import fit
from deformux.fitting.recipe import RECIPES
from deformux.fitting.sample_parallel import SampleThreads
from deformux.networks.deformux_net import DeformUXNet


@pytest.fixture(autouse=True)
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("samples", "workers", "guided"), [(2, 2, True), (3, 2, False), (1, 2, True)])
def test_output_and_gradients_equal_those_of_the_whole_batch(samples: int, workers: int, guided: bool) -> None:
    torch.manual_seed(0)
    network = DeformUXNet(1, 3, preset="tiny", guidance=True).double()
    inputs = [torch.rand(samples, 1, 16, 16, 16).double()]
    if guided:
        inputs.append(torch.rand(samples, network.guidance_channels, 16, 16, 16).double())
    weights = torch.rand(samples, 3, 16, 16, 16).double()
    expected = network(*inputs)
    (expected * weights).sum().backward()
    gradients = {name: p.grad for name, p in network.named_parameters()}
    network.zero_grad(set_to_none=True)
    output = SampleThreads(network, workers)(*inputs)
    (output * weights).sum().backward()
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    for name, parameter in network.named_parameters():
        # None where the weights of the guidance are not used.
        assert (parameter.grad is None) == (gradients[name] is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("clicked", [0, 1])
def test_gradients_of_a_batch_in_which_only_one_sample_has_clicks(clicked: int) -> None:
    """A sample without guidance leaves the weights of guidance without a gradient, and the other's must count."""
    torch.manual_seed(0)
    network = DeformUXNet(1, 3, "tiny", guidance=True)
    image, guidance = torch.randn(2, 1, 16, 16, 16), torch.zeros(2, network.guidance_channels, 16, 16, 16)
    guidance[clicked, 0, 8, 8, 8] = 1
    found = []
    for model in (network, SampleThreads(network, 2)):
        network.zero_grad()
        model(image, guidance).square().mean().backward()
        found.append([None if p.grad is None else p.grad.clone() for p in network.parameters()])
    for whole, shared in zip(*found, strict=True):
        torch.testing.assert_close(shared, whole, rtol=1e-3, atol=1e-5)


class _InBfloat16(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.network(x).float()


def test_threads_share_the_weights_that_autocast_keeps() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(1, 8, 3), nn.GELU(), nn.Conv3d(8, 8, 3), nn.GELU(), nn.Conv3d(8, 3, 1))
    both = _InBfloat16(network), SampleThreads(_InBfloat16(network), 2)
    for _ in range(20):
        image, weights = torch.rand(4, 1, 8, 8, 8), torch.rand(4, 3, 4, 4, 4)
        gradients = []
        for way in both:
            network.zero_grad(set_to_none=True)
            (way(image) * weights).sum().backward()
            gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
        assert (gradients[0] - gradients[1]).norm() < 0.02 * gradients[0].norm()


class _Threads(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.get_num_threads()


@pytest.mark.parametrize(("workers", "of_each"), [(2, 2), (4, 1), (3, 1)])
def test_each_worker_computes_with_its_part_of_the_threads(workers: int, of_each: int) -> None:
    assert (SampleThreads(_Threads(), workers)(torch.zeros(workers)) == of_each).all()
    assert torch.get_num_threads() == 4


class _Picky(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.min() < 0:
            raise RuntimeError("out of memory")
        return x


def test_an_error_in_a_thread_is_raised() -> None:
    with pytest.raises(RuntimeError, match="out of memory"):
        SampleThreads(_Picky(), 2)(torch.tensor([1.0, -1.0]))


def test_a_training_with_shared_batches_repeats_bit_for_bit(write_case) -> None:
    torch.set_num_threads(2)
    cases = [write_case(f"c{number}", seed=number, size=(20, 20, 20)) for number in range(2)]
    recipe = RECIPES["finetune"].replace(steps=3, epochs=1, mixed_precision=False, click_start=0.0)
    weights = []
    for _ in range(2):
        torch.manual_seed(0)
        network = DeformUXNet(1, 3, preset="tiny", guidance=True)
        prep = Preprocessing("ct", patch_size=(16, 16, 16))
        fit(network, cases, recipe=recipe, prep=prep, labels=("ball", "box"))
        weights.append(network.state_dict())
    assert all(torch.equal(one, weights[1][name]) for name, one in weights[0].items())
