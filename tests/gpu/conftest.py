"""Tests that need a GPU; skipped unless `--device` names one (`make test-gpu`)."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.device(config.getoption("--device")).type == "cuda":
        return
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.skip(reason="needs a GPU: run make test-gpu, or give --device cuda:0"))


@pytest.fixture(autouse=True)
def _full_float32() -> Iterator[None]:
    """Switch off TF32: cuDNN's convolutions would round float32 to ten bits, and comparisons would inherit that."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Set PyTorch's switch, and restore it afterwards."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
