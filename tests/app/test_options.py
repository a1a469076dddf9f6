"""The options of a project: valid values, and refused starts."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from live import preloaded_stock_command, refused_start, serve_command
from typer.testing import CliRunner

from deformux.data.choices import Choices
from deformux.networks.presets import PRESETS
from deformux.networks.pretrained import PRETRAINED
from deformux_label.cli.main import app
from deformux_label.lib.configs.project import OPTIONS, InvalidOption, Project

GOOD = {"labels": "anterior,posterior"}
# option, bad value, words of the sentence
BAD = [
    ("preset", "huge", tuple(PRESETS)),
    ("modality", "pet", ("ct", "mr")),
    ("spacing", "1,2", ("native", "three")),
    ("spacing", "1,2,x", ("native", "three", "1.5,1.5,2")),
    ("spacing", "0,1,1", ("native", "0.05")),
    ("spacing", "nan,1,1", ("native", "0.05")),
    ("patch_size", "96", ("three whole numbers", "1", "512")),
    ("patch_size", "0,96,96", ("1", "512")),
    ("patch_size", "9.5,96,96", ("three whole numbers", "96,96,96")),
    ("window", "low,high", ("two numbers", "-175,250")),
    ("window", "250,-175", ("low < high",)),
    ("percentiles", "5", ("two numbers", "0.5,99.5")),
    ("percentiles", "5,101", ("100",)),
    ("frame", "sagittal", ("ras", "acquisition")),
    ("keep_largest", "true", ("yes", "no")),
    ("train_minutes", "0", ("auto", "0.1")),
    ("train_minutes", "long", ("number", "100000")),
    ("pretrained", "brain", (*PRETRAINED, "none")),
    ("auto_train", "-1", ("whole number", "0")),
    ("auto_train", "2.5", ("whole number", "0")),
    ("lease_minutes", "nan", ("number", "0")),
    ("lease_minutes", "soon", ("number", "0")),
    ("cache_gb", "-0.5", ("number", "0")),
    ("train_devices", "gpu", ("one", "auto", "cuda:0,cuda:1")),
    ("train_devices", "cpu,cuda:0", ("one", "auto", "cuda:0,cuda:1")),
    ("train_devices", "cuda:1,cuda:1", ("each GPU once",)),
    ("labels", "a,,b", ("comma-separated",)),
    ("labels", "a,b,a", ("'a' twice",)),
    ("labels", "liver,background", ("background",)),
    ("labels", "liver,voxel_order", ("voxel_order",)),
    ("labels", ",".join(f"l{i}" for i in range(255)), ("254",)),
    ("presets", "tiny", OPTIONS),
]


def test_defaults() -> None:
    project = Project.from_conf(GOOD)
    assert project.label_values == {"anterior": 1, "posterior": 2}
    assert project.choices == Choices(), "everything is left to the plan"
    assert (project.pretrained, project.train_minutes) == (None, None)


def test_every_option() -> None:
    conf = {
        "labels": " left kidney , tumour (3) ",
        "modality": "mr",
        "preset": "small",
        "spacing": "1.5,1.5,2",
        "patch_size": "64,48,1",
        "window": "-1000,400",
        "percentiles": "1,99",
        "frame": "acquisition",
        "keep_largest": "yes",
        "train_minutes": "2.5",
        "pretrained": "none",
        "auto_train": "3",
        "lease_minutes": "7.5",
        "cache_gb": "0.25",
        "train_devices": "cuda:0, cuda:2",
    }
    project = Project.from_conf(conf)
    assert project.labels == ("left kidney", "tumour (3)")
    assert (project.auto_train, project.lease_minutes, project.cache_gb) == (3, 7.5, 0.25)
    assert project.train_devices == "cuda:0,cuda:2"
    chosen = Choices(
        "mr", (-1000.0, 400.0), (1.0, 99.0), "acquisition", (1.5, 1.5, 2.0), (64, 48, 1), "small", keep_largest=True
    )
    assert (project.choices, project.train_minutes) == (chosen, 2.5)
    assert Project.from_conf(project.to_conf()) == project


def test_every_digit_of_an_option_comes_back() -> None:
    project = Project.from_conf({**GOOD, "spacing": "0.70312512,0.70312512,3", "percentiles": "0.1234567,99.5"})
    assert project.choices.spacing_mm == (0.70312512, 0.70312512, 3)
    assert Project.from_conf(project.to_conf()) == project


@pytest.mark.parametrize("name", PRETRAINED)
def test_a_pretrained_model_brings_its_own_options(name: str) -> None:
    project = Project.from_conf({"pretrained": name})
    assert project.labels
    assert Project.from_conf(project.to_conf()) == project
    other = next(preset for preset in PRESETS if preset != project.preset)
    with pytest.raises(InvalidOption, match=project.preset):
        Project.from_conf({"pretrained": name, "preset": other})


def test_labels_are_required() -> None:
    with pytest.raises(InvalidOption, match="anterior,posterior"):
        Project.from_conf({})


@pytest.mark.parametrize(("option", "value", "named"), BAD)
def test_a_bad_value_names_the_valid_ones(option: str, value: str, named: tuple[str, ...]) -> None:
    with pytest.raises(InvalidOption) as error:
        Project.from_conf({**GOOD, option: value})
    for word in named:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("option", "value", "named"), [bad for bad in BAD if bad[0] in OPTIONS])
def test_serve_ends_with_one_sentence(option: str, value: str, named: tuple[str, ...], tmp_path: Path) -> None:
    command = serve_command(tmp_path, {**GOOD, option: value})[1:]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert result.stderr.startswith("deformux-label: ")
    assert result.stderr.count("\n") == 1
    for word in named:
        assert word in result.stderr


def test_serve_checks_port_and_folder(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for extra, word in (
            (["--port", port], port),
            (["--port", "99999"], "65535"),
            (["--host", "no.such.host"], "no.such"),
        ):
            result = CliRunner().invoke(app, [*serve_command(tmp_path, GOOD)[1:], *extra])
            assert result.exit_code == 2
            assert word in result.stderr
            assert result.stderr.count("\n") == 1
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(app, serve_command(tmp_path / "file", GOOD)[1:])
    assert result.exit_code == 2
    assert "folder" in result.stderr


@pytest.mark.parametrize(("conf", "words"), [({"preset": "huge"}, tuple(PRESETS)), ({"network": "unet"}, OPTIONS)])
def test_monai_labels_own_command_ends_with_one_sentence(conf: dict, words: tuple[str, ...], tmp_path: Path) -> None:
    command = preloaded_stock_command(tmp_path / "studies", {**GOOD, **conf})
    last = refused_start([*command, "--host", "127.0.0.1", "--port", "1"], tmp_path)
    for word in words:
        assert word in last


def test_projects_keep_their_state_apart(tmp_path: Path) -> None:
    def folder(studies: str = "a", **conf: str) -> Path:
        return Project.from_conf({**GOOD, **conf}).state_folder(tmp_path, str(tmp_path / studies))

    same = {folder(), folder(preset="small"), folder(spacing="1,1,1"), folder("./b/../a")}
    assert len(same) == 1, "other sizes and spacings are the same project: its versions carry their own"
    others = [folder("b"), folder(labels="posterior,anterior"), folder(labels="anterior"), folder(modality="mr")]
    assert len({*same, *others}) == 5
    assert all(path.parent == tmp_path / "model" for path in others)


def test_a_project_of_the_former_default_modality_goes_on(tmp_path: Path) -> None:
    def folder(**conf: str) -> Path:
        return Project.from_conf({**GOOD, **conf}).state_folder(tmp_path, str(tmp_path / "a"))

    before = folder(modality="ct")
    assert folder() != before
    before.mkdir(parents=True)
    assert folder() == before
