"""What only a GPU can show; skipped unless `--device` names one (`make test-gpu`)."""

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
    """cuDNN's convolutions otherwise round float32 to ten bits, and what is compared with them inherits that."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


@pytest.fixture
def deterministic() -> Iterator[None]:
    """PyTorch's switch, put back afterwards."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
