"""Recording and replaying calls of a network: here in Python, on a GPU by CUDA graphs."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from deformux.inference.captured_network import CapturedNetwork, CaptureOptions, prepared
from deformux.inference.sliding_window import WindowInferer
from deformux.networks.deformux_net import DeformUXNet

SIZE = (32, 16, 16)


class Recorder:
    """Counts recordings and replays; a replay uses the same memory as its recording."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(
        self, run: Callable[[], Tensor], _device: torch.device, _pool: Any
    ) -> tuple[Callable[[], None], Tensor]:
        self.recorded += 1
        result = run().clone()

        def replay() -> None:
            self.replayed += 1
            result.copy_(run())

        return replay, result


@pytest.fixture
def network() -> DeformUXNet:
    torch.manual_seed(0)
    built = DeformUXNet(1, 6, "tiny", guidance=True)
    for name, weight in built.named_parameters():
        if "guidance" in name:
            torch.nn.init.normal_(weight, std=0.3)
    return built.eval()


def scan(seed: int, size: tuple[int, ...] = SIZE, count: int = 1) -> Tensor:
    return torch.randn(count, 1, *size, generator=torch.Generator().manual_seed(seed))


def guidance_of(channels: list[int], seed: int = 0) -> Tensor:
    guidance = torch.zeros(1, 11, *SIZE)
    guidance[:, channels] = torch.rand(1, len(channels), *SIZE, generator=torch.Generator().manual_seed(seed))
    return guidance


def expected(network: DeformUXNet, *inputs: Tensor) -> Tensor:
    with torch.inference_mode():
        return network(*inputs)


def test_later_calls_are_replayed_with_their_own_inputs(network: DeformUXNet) -> None:
    recorder = Recorder()
    captured = CapturedNetwork(network, "cpu", recorder=recorder, options=CaptureOptions(calls_before=2))
    results = [captured(scan(seed)) for seed in range(5)]
    assert (recorder.recorded, recorder.replayed) == (1, 3)
    for seed, result in enumerate(results):  # none was overwritten by a later call
        assert result.dtype == torch.float32
        assert torch.equal(result, expected(network, scan(seed)))
    captured(scan(0, (16, 16, 32)))
    assert recorder.recorded == 1


def test_guidance_with_other_channels_shares_a_recording(network: DeformUXNet) -> None:
    recorder = Recorder()
    captured = CapturedNetwork(network, "cpu", recorder=recorder, options=CaptureOptions(calls_before=0))
    few = [[0], [3, 10], [1, 2, 4, 5, 6], [7]]
    for seed, channels in enumerate(few):
        guidance = guidance_of(channels, seed)
        torch.testing.assert_close(captured(scan(seed), guidance), expected(network, scan(seed), guidance))
    assert recorder.recorded == 1
    every = guidance_of(list(range(11)))
    torch.testing.assert_close(captured(scan(9), every), expected(network, scan(9), every))
    assert recorder.recorded == 2
    nothing = guidance_of([])
    assert torch.equal(captured(scan(1), nothing), expected(network, scan(1)))
    assert torch.equal(captured(scan(2)), expected(network, scan(2)))
    assert recorder.recorded == 3


def test_the_least_recently_used_recording_is_dropped(network: DeformUXNet) -> None:
    recorder = Recorder()
    options = CaptureOptions(calls_before=0, most=2)
    captured = CapturedNetwork(network, "cpu", recorder=recorder, options=options)
    one, two, three = (scan(0, size) for size in ((16, 16, 32), (16, 32, 16), (32, 16, 16)))
    for x in (one, two, one, three, one):
        assert torch.equal(captured(x), expected(network, x))
    assert recorder.recorded == 3
    captured(two)
    assert recorder.recorded == 4


def test_a_call_that_cannot_be_recorded_is_computed_with_one_warning(network: DeformUXNet, caplog) -> None:
    attempts = []

    def fail(*arguments: object) -> tuple[Callable[[], None], Tensor]:
        attempts.append(arguments)
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    captured = CapturedNetwork(network, "cpu", recorder=fail, options=CaptureOptions(calls_before=0))
    with caplog.at_level(logging.WARNING):
        for seed in range(3):
            assert torch.equal(captured(scan(seed)), expected(network, scan(seed)))
        captured(scan(0, (16, 16, 32)))
    assert len(attempts) == 2  # once for each kind of call
    assert [record.getMessage() for record in caplog.records] == [
        "Calls of the network are not captured in CUDA graphs, and slower: "
        "operation not permitted when stream is capturing"
    ]


def test_changed_weights_are_noticed(network: DeformUXNet) -> None:
    recorder = Recorder()
    captured = CapturedNetwork(network, "cpu", recorder=recorder, options=CaptureOptions(calls_before=0))
    before = captured(scan(0))
    with torch.no_grad():
        network.head.conv.conv.bias.add_(1)
    assert torch.equal(captured(scan(0)), expected(network, scan(0)))
    assert not torch.equal(captured(scan(0)), before)
    assert recorder.recorded == 2
    other = DeformUXNet(1, 6, "tiny", guidance=True)
    network.load_state_dict(other.state_dict())
    assert torch.equal(captured(scan(0)), expected(network, scan(0)))


def test_recordings_are_dropped_if_memory_is_short(network: DeformUXNet) -> None:
    recorder = Recorder()
    full = False

    def watched(run: Callable[[], Tensor], device: torch.device, pool: Any) -> tuple[Callable[[], None], Tensor]:
        replay, result = recorder(run, device, pool)

        def replay_or_fail() -> None:
            if full:
                raise torch.OutOfMemoryError("CUDA out of memory")
            replay()

        return replay_or_fail, result

    captured = CapturedNetwork(network, "cpu", recorder=watched, options=CaptureOptions(calls_before=0))
    captured(scan(0))
    full = True
    with pytest.raises(torch.OutOfMemoryError):
        captured(scan(0))
    full = False
    assert torch.equal(captured(scan(0)), expected(network, scan(0)))
    assert recorder.recorded == 2


@pytest.mark.parametrize("size", [(40, 33, 16), (16, 16, 16), (60, 16, 20)])
def test_batched_windows_equal_single_ones(size: tuple[int, int, int], network: DeformUXNet) -> None:
    class Batched:
        def __init__(self) -> None:
            self.shapes: set[int] = set()

        def batch_size(self, window: tuple[int, ...]) -> int:
            assert window == (32, 32, 16)
            return 4

        def __call__(self, x: Tensor) -> Tensor:
            self.shapes.add(len(x))
            return network(x)

    batched, volume = Batched(), scan(0, size)
    with torch.inference_mode():
        one_by_one = WindowInferer((32, 32, 16))(volume, network)
        together = WindowInferer((32, 32, 16))(volume, batched)
    torch.testing.assert_close(together, one_by_one, rtol=1e-4, atol=1e-5)
    assert len(batched.shapes) == 1  # the last batch is as large as the others
    assert batched.shapes <= {1, 2, 3, 4}


def test_a_network_on_the_cpu_stays_itself(network: DeformUXNet) -> None:
    network.train()
    assert prepared(network, "cpu") is network
    assert not network.training
    captured = CapturedNetwork(network, "cpu", recorder=Recorder())
    assert prepared(captured, "cpu") is captured
