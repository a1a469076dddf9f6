"""Model files and versions: written files can be read, and no half-written file is ever visible."""

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from deformux.data.atomic_files import replacing
from deformux.data.preprocessing import Preprocessing
from deformux.networks.deformux_net import DeformUXNet
from deformux.networks.model_file import (
    InvalidModel,
    ModelCard,
    load_model,
    network_options,
    read_card,
    save_model,
    warm_start,
    with_guidance,
)
from deformux.networks.pretrained import pretrained_path
from deformux.publishing.model_versions import ModelVersions


def card(**changes) -> ModelCard:
    values = {"labels": ("liver", "spleen"), "preprocessing": Preprocessing("ct", spacing_mm=(1.5, 1.5, 2.0))}
    return ModelCard(**{**values, "preset": "tiny", **changes})


def test_a_model_survives_saving_and_loading(tmp_path: Path) -> None:
    net = DeformUXNet(1, 3, "tiny", offset_planes="xy")
    written = card(network_options={"offset_planes": "xy"}, training_cases=("a", "b"), parent="v0001")
    save_model(tmp_path / "m.safetensors", net, written)
    loaded, read = load_model(tmp_path / "m.safetensors")
    assert dataclasses.replace(read, weights_sha256="") == written
    assert not loaded.training
    for name, value in net.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=0, atol=0)


def test_flipped_bits_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_model(path, DeformUXNet(1, 3, "tiny"), card())
    intact, read = path.read_bytes(), read_card(path)
    assert read.weights_sha256 == hashlib.sha256(intact).hexdigest()
    for position in (len(intact) // 2, len(intact) - 1):
        path.write_bytes(intact[:position] + bytes([intact[position] ^ 1]) + intact[position + 1 :])
        for use in (load_model, lambda file: warm_start(DeformUXNet(1, 3, "tiny"), file)):
            with pytest.raises(InvalidModel, match="its checksum is not the one in its card"):
                use(path)
    # Older cards have no checksum.
    path.with_suffix(".json").write_text(dataclasses.replace(read, weights_sha256="").to_json())
    assert load_model(path)[1].labels == read.labels


@pytest.mark.parametrize("text", ["[]", "{}", '{"labels": "ab"}', '{"preprocessing": []}', "null", "\x00", "1e999"])
def test_a_file_that_is_not_a_card_is_named(text: str, tmp_path: Path) -> None:
    save_model(tmp_path / "m.safetensors", DeformUXNet(1, 3, "tiny"), card())
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(InvalidModel, match=r"m\.json is not a model card"):
        read_card(tmp_path / "m.safetensors")


def test_the_weights_are_plain_safetensors(tmp_path: Path) -> None:
    net = DeformUXNet(1, 3, "tiny")
    save_model(tmp_path / "m.safetensors", net, card())
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert set(file.keys()) == set(net.state_dict())


def test_a_dice_of_nan_is_null_in_the_card(tmp_path: Path) -> None:
    save_model(
        tmp_path / "m.safetensors", DeformUXNet(1, 3, "tiny"), card(validation={"per_case": {"a": [0.5, float("nan")]}})
    )
    assert json.loads((tmp_path / "m.json").read_text())["validation"] == {"per_case": {"a": [0.5, None]}}


def test_a_damaged_model_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    with pytest.raises(InvalidModel, match=r"m\.safetensors needs its card"):
        load_model(path)
    save_model(path, DeformUXNet(1, 3, "tiny"), card())
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InvalidModel, match=r"m\.safetensors"):
        load_model(path)
    path.write_bytes(whole)
    path.with_suffix(".json").write_text(card(preset="small").to_json())
    with pytest.raises(InvalidModel, match="does not fit its card"):
        load_model(path)
    path.with_suffix(".json").write_text("{}")
    with pytest.raises(InvalidModel, match="not a model card"):
        load_model(path)


def test_warm_start_copies_all_but_the_output_layer(tmp_path: Path) -> None:
    source = DeformUXNet(1, 3, "tiny")
    save_model(tmp_path / "m.safetensors", source, card())
    other = DeformUXNet(1, 6, "tiny")
    fresh = warm_start(other, tmp_path / "m.safetensors")
    assert fresh
    assert all(name.startswith("head.") for name in fresh)
    torch.testing.assert_close(other.fuse.state_dict(), source.fuse.state_dict())
    with pytest.raises(InvalidModel, match="a different architecture"):
        warm_start(DeformUXNet(1, 3, "small"), tmp_path / "m.safetensors")


def test_strides_survive_saving_and_loading_and_are_saved_only_if_they_are_not_the_published(tmp_path: Path) -> None:
    strides = ((2, 2, 1), (2, 2, 1), (2, 2, 2), (2, 2, 2))
    net = DeformUXNet(1, 3, "tiny", strides=strides, guidance=True).eval()
    assert network_options(net) == {"guidance": True, "strides": strides}
    assert network_options(DeformUXNet(1, 3, "tiny")) == {}
    written = card(network_options=network_options(net))
    save_model(tmp_path / "m.safetensors", net, written)
    loaded, read = load_model(tmp_path / "m.safetensors")
    assert dataclasses.replace(read, weights_sha256="") == written
    assert loaded.strides == strides
    assert hash(loaded.strides)  # tuples, not JSON's lists
    x = torch.randn(1, 1, 20, 30, 6)
    with torch.no_grad():
        assert torch.equal(loaded(x), net(x))
    path = tmp_path / "m.json"
    path.write_text(path.read_text().replace('"strides"', '"stripes"'))
    with pytest.raises(InvalidModel, match="does not fit its card"):
        load_model(tmp_path / "m.safetensors")


