"""The backends under test and the problems they solve."""

from collections.abc import Callable, Iterator, Sequence

import cuda_emulator
import pytest
import torch
from deform_problems import Problem
from torch import Tensor

MakeProblem = Callable[..., Problem]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Use one thread: the problems are small, and CI's cores may be busy; tests of threads set their own number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_problem(device: str) -> MakeProblem:
    """Return a problem, asymmetric by default: all sizes, and all parameters per axis, are different small numbers."""

    def make(
        *,
        channels: int = 6,
        out_channels: int | None = None,
        groups: int | None = None,
        offset_groups: int = 1,
        batch: int = 3,
        size: Sequence[int] = (5, 11, 7),
        kernel: Sequence[int] = (3, 2, 1),
        stride: Sequence[int] = (1, 2, 3),
        padding: Sequence[int] = (2, 1, 0),
        dilation: Sequence[int] = (2, 3, 1),
        spread: float = 1.5,
        bias: bool = True,
        mask: bool = True,
        dtype: torch.dtype = torch.float64,
    ) -> Problem:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            # Rounded once to the dtype under test, so that the oracle sees the same numbers.
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

        out_channels = channels if out_channels is None else out_channels
        groups = channels if groups is None else groups
        out = [(size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(3)]
        taps = kernel[0] * kernel[1] * kernel[2]
        return Problem(
            input=random(batch, channels, *size),
            offset=spread * random(batch, 3 * offset_groups * taps, *out),
            weight=random(out_channels, channels // groups, *kernel),
            bias=random(out_channels) if bias else None,
            mask=random(batch, offset_groups * taps, *out) if mask else None,
            options={"stride": tuple(stride), "padding": tuple(padding), "dilation": tuple(dilation)},
        )

    return make


@pytest.fixture(scope="session")
def kernel_compiler(tmp_path_factory: pytest.TempPathFactory, device: str) -> cuda_emulator.Compiler:
    """Compile CUDA kernels as C++, each once per test run."""
    if device != "cpu":
        pytest.skip("the emulator reads tensors on the CPU: run without --device")
    if reason := cuda_emulator.missing_compiler():
        pytest.skip(reason)
    return cuda_emulator.Compiler(tmp_path_factory.mktemp("kernels"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that takes `backend` on every backend of the device under test."""
    if "backend" in metafunc.fixturenames:
        on_cpu = metafunc.config.getoption("--device") == "cpu"
        backends = getattr(metafunc.module, "BACKENDS", ["reference", "cpu" if on_cpu else "cuda"])
        metafunc.parametrize("backend", backends)
