"""DeformUX-Net on a GPU against the same network on the CPU."""

import copy
import logging

import pytest
import torch

from deform3d import _dispatch

network = pytest.importorskip("deformux.networks.deformux_net", reason="the network needs monai", exc_type=ImportError)


@pytest.fixture
def model() -> torch.nn.Module:
    """A network with offsets as after some training; at initialisation they are zero."""
    torch.manual_seed(0)
    model = network.DeformUXNet(1, 4, "tiny").eval()
    for name, parameter in model.named_parameters():
        if ".offset." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.cpu().double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("memory_is_short", [False, True])
def test_inference(model, device, caplog, monkeypatch, memory_is_short):
    if memory_is_short:
        monkeypatch.setattr(_dispatch, "free_memory", lambda _device: 0)
        monkeypatch.setattr(_dispatch, "_FUSE_NEVER_BYTES", 0)
    _dispatch._log_fusion.cache_clear()  # each choice is logged once per process
    x = torch.randn(2, 1, 32, 48, 40, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = copy.deepcopy(model).double()(x.double())
        with caplog.at_level(logging.DEBUG):
            exact = model.to(device)(x.to(device))
        with torch.autocast("cuda", dtype=torch.bfloat16):
            mixed = model(x.to(device))
    assert distance(exact, expected) < 1e-4
    assert distance(mixed, expected) < 5e-2
    assert ("offsets are computed inside the kernel" in caplog.text) == memory_is_short


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(model, device, checkpointing):
    model.activation_checkpointing = checkpointing
    x = torch.randn(1, 1, 32, 32, 48, generator=torch.Generator().manual_seed(1))
    exact = copy.deepcopy(model).double()
    exact(x.double()).square().mean().backward()
    model.to(device).to(memory_format=torch.channels_last_3d)
    model(x.to(device)).square().mean().backward()
    for (name, ours), theirs in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert (ours.grad.cpu().double() - theirs.grad).norm() <= 1e-2 * theirs.grad.norm() + 1e-6, name