def test_other_strides_start_from_every_kernel_that_fits(tmp_path: Path) -> None:
    source = DeformUXNet(1, 3, "tiny", guidance=True)
    torch.nn.init.normal_(source.get_parameter("skips.0.layer.conv1.conv.guidance"))
    save_model(tmp_path / "m.safetensors", source, card(network_options={"guidance": True}))
    other = DeformUXNet(1, 3, "tiny", guidance=True, strides=((2, 2, 1), (2, 2, 1), (2, 2, 2), (2, 2, 2)))
    fresh = warm_start(other, tmp_path / "m.safetensors")
    # Of the encoder the reductions, of the decoder, whose last two stages have the two finest grids, all but the
    # pointwise convolutions.
    assert {name for name in fresh if name.startswith("downsample")} == {
        "downsample.0.0.guidance",
        "downsample.0.0.weight",
        "downsample.1.1.weight",
    }
    decoder = [name for name in fresh if not name.startswith("downsample")]
    assert {name.rsplit(".layer", 1)[0].split(".conv_block")[0].split(".transp")[0] for name in decoder} == {
        *("skips.0", "skips.1", "ups.2", "ups.3", "fuse")
    }
    assert len(fresh) < len(other.state_dict()) // 2
    for name in set(other.state_dict()) - set(fresh):
        assert torch.equal(other.state_dict()[name], source.state_dict()[name]), name


def test_an_automatic_model_becomes_an_interactive_one_and_back_without_losing_a_decimal(tmp_path: Path) -> None:
    automatic = DeformUXNet(1, 3, "tiny", offset_planes="xy")
    guided = with_guidance(automatic)
    assert with_guidance(guided) is guided
    assert (automatic.guidance_channels, guided.guidance_channels) == (0, 5)
    for name, value in guided.named_parameters():
        if name.endswith(".guidance"):
            torch.nn.init.normal_(value)
    options = {"offset_planes": "xy", "guidance": True}
    save_model(tmp_path / "guided.safetensors", guided, card(network_options=options))
    loaded, _ = load_model(tmp_path / "guided.safetensors")
    torch.testing.assert_close(loaded.state_dict(), guided.state_dict(), rtol=0, atol=0)
    back = DeformUXNet(1, 3, "tiny", offset_planes="xy")
    assert warm_start(back, tmp_path / "guided.safetensors") == []
    torch.testing.assert_close(back.state_dict(), automatic.state_dict(), rtol=0, atol=0)
    save_model(tmp_path / "automatic.safetensors", back, card(network_options={"offset_planes": "xy"}))
    again = DeformUXNet(1, 3, "tiny", offset_planes="xy", guidance=True)
    fresh = warm_start(again, tmp_path / "automatic.safetensors")
    assert fresh == [name for name in sorted(again.state_dict()) if name.endswith(".guidance")]
    assert not any(again.get_parameter(name).any() for name in fresh)
    # With other labels, guidance means something else.
    fresh = warm_start(DeformUXNet(1, 5, "tiny", offset_planes="xy", guidance=True), tmp_path / "guided.safetensors")
    assert {name.rpartition(".")[2] for name in fresh if not name.startswith("head.")} == {"guidance"}


def test_an_unknown_pretrained_name_lists_the_valid_ones() -> None:
    with pytest.raises(ValueError, match="hippocampus"):
        pretrained_path("brain")


def test_versions_are_numbered_and_one_is_published(tmp_path: Path) -> None:
    versions = ModelVersions(tmp_path / "models")
    assert versions.names() == []
    assert versions.published() is None
    names = [versions.write(DeformUXNet(1, 3, "tiny"), card()) for _ in range(2)]
    assert names == versions.names() == ["v0001", "v0002"]
    assert versions.published() is None
    versions.publish("v0002")
    versions.publish("v0001")
    assert ModelVersions(tmp_path / "models").published() == "v0001"
    with pytest.raises(ValueError, match="v0001, v0002"):
        versions.publish("v0009")


def test_an_error_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half of the n")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    script = (
        "import os, signal\nfrom pathlib import Path\nfrom deformux.data.atomic_files import replacing\n"
        f"with replacing(Path({str(path)!r})) as temporary:\n"
        "    temporary.write_text('half of the n')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "old"


def test_a_written_file_has_ordinary_permissions(tmp_path: Path) -> None:
    with replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("a")
    (tmp_path / "b.txt").write_text("b")
    modes = {os.stat(tmp_path / name).st_mode for name in ("a.txt", "b.txt")}
    assert len(modes) == 1
