"""Fixtures and options that every test folder shares."""

import os
from functools import cache
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--runslow", action="store_true", help="also run the sweeps that CI leaves out")
    parser.addoption("--device", default="cpu", help="device for the operator and network tests, e.g. cuda:0")


def pytest_configure(config: pytest.Config) -> None:
    """End at once if the requested device is missing: a run that skips everything looks like a success."""
    name = config.getoption("--device")
    if name == "cpu":
        return
    # PyTorch's matrix products repeat bit for bit only with this, and read it once.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise pytest.UsageError(f"--device: got {name}, which PyTorch cannot use here ({reason})") from error


# The files that take half a minute or more, the longest first, so that no worker is left with one when the others are
# done. The first brings all files that share its trainings.
LONG = (
    *("app/test_bad_input", "app/test_demo", "app/test_finetune", "security/test_slow_clients", "app/test_annotators"),
    *("app/test_scoring_process", "ops/test_cuda_kernels", "training/test_distributed", "training/test_simulation"),
    *("training/test_predict_cluster", "app/test_batch_inference", "training/test_learner", "app/test_edit"),
    *("training/test_fit", "training/test_deformux_net", "training/test_sequences", "ops/test_cuda_compile"),
    *("app/test_damaged_models", "app/test_server", "training/test_predict_resume", "training/test_python_guide"),
    *("app/test_strategies", "security/test_login", "ops/test_integration", "security/test_login_attacks"),
    *("security/test_uploads", "training/test_cli", "test_packages", "training/test_volume_bounds"),
    *("app/test_labels_kept", "app/test_label_names", "training/test_slabs", "training/test_project_plan"),
    *("ops/test_backward", "training/test_resume", "app/test_leases_store"),
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    rank = {REPOSITORY / "tests" / f"{name}.py": number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path, len(LONG)))
    if config.getoption("--runslow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow sweep: give --runslow"))


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Give each file to one worker, and all files that share trainings, which take minutes, or a server to the same."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _shared_by(super()._split_scope(nodeid))

    return Scheduling(config, log) if config.getvalue("dist") == "loadfile" else None


@cache  # asked for every test, several times
def _shared_by(file: str) -> str:
    """Return what a file shares with others, from its source: the process that hands out tests collects none itself."""
    source = (REPOSITORY / file).read_text()
    # Parameters by which tests take the fixtures in tests/app/shared_fixtures.py and tests/security/conftest.py.
    shared = {"trainings: list": "trainings", "login_server: LiveServer": "login_server"}
    return next((scope for parameter, scope in shared.items() if parameter in source), file)


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
