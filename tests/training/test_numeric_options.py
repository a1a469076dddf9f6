"""Numbers on the command line: a wrong one ends in a sentence that names its option."""

import pytest
from typer.testing import CliRunner

from deformux.cli.main import app

_HUGE = "9" * 23
_COMMANDS = {
    "fit": ("fit", "data", "m.safetensors", "--labels", "a"),
    "predict": ("predict", "hippocampus", "scans", "out"),
    "predict-cluster": ("predict-cluster", "hippocampus", "scans", "out"),
    "evaluate": ("evaluate", "hippocampus", "data"),
    "clicks": ("clicks", "data", "--model", "hippocampus"),
    "simulate": ("simulate", "--data", "data", "--output", "out", "--labels", "a"),
}
_WRONG = [
    *((command, "--threads", value) for command in _COMMANDS for value in ("-1", _HUGE)),
    *((command, "--seed", value) for command in ("fit", "clicks") for value in ("-1", "2.5", _HUGE)),
    *(("simulate", "--first-seed", value) for value in ("-1", _HUGE)),
    *(("simulate", "--seeds", value) for value in ("0", _HUGE)),
    *(("simulate", "--test-fraction", value) for value in ("-1", "2", "nan", "inf")),
    *(("simulate", f"--{name}", "0") for name in ("rounds", "batch", "start", "steps", "snapshots")),
    *(("predict-cluster", f"--{name}", value) for name in ("shards", "timeout-min") for value in ("0", _HUGE)),
    *(("predict-cluster", f"--{name}", "-1") for name in ("max-parallel", "retries")),
    ("simulate", "--continue-steps", "-1"),
    ("fit", "--validate", "-1"),
    ("clicks", "--limit", "-1"),
    ("clicks", "--noc-cap", "0"),
    *(("clicks", "--jitter", value) for value in ("-1", "2", "nan")),
]


@pytest.mark.parametrize(("command", "option", "value"), _WRONG)
def test_a_wrong_number_names_its_option(command: str, option: str, value: str) -> None:
    done = CliRunner().invoke(app, [*_COMMANDS[command], option, value], env={"COLUMNS": "300"})
    assert done.exit_code == 2, done.output
    assert f"Invalid value for '{option}'" in done.output
