"""Fixtures and options that every test folder shares."""

from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--runslow", action="store_true", help="also run the sweeps that CI leaves out")
    parser.addoption("--device", default="cpu", help="device for the operator and network tests, e.g. cuda:0")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--runslow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow sweep: give --runslow"))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The repository's root."""
    return REPOSITORY


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """Where operator and network tests run."""
    return str(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real scans, beside the repository; absent on most machines."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not (folder / "hippocampus" / "split.json").is_file():
        pytest.skip("real data is not at ../shared/data")
    return folder
