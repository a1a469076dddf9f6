"""Networks whose calls are captured in CUDA graphs, against the same calls one kernel after another."""

import logging
import threading

import pytest
import torch

captured_inference = pytest.importorskip(
    "deformux.inference.captured_network", reason="the network needs monai", exc_type=ImportError
)
from deformux.inference.sliding_window import WindowInferer  # noqa: E402
from deformux.networks.deformux_net import DeformUXNet  # noqa: E402
from deformux.networks.precision import mixed_precision  # noqa: E402

SIZE = (32, 48, 32)
CapturedNetwork, CaptureOptions = captured_inference.CapturedNetwork, captured_inference.CaptureOptions


@pytest.fixture
def network(device) -> DeformUXNet:
    """A network with offsets and guidance as after some training; at initialisation they are zero."""
    torch.manual_seed(0)
    built = DeformUXNet(1, 6, "tiny", guidance=True)
    for name, parameter in built.named_parameters():
        if ".offset." in name or "guidance" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return built.to(device).eval()


def scan(seed, size=SIZE, count=1):
    return torch.randn(count, 1, *size, generator=torch.Generator().manual_seed(seed))


def guidance_of(channels, seed=0):
    guidance = torch.zeros(1, 11, *SIZE)
    guidance[:, channels] = torch.rand(1, len(channels), *SIZE, generator=torch.Generator().manual_seed(seed))
    return guidance


@torch.inference_mode()
def eager(network, device, *inputs):
    with mixed_precision(device):
        return network(*(x.to(device) for x in inputs)).float()


def distance(actual, expected):
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def test_replays_equal_the_network(network, device, caplog):
    captured = CapturedNetwork(network, device)
    with caplog.at_level(logging.WARNING):
        results = [captured(scan(seed)) for seed in range(6)]
    assert not caplog.records
    for seed, result in enumerate(results):
        assert torch.equal(result, eager(network, device, scan(seed)))


def test_guided_calls(network, device, caplog):
    captured = CapturedNetwork(network, device, options=CaptureOptions(calls_before=0))
    with caplog.at_level(logging.WARNING):
        for seed, channels in enumerate(([0], [3, 10], [1, 2, 4, 5], list(range(11)), [])):
            guidance = guidance_of(channels, seed)
            result = captured(scan(seed), guidance)
            # Additional empty channels may change cuDNN's algorithm and the order of its sums.
            assert distance(result, eager(network, device, scan(seed), guidance)) < 1e-2
    assert not caplog.records


def test_changed_weights_are_noticed(network, device):
    captured = CapturedNetwork(network, device, options=CaptureOptions(calls_before=0))
    captured(scan(0))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.1)
    assert torch.equal(captured(scan(0)), eager(network, device, scan(0)))


def test_failed_recording_leaves_the_generator_usable(network, device, caplog):
    class Asking(torch.nn.Module):
        def forward(self, x):
            return x * float(x.sum() > 0)  # the host waits for a value, which a recording forbids

    torch.manual_seed(3)
    expected = torch.rand(4, device=device)
    torch.manual_seed(3)
    captured = CapturedNetwork(Asking().to(device), device, options=CaptureOptions(calls_before=0))
    with caplog.at_level(logging.WARNING):
        for seed in range(3):
            positive = scan(seed).abs()
            assert torch.equal(captured(positive).cpu(), positive)
    assert len(caplog.records) == 1
    assert torch.equal(torch.rand(4, device=device), expected)
    other = CapturedNetwork(network, device, options=CaptureOptions(calls_before=0))
    assert torch.equal(other(scan(0)), eager(network, device, scan(0)))


def test_threads_share_a_network(network, device):
    captured = CapturedNetwork(network, device, options=CaptureOptions(calls_before=1))
    expected = [eager(network, device, scan(seed)) for seed in range(4)]
    wrong = []

    def work(seed):
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            for _ in range(10):
                result = captured(scan(seed))
                stream.synchronize()
                if not torch.equal(result, expected[seed]):
                    wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_memory_is_released(network, device):
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(device)
    captured = CapturedNetwork(network, device, options=CaptureOptions(calls_before=0))
    captured(scan(0, (96, 96, 96), 4))
    del captured
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved(device) - before < 100 * 2**20


def test_a_volume_in_batches_of_windows(network, device):
    volume = scan(0, (80, 60, 70)).to(device)
    captured = CapturedNetwork(network, device)
    assert captured.batch_size(SIZE) > 1
    with torch.inference_mode():
        one_by_one = WindowInferer(SIZE)(volume, network)
        together = WindowInferer(SIZE)(volume, captured)
    assert distance(together, one_by_one) < 2e-2
    assert (together.argmax(1) != one_by_one.argmax(1)).float().mean() < 1e-2
