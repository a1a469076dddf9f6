"""Results of ``deformux clicks``, against sums by hand and ``evaluate``."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from deformux.cli.main import app
from deformux.data.cases import find_cases
from deformux.data.preprocessing import Preprocessing
from deformux.inference.evaluate import evaluate
from deformux.inference.metrics import surface_dice_per_label
from deformux.interactive.click_benchmark import CLICK_COUNTS, CaseResult, summarise_clicks
from deformux.networks.deformux_net import DeformUXNet
from deformux.networks.model_file import ModelCard, save_model


def result(robot: str, dice: tuple[float, ...], seconds: tuple[float, ...]) -> CaseResult:
    return CaseResult("a", robot, dice, (0.5,) * len(CLICK_COUNTS), seconds, cap=20)


def test_area_and_clicks_needed() -> None:
    # Fifteen clicks, the eleventh of which reaches 0.9 and 0.85.
    slow = result("robot", (0.2, 0.5, 0.5, 0.6, 0.7, 0.7, *[0.8] * 5, 0.95, 0.9, 0.9, 0.9, 0.9), (0.1,) * 15)
    assert slow.area == pytest.approx(0.5 + 0.55 + 0.65 + 0.7)
    assert [slow.clicks_to(at) for at in (0.2, 0.5, 0.8, 0.85, 0.9, 0.99)] == [0, 1, 6, 11, 11, None]
    # Nothing left to correct after one click: the mask stays as it is.
    quick = result("robot", (0.9, 1.0), (0.3,))
    assert quick.area == pytest.approx(4.0)
    (line,) = summarise_clicks([slow, quick])
    assert line.cases == 2
    np.testing.assert_allclose(line.dice, [(0.2 + 0.9) / 2, *(np.array([0.5, 0.5, 0.6, 0.7, 0.8]) + 1) / 2])
    assert line.clicks_to == (3.0, 5.5, 5.5)
    assert line.failures == (0, 0, 0)
    assert line.median_s == pytest.approx(0.1)
    hopeless = result("other", (0.1,) * 21, (0.1,) * 20)
    first, second = summarise_clicks([slow, quick, hopeless])
    assert (first.robot, second.robot) == ("robot", "other")
    assert second.clicks_to == (20.0, 20.0, 20.0)
    assert second.failures == (1, 1, 1)


def test_surface_dice_counts_the_surface_within_two_millimetres() -> None:
    truth = np.zeros((20, 20, 20), np.uint8)
    truth[5:15, 5:15, 5:15] = 2
    moved = np.roll(truth, 1, axis=0)
    np.testing.assert_equal(surface_dice_per_label(truth, truth, 2, spacing_mm=(1, 1, 1)), [np.nan, 1.0])
    assert surface_dice_per_label(moved, truth, 2, spacing_mm=(1.9, 1, 1))[1] == 1
    # 3 mm to the side, both ends of the block are too far away: two of its six faces.
    share = surface_dice_per_label(moved, truth, 2, spacing_mm=(3, 1, 1))[1]
    assert share == pytest.approx(4 / 6, abs=0.1)
    assert surface_dice_per_label(0 * truth, truth, 2, spacing_mm=(1, 1, 1))[1] == 0
    with pytest.raises(ValueError, match="one shape"):
        surface_dice_per_label(truth[1:], truth, 2, spacing_mm=(1, 1, 1))


def test_the_command_writes_what_it_measured(write_case, tmp_path: Path) -> None:
    for seed, name in enumerate(("a", "b")):
        write_case(name, seed=seed, size=(16, 16, 16))
    torch.manual_seed(0)
    network = DeformUXNet(1, 3, "tiny", guidance=True)
    prep = Preprocessing("ct", patch_size=(16, 16, 16))
    model = tmp_path / "model.safetensors"
    save_model(model, network, ModelCard(("ball", "box"), prep, "tiny", network_options={"guidance": True}))
    output = tmp_path / "out"
    arguments = ["clicks", str(tmp_path), "--model", str(model), "--output", str(output), "--noc-cap", "1"]
    done = CliRunner().invoke(app, [*arguments, "--device", "cpu", "--limit", "2"])
    assert done.exit_code == 0, done.output
    rows = list(csv.DictReader((output / "per_case.csv").open()))
    assert [(row["case"], row["robot"]) for row in rows] == [
        (case, robot) for case in ("a", "b") for robot in ("centred", "jittered")
    ]
    scores = evaluate(network, find_cases(tmp_path), prep, n_labels=2)
    for row in rows:
        assert float(row["dice_0"]) == pytest.approx(np.mean(scores[row["case"]]), abs=1e-5)
        assert row["clicks"] == "10"
    summary = list(csv.DictReader((output / "summary.csv").open()))
    for line in summary:
        own = [row for row in rows if row["robot"] == line["robot"]]
        for column in ("dice_5", "surface_dice_10", "auc_1_to_5"):
            assert float(line[column]) == pytest.approx(np.mean([float(row[column]) for row in own]), abs=1e-5)
    assert "| seconds per click" in (output / "summary.md").read_text()
    assert (output / "clicks.png").read_bytes().startswith(b"\x89PNG")
    refused = CliRunner().invoke(app, ["clicks", str(tmp_path), "--model", str(tmp_path / "none.safetensors")])
    assert refused.exit_code == 2
    assert "no model file" in " ".join(refused.output.split())
