"""Networks that halve some axes less often, from training to an edit by clicks."""

from pathlib import Path

import numpy as np
import pytest
import torch

from deformux.data.preprocessing import Preprocessing
from deformux.fitting.fit import fit
from deformux.fitting.recipe import RECIPES
from deformux.inference.sliding_window import segment
from deformux.interactive.editor import Editor
from deformux.interactive.open_scan import open_scan
from deformux.networks.deformux_net import DeformUXNet
from deformux.networks.model_file import ModelCard, load_model, network_options, save_model

RECIPE = RECIPES["finetune"].replace(steps=2, epochs=1, click_probability=1.0, click_start=0.0)
LABELS = ("ball", "box")


@pytest.mark.parametrize(
    ("size", "patch", "strides"),
    [
        ((36, 33, 10), (32, 32, 10), ((2, 2, 1), (2, 2, 1), (2, 2, 2), (2, 2, 2))),
        ((36, 33, 1), (32, 32, 1), ((2, 2, 1),) * 4),
        ((36, 33, 6), (32, 32, 1), ((2, 2, 1),) * 4),
        ((7, 36, 33), (5, 32, 32), ((1, 2, 2),) * 4),
    ],
    ids=["thick", "one slice", "slice by slice", "thick first"],
)
def test_a_network_trains_segments_and_takes_clicks(size, patch, strides, write_case, tmp_path: Path) -> None:
    affine = np.diag([*(8.0 if size[axis] < 32 else 1.25 for axis in range(3)), 1.0])
    case = write_case("a", size=size, affine=affine)
    prep = Preprocessing("ct", patch_size=patch)
    torch.manual_seed(0)
    trained = DeformUXNet(1, 3, "tiny", guidance=True, strides=strides)
    result = fit(trained, [case], recipe=RECIPE, prep=prep, labels=LABELS)
    assert np.isfinite(result.losses).all()
    card = ModelCard(LABELS, prep, "tiny", network_options=network_options(trained))
    save_model(tmp_path / "model.safetensors", trained, card)
    network, read = load_model(tmp_path / "model.safetensors")
    assert read.preprocessing == prep
    mask, probabilities = segment(network, case.image, prep)
    assert mask.shape == (1, *size)
    assert torch.isfinite(probabilities).all()
    scan = open_scan(network, case.image, prep)
    np.testing.assert_array_equal(scan.labels, mask[0].numpy())
    editor = Editor(scan, network, prep)
    voxel = tuple(n // 2 for n in size)
    edited = editor.apply({1: [voxel]})
    assert edited[voxel] == 1
    np.testing.assert_array_equal(editor.apply({}), scan.labels)
    if 1 in patch:
        # A network of single slices cannot change another; nor does a click move borders there.
        changed = np.argwhere(edited != scan.labels)
        assert set(changed[:, patch.index(1)]) <= {voxel[patch.index(1)]}
